"""Dropout whose masks belong to events: they depend on no rank, device, padding or grouping.

Which elements of an event's activations are dropped is a pure function of (seed, epoch, the event's
position, side, place in the network, slot, dimension). Each event, side and place has a SplitMix64
stream of its own (Steele, Lea & Flood, 2014), of which an element takes 16 bits: probabilities are
rounded to 1/65536, and the kept elements are scaled by what was rounded to.

Shape legend: B batch, R rows (a slot of an event's history each), D width.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cache_server.hashing import mix, mix64

_RESOLUTION = 65_536
_LANES = 4  # 16-bit numbers in a word of 64 bits

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB

_KEYS_ARE_MISSING = "dropout in training needs the events' keys"


def dropout_keys(seed: int, epoch: int, positions_B: npt.NDArray[np.int64]) -> Tensor:
    """Returns (2, B) int64: the keys of the events' user sides, then of their item sides.

    Args:
        seed: of the run.
        epoch: counted from 0.
        positions_B: the events' positions in the total order.
    """
    epoch_key = mix64(mix64(np.array([seed], np.int64)).view(np.int64) + np.int64(epoch))
    event_keys_B = mix64(positions_B ^ epoch_key.view(np.int64)).view(np.int64)
    sides_21 = np.arange(2, dtype=np.int64)[:, None]
    keys_2B = mix64((event_keys_B ^ sides_21).ravel()).view(np.int64)
    return torch.from_numpy(keys_2B.reshape(2, -1))


class EventDropout(nn.Module):
    """Sets elements to zero with a probability in training, and scales up those it keeps."""

    def __init__(self, probability: float, place: int) -> None:
        """
        Args:
            probability: of an element to be dropped, in [0, 1).
            place: number of this layer in the network; other places draw other masks.
        """
        super().__init__()
        self.threshold = round(probability * _RESOLUTION)
        self.place = place

    def forward(
        self, x_RD: Tensor, keys_R: Tensor | None, slot_R: Tensor, *, relu: bool = False
    ) -> Tensor:
        """Returns x with elements dropped.

        Args:
            x_RD: activations.
            keys_R: the key of each row's event, of ``dropout_keys``; needed in training only.
            slot_R: the slot of each row in its event's history.
            relu: whether a ReLU comes first; on a CPU both are one pass.
        """
        is_dropping = self.training and self.threshold > 0
        if is_dropping and x_RD.device.type == "cpu":
            assert keys_R is not None, _KEYS_ARE_MISSING
            return cast(
                Tensor,
                _DropoutOnCPU.apply(x_RD, keys_R, slot_R, self.place, self.threshold, relu),  # type: ignore[no-untyped-call]
            )
        if relu:
            x_RD = F.relu(x_RD)
        if not is_dropping:
            return x_RD
        assert keys_R is not None, _KEYS_ARE_MISSING
        width, dtype = x_RD.shape[1], x_RD.dtype
        return x_RD * draw_factors(keys_R, slot_R, self.place, width, self.threshold, dtype)


def draw_factors(
    keys_R: Tensor, slot_R: Tensor, place: int, width: int, threshold: int, dtype: torch.dtype
) -> Tensor:
    """Returns (R, D): 0 where an element is dropped, else what it is scaled by; on any device.

    Args:
        keys_R: int64.
        slot_R: int64.
        place: number of the layer.
        width: D.
        threshold: an element is dropped with probability threshold / 65536.
        dtype: of the factors.
    """
    num_words = -(-width // _LANES)
    seeds_R = _mix(keys_R + place) + slot_R * num_words * _signed(_GAMMA)
    counts_w = torch.arange(num_words, device=keys_R.device)
    words_Rw = _mix(seeds_R[:, None] + counts_w * _signed(_GAMMA))
    lanes_RD = words_Rw.view(torch.int16)[:, :width]
    # The lanes are signed: [-32768, 32767] instead of [0, 65535].
    keep_RD = lanes_RD >= threshold - _RESOLUTION // 2
    return keep_RD.to(dtype).mul_(_scale(threshold))


def _scale(threshold: int) -> float:
    """Of elements that are kept."""
    return _RESOLUTION / (_RESOLUTION - threshold)


class _DropoutOnCPU(torch.autograd.Function):
    """The product with ``draw_factors``, to the same bits, in one compiled pass.

    The masks are drawn again for the gradient: that takes less time than keeping them. Behind a
    ReLU they are not needed: what came out above zero went through both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        keys_R: Tensor,
        slot_R: Tensor,
        place: int,
        threshold: int,
        relu: bool,
    ) -> Tensor:
        dropped_RD = _drop_on_cpu(x_RD, keys_R, slot_R, place, threshold, relu)
        ctx.save_for_backward(keys_R, slot_R, dropped_RD if relu else None)
        ctx.place, ctx.threshold = place, threshold
        return dropped_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        keys_R, slot_R, dropped_RD = ctx.saved_tensors
        if dropped_RD is None:
            grad_RD = _drop_on_cpu(grad_RD, keys_R, slot_R, ctx.place, ctx.threshold, relu=False)
        else:
            grad_RD = _pass_on_cpu(grad_RD, dropped_RD, ctx.threshold)
        return grad_RD, None, None, None, None, None


