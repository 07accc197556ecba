"""How a model is trained."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from felrec_dist.section import Section
from felrec_dist.training.schedule import ScheduleConfig

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class TrainingConfig(Section):
    """SGD as in the paper; the defaults are its values."""

    schedule: ScheduleConfig = ScheduleConfig()
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    grad_clip_value: float = Field(1.0, gt=0.0, description="each gradient element is clipped")
    seed: int = Field(0, ge=0)
    dtype: Literal["float32", "float64"] = Field(
        "float32", description="of the model and of what the ranks exchange"
    )
