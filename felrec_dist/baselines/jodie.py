"""JODIE* (Kumar et al. 2019, as changed in the FELRec paper): two RNNs that update the states of a
user and an item at each of their events, and a layer that predicts the vector of the user's next
item.

A state is kept in the cache and is a constant there. ``jodie`` keeps with it what its last update
was computed from, and computes that update again with the weights of the day: so the loss of the
prediction reaches the RNNs through the last event of the user, and through that of the item the
user met before. Everything else reads the states as they are kept. ``jodie-released`` keeps the
states alone: its RNNs learn from the "do not jump" terms only, and no time passes for it.

Shape legend: b events, D width, R width of a row of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MICROSECONDS_PER_HOUR = 3.6e9
# A time is kept as three numbers: float32 holds all whole ones below 2^24.
_TIME_BITS = 22


@dataclass(frozen=True)
class KeptRows:
    """Rows of the cache, taken apart; of an entity that has none everything is 0.

    Attributes:
        is_known_b1: whether there is a row.
        state_bD: the dynamic vector.
        before_bD: the state before the last update; the rest is ``jodie``'s only.
        partner_bD: the state of the other side that the update took.
        elapsed_b1: the time that it took.
        time_b3: of the last event.
    """

    is_known_b1: Tensor
    state_bD: Tensor
    before_bD: Tensor
    partner_bD: Tensor
    elapsed_b1: Tensor
    time_b3: Tensor

    @classmethod
    def of(cls, rows_bR: Tensor, width: int) -> KeptRows:
        parts = [1, width]
        if rows_bR.shape[1] > sum(parts):
            return cls(rows_bR[:, :1] > 0, *rows_bR[:, 1:].split([width, width, width, 1, 3], 1))
        known_b1, state_bD = rows_bR.split(parts, 1)
        none_b0 = rows_bR[:, :0]
        return cls(known_b1 > 0, state_bD, none_b0, none_b0, none_b0, none_b0)

    def elapsed_until(self, time_b: Tensor) -> Tensor:
        """Returns (b, 1): log(1 + hours) since the last event, 0 where there is none.

        Args:
            time_b: microseconds, int64.
        """
        high_b, middle_b, low_b = self.time_b3.long().unbind(1)
        last_b = (high_b << 2 * _TIME_BITS) + (middle_b << _TIME_BITS) + low_b
        hours_b1 = (time_b - last_b)[:, None].double() / _MICROSECONDS_PER_HOUR
        return torch.where(self.is_known_b1, hours_b1, 0.0).log1p().to(self.state_bD)


def split_time(time_b: Tensor) -> Tensor:
    """Returns (b, 3) whole numbers that float32 holds, of times in microseconds."""
    mask = (1 << _TIME_BITS) - 1
    return torch.stack(
        [time_b >> 2 * _TIME_BITS, (time_b >> _TIME_BITS) & mask, time_b & mask], dim=1
    )


class JODIEInputs(NamedTuple):
    """Events, with what is kept of those who take part as it was when the batch began.

    Attributes:
        time_b: microseconds, int64.
        user_bR, item_bR: rows of the cache.
        previous_bR: of the item the user met before; zeros where there is none.
        user_static_bD, item_static_bD, previous_static_bD: trained vectors; zeros where none.
    """

    time_b: Tensor
    user_bR: Tensor
    item_bR: Tensor
    previous_bR: Tensor
    user_static_bD: Tensor
    item_static_bD: Tensor
    previous_static_bD: Tensor


class JODIEOutput(NamedTuple):
    """Of each event.

    Attributes:
        losses_b3: prediction, jump of the user, jump of the item.
        prediction_b2D: unit vectors: where the next item's [dynamic | static] vector should be.
        user_bR, item_bR: new rows for the cache; constants.
    """

    losses_b3: Tensor
    prediction_b2D: Tensor
    user_bR: Tensor
    item_bR: Tensor


class JODIE(nn.Module):
    """The dense part: RNNs, projection, prediction, and a state for those who have none."""

    def __init__(self, width: int, *, is_released: bool) -> None:
        super().__init__()
        self.width = width
        self.is_released = is_released
        self.initial_user_D = nn.Parameter(F.normalize(torch.rand(width), dim=0))
        self.initial_item_D = nn.Parameter(F.normalize(torch.rand(width), dim=0))
        self.user_rnn = nn.RNNCell(width + 1, width)
        self.item_rnn = nn.RNNCell(width + 1, width)
        self.projection = nn.Linear(1, width)
        self.prediction = nn.Linear(4 * width, 2 * width)

    def forward(self, inputs: JODIEInputs) -> JODIEOutput:
        user, item, previous = (
            KeptRows.of(rows_bR, self.width)
            for rows_bR in (inputs.user_bR, inputs.item_bR, inputs.previous_bR)
        )
        user_bD = self._state(user, self.initial_user_D)
        item_bD = self._state(item, self.initial_item_D)
        user_elapsed_b1 = self._elapsed(user, inputs.time_b)
        item_elapsed_b1 = self._elapsed(item, inputs.time_b)

        projected_bD = self._traced(user, self.user_rnn, self.initial_user_D)
        projected_bD = projected_bD * (1.0 + self.projection(user_elapsed_b1))
        seen = [
            projected_bD,
            self._traced(previous, self.item_rnn, self.initial_item_D),
            inputs.previous_static_bD,
            inputs.user_static_bD,
        ]
        prediction_b2D = F.normalize(self.prediction(torch.cat(seen, dim=1)), dim=1)
        # With a gradient all targets would move together: then there is nothing to predict.
        target_b2D = torch.cat([item_bD, inputs.item_static_bD], dim=1).detach()

        new_user_bD = self._update(self.user_rnn, item_bD, user_elapsed_b1, user_bD)
        new_item_bD = self._update(self.item_rnn, user_bD, item_elapsed_b1, item_bD)
        losses = [
            (prediction_b2D - F.normalize(target_b2D, dim=1)).square().mean(dim=1),
            (new_user_bD - user_bD).square().mean(dim=1),
            (new_item_bD - item_bD).square().mean(dim=1),
        ]
        return JODIEOutput(
            torch.stack(losses, dim=1),
            prediction_b2D,
            self._row(new_user_bD, user_bD, item_bD, user_elapsed_b1, inputs.time_b),
            self._row(new_item_bD, item_bD, user_bD, item_elapsed_b1, inputs.time_b),
        )

    @property
    def unseen_item_D(self) -> Tensor:
        """The dynamic vector of a candidate that has no state."""
        if self.is_released:
            return torch.zeros_like(self.initial_item_D)
        return self._normalized(self.initial_item_D)

    def _normalized(self, state_D: Tensor) -> Tensor:
        return state_D if self.is_released else F.normalize(state_D, dim=-1)

    def _state(self, kept: KeptRows, initial_D: Tensor) -> Tensor:
        """The state as it is kept."""
        return torch.where(kept.is_known_b1, kept.state_bD, self._normalized(initial_D))

    def _traced(self, kept: KeptRows, rnn: nn.RNNCell, initial_D: Tensor) -> Tensor:
        """The state with a gradient to the RNN that made it, where that is wanted."""
        if self.is_released:
            return self._state(kept, initial_D)
        again_bD = self._update(rnn, kept.partner_bD, kept.elapsed_b1, kept.before_bD)
        return torch.where(kept.is_known_b1, again_bD, self._normalized(initial_D))

    def _elapsed(self, kept: KeptRows, time_b: Tensor) -> Tensor:
        if self.is_released:
            return torch.zeros_like(kept.state_bD[:, :1])
        return kept.elapsed_until(time_b)

    def _update(
        self, rnn: nn.RNNCell, partner_bD: Tensor, elapsed_b1: Tensor, before_bD: Tensor
    ) -> Tensor:
        return self._normalized(rnn(torch.cat([partner_bD, elapsed_b1], dim=1), before_bD))

    def _row(
        self,
        state_bD: Tensor,
        before_bD: Tensor,
        partner_bD: Tensor,
        elapsed_b1: Tensor,
        time_b: Tensor,
    ) -> Tensor:
        row = [torch.ones_like(elapsed_b1), state_bD]
        if not self.is_released:
            row += [before_bD, partner_bD, elapsed_b1, split_time(time_b).to(state_bD)]
        return torch.cat(row, dim=1).detach()