def _drop_on_cpu(
    x_RD: Tensor, keys_R: Tensor, slot_R: Tensor, place: int, threshold: int, relu: bool
) -> Tensor:
    x_RD, dtype = _in_numpy(x_RD), x_RD.dtype
    dropped_RD = torch.empty_like(x_RD)
    _drop(
        x_RD.numpy(),
        keys_R.numpy(),
        slot_R.numpy(),
        place,
        threshold,
        *_numbers(dtype, _scale(threshold), 0.0, 0.0 if relu else math.nan),
        dropped_RD.numpy(),
    )
    return dropped_RD.to(dtype)


def _pass_on_cpu(grad_RD: Tensor, dropped_RD: Tensor, threshold: int) -> Tensor:
    """The gradient behind which ReLU and dropout stood, of what came out of them."""
    grad_RD, dtype = _in_numpy(grad_RD), grad_RD.dtype
    passed_RD = torch.empty_like(grad_RD)
    _pass(
        grad_RD.view(-1).numpy(),
        _in_numpy(dropped_RD).view(-1).numpy(),
        *_numbers(dtype, _scale(threshold), 0.0),
        passed_RD.view(-1).numpy(),
    )
    return passed_RD.to(dtype)


def _in_numpy(x: Tensor) -> Tensor:
    # NumPy has no bfloat16. Products of two such numbers are exact in float32, rounded once after.
    return x.detach().to(_numpy_dtype(x.dtype)).contiguous()


def _numpy_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _numbers(dtype: torch.dtype, *numbers: float) -> npt.NDArray[np.floating]:
    """As numbers of a type: compiled code computes in that of its arguments."""
    array: npt.NDArray[np.floating] = (
        torch.tensor(numbers, dtype=dtype).to(_numpy_dtype(dtype)).numpy()
    )
    return array


@njit(nogil=True, cache=True)
def _pass(grad, dropped, scale, zero, passed):  # type: ignore[no-untyped-def]  # compiled
    for i in range(grad.size):
        passed[i] = zero if dropped[i] <= zero else grad[i] * scale


@njit(nogil=True, cache=True)
def _drop(x_RD, keys_R, slot_R, place, threshold, scale, zero, floor, dropped_RD):  # type: ignore[no-untyped-def]  # compiled
    # What is at most the floor becomes zero; with a floor that is no number nothing does.
    width = x_RD.shape[1]
    num_whole = width // 4  # words of which all lanes are needed
    num_words = (width + 3) // 4
    for i in range(keys_R.size):
        seed = mix(np.uint64(keys_R[i]) + np.uint64(place))
        seed += np.uint64(slot_R[i] * num_words) * np.uint64(_GAMMA)
        for word in range(num_whole):  # no branch inside: this loop becomes vector instructions
            lanes = mix(seed + np.uint64(word) * np.uint64(_GAMMA))
            for lane in range(4):
                at = 4 * word + lane
                x = zero if x_RD[i, at] <= floor else x_RD[i, at]
                dropped_RD[i, at] = x * _factor(lanes, lane, threshold, scale, zero)
        if num_whole < num_words:
            lanes = mix(seed + np.uint64(num_whole) * np.uint64(_GAMMA))
            for lane in range(width - 4 * num_whole):
                at = 4 * num_whole + lane
                x = zero if x_RD[i, at] <= floor else x_RD[i, at]
                dropped_RD[i, at] = x * _factor(lanes, lane, threshold, scale, zero)


@njit(nogil=True, cache=True, inline="always")
def _factor(lanes, lane, threshold, scale, zero):  # type: ignore[no-untyped-def]
    # Of the lane's sign bit, flipped, as in draw_factors.
    number = ((lanes >> np.uint64(16 * lane)) & np.uint64(0xFFFF)) ^ np.uint64(0x8000)
    return scale if np.int64(number) >= threshold else zero


def _mix(x: Tensor) -> Tensor:
    """``cache_server.hashing.mix`` on any device; int64 wraps as uint64 does."""
    z = x + _signed(_GAMMA)
    z = (z ^ _shift(z, 30)) * _signed(_MULTIPLIER_1)
    z = (z ^ _shift(z, 27)) * _signed(_MULTIPLIER_2)
    return z ^ _shift(z, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """The shift to the right that fills with zeros, not with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
