"""Learning rates (spec, "Learning rate").

``step``, the default: linear warm-up from eta_min to base over the steps of the warm-up epochs,
then cosine to eta_min.
``released``: set once per epoch as the authors' code does; epoch 0 runs at eta_min.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from felrec_dist.section import Section


class ScheduleConfig(Section):
    """The defaults are the paper's, but for ``kind``."""

    kind: Literal["step", "released"] = "step"
    base_lr: float = Field(0.01, gt=0.0)
    eta_min: float = Field(1e-7, ge=0.0, description="lowest learning rate")
    epochs: int = Field(100, ge=1, description="E")
    warmup_epochs: int = Field(10, ge=0, description="w < E")

    @model_validator(mode="after")
    def _warmup_ends(self) -> ScheduleConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs = {self.warmup_epochs} must be below epochs = {self.epochs}"
            )
        if self.eta_min > self.base_lr:
            raise ValueError(f"eta_min = {self.eta_min} must not be above base_lr = {self.base_lr}")
        return self


def learning_rate(
    config: ScheduleConfig, epoch: int, step_in_epoch: int, steps_per_epoch: int
) -> float:
    """Returns the learning rate of a step; epochs and steps count from 0."""
    if config.kind == "released":
        done, warmup, total = epoch, config.warmup_epochs, config.epochs
    else:
        done = epoch * steps_per_epoch + step_in_epoch
        warmup = config.warmup_epochs * steps_per_epoch
        total = config.epochs * steps_per_epoch
    span = config.base_lr - config.eta_min
    if done < warmup:
        return config.eta_min + span * done / warmup
    progress = (done - warmup) / max(1, total - warmup - 1)
    return config.eta_min + span * (1.0 + math.cos(math.pi * progress)) / 2.0
