"""How a model is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, model_validator

from felrec_dist.section import Section
from felrec_dist.training.schedule import ScheduleConfig

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class TrainingConfig(Section):
    """SGD with momentum as in the paper; the defaults are its values."""

    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="SGD only")
    weight_decay: float = Field(0.0, ge=0.0, description="L2, added to the gradient")
    grad_clip_value: float | None = Field(
        1.0, gt=0.0, description="each gradient element is clipped; null for none"
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="training ends after so many epochs in a row without a better validation rank; "
        "null for all epochs",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the initial weights and queues, and of dropout"
    )
    dtype: Literal["float32", "float64"] = Field(
        "float32", description="of the model and of what the ranks exchange"
    )
    autocast: Literal["off", "bfloat16"] = Field(
        "off", description="type of the matrix products inside the encoder; faster on most GPUs"
    )

    @model_validator(mode="after")
    def _autocast_is_for_float32(self) -> TrainingConfig:
        if self.autocast != "off" and self.dtype != "float32":
            raise ValueError(
                f"autocast = {self.autocast} needs dtype = float32, it is {self.dtype}"
            )
        return self

    def build_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Returns the optimizer; each step sets its learning rate from the schedule."""
        if self.optimizer == "adam":
            return torch.optim.Adam(
                parameters, lr=self.schedule.base_lr, weight_decay=self.weight_decay
            )
        return torch.optim.SGD(
            parameters,
            lr=self.schedule.base_lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
