"""The state of an optimizer as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from felrec_dist.errors import NonFiniteLossError


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Returns the optimizer's tensors as ``<parameter>:<name of the state>``."""
    return {
        f"{name}:{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor],
) -> None:
    """The inverse of ``optimizer_state``.

    Raises:
        KeyError, ValueError: the state is of other parameters.
    """
    for full_name, value in state.items():
        name, key = full_name.split(":")
        # Adam counts its steps on the CPU, in float32, whatever the model is.
        tensor = value.clone() if key == "step" else value.to(parameters[name])
        if key != "step" and tensor.shape != parameters[name].shape:
            raise ValueError(f"{full_name} has shape {tuple(tensor.shape)}")
        optimizer.state[parameters[name]][key] = tensor


def check_finite(parameters: Mapping[str, Tensor], where: str) -> None:
    """Scores that are NaN are above nothing: such a model would have the best ranks of all.

    Raises:
        NonFiniteLossError: naming the first parameter that is not finite.
    """
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise NonFiniteLossError(
                "the weights are not finite",
                where=f"{where}, {name}",
                remedy="lower training.schedule.base_lr; the last checkpoint is intact",
            )
