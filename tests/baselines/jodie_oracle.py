"""JODIE* as two dictionaries of states and a loop over single events: the slow truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from felrec_dist.baselines.jodie import JODIE
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.stream import EventStream
from felrec_dist.training.config import TrainingConfig


class Kept:
    """A state, when it was made, and what of."""

    def __init__(
        self, state_D: Tensor, before_D: Tensor, partner_D: Tensor, elapsed: float, time: int
    ) -> None:
        self.state_D = state_D.detach()
        self.before_D = before_D.detach()
        self.partner_D = partner_D.detach()
        self.elapsed = elapsed
        self.time = time


class SlowJODIE:
    """Trains and scores one batch after the other, with one dense optimizer."""

    def __init__(
        self,
        dataset: PreparedDataset,
        model: JODIE,
        static_users: Tensor,
        static_items: Tensor,
        config: TrainingConfig,
    ) -> None:
        self.dataset = dataset
        self.model = model
        self.static = {
            "user": static_users.clone().requires_grad_(),
            "item": static_items.clone().requires_grad_(),
        }
        # The decay is the dense part's alone.
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(model.parameters()), "weight_decay": config.weight_decay},
                {"params": list(self.static.values()), "weight_decay": 0.0},
            ],
            lr=config.schedule.base_lr,
        )
        self.kept: dict[str, dict[int, Kept]] = {"user": {}, "item": {}}

    def unit(self, x_D: Tensor) -> Tensor:
        return x_D if self.model.is_released else x_D / x_D.norm()

    def state(self, side: str, index: int) -> Tensor:
        if index in self.kept[side]:
            return self.kept[side][index].state_D
        initial = {"user": self.model.initial_user_D, "item": self.model.initial_item_D}
        return self.unit(initial[side])

    def made(self, side: str, partner_D: Tensor, elapsed: float, before_D: Tensor) -> Tensor:
        rnn = {"user": self.model.user_rnn, "item": self.model.item_rnn}[side]
        x = torch.cat([partner_D, torch.tensor([elapsed])])
        return self.unit(
            torch.tanh(rnn.weight_ih @ x + rnn.bias_ih + rnn.weight_hh @ before_D + rnn.bias_hh)
        )

    def made_again(self, side: str, index: int) -> Tensor:
        kept = self.kept[side].get(index)
        if kept is None or self.model.is_released:
            return self.state(side, index)
        return self.made(side, kept.partner_D, kept.elapsed, kept.before_D)

    def elapsed(self, side: str, index: int, time: int) -> float:
        if self.model.is_released or index not in self.kept[side]:
            return 0.0
        return math.log1p((time - self.kept[side][index].time) / 3.6e9)

    def static_vector(self, side: str, index: int) -> Tensor:
        rows = self.static[side]
        return rows[index] if 0 <= index < len(rows) else torch.zeros(rows.shape[1])

    def run(
        self, span: Span, batch_size: int, *, scores: bool
    ) -> tuple[list[list[float]], list[tuple[float, float]]]:
        """Returns the losses of each batch and, if asked, each rank (lowest, highest)."""
        losses, ranks = [], []
        items = self.dataset.items
        index_of = {key: index for index, key in enumerate(items.ids.tolist())}
        [neighbours] = self.dataset.neighbours("user")
        num_seen = int((items.first_positions < span.start).sum())
        for batch, _ in EventStream(self.dataset, span, batch_size).batches():
            terms, written = [], []
            candidates = self.candidates(num_seen) if scores else []
            for user, item, time, offset, length in zip(
                batch.user_index.tolist(),
                batch.item_index.tolist(),
                batch.timestamp.tolist(),
                batch.user_offset.tolist(),
                batch.user_length.tolist(),
                strict=True,
            ):
                previous = index_of[int(neighbours[offset - 1])] if length else -1
                user_D, item_D = self.state("user", user), self.state("item", item)
                user_elapsed = self.elapsed("user", user, time)
                item_elapsed = self.elapsed("item", item, time)
                drift = self.model.projection.weight[:, 0] * user_elapsed
                projected_D = self.made_again("user", user) * (
                    1 + drift + self.model.projection.bias
                )
                seen = torch.cat(
                    [
                        projected_D,
                        self.made_again("item", previous),
                        self.static_vector("item", previous),
                        self.static_vector("user", user),
                    ]
                )
                prediction = self.model.prediction.weight @ seen + self.model.prediction.bias
                prediction = prediction / prediction.norm()
                target = torch.cat([item_D, self.static_vector("item", item)]).detach()
                new_user_D = self.made("user", item_D, user_elapsed, user_D)
                new_item_D = self.made("item", user_D, item_elapsed, item_D)
                terms.append(
                    torch.stack(
                        [
                            F.mse_loss(prediction, target / target.norm()),
                            F.mse_loss(new_user_D, user_D),
                            F.mse_loss(new_item_D, item_D),
                        ]
                    )
                )
                written.append(
                    (
                        user,
                        Kept(new_user_D, user_D, item_D, user_elapsed, time),
                        item,
                        Kept(new_item_D, item_D, user_D, item_elapsed, time),
                    )
                )
                if scores:
                    ranks.append(self.rank(prediction, item, candidates))
            means = torch.stack(terms).mean(dim=0)
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    # Zero, not none: Adam's momentum goes on.
                    parameter.grad = torch.zeros_like(parameter)
            means.sum().backward()
            self.optimizer.step()
            for user, user_kept, item, item_kept in written:
                self.kept["user"][user], self.kept["item"][item] = user_kept, item_kept
            num_seen = max(num_seen, int(batch.item_index.max()) + 1)
            losses.append(means.tolist())
        return losses, ranks

    def candidate(self, item: int) -> Tensor:
        """[dynamic | static], of unit length; one without a state as the variant wants it."""
        dynamic_D = self.state("item", item)
        if item not in self.kept["item"] and self.model.is_released:
            dynamic_D = torch.zeros_like(dynamic_D)
        vector = torch.cat([dynamic_D, self.static_vector("item", item)]).detach()
        return vector / max(float(vector.norm()), 1e-12)

    def candidates(self, num_seen: int) -> list[Tensor]:
        return [self.candidate(item) for item in range(num_seen)]

    def rank(
        self, prediction: Tensor, target: int, candidates: Sequence[Tensor]
    ) -> tuple[float, float]:
        """The lowest and the highest that it may be, from 0 to 1: a tie counts half, and what is
        as close to one as float32 rounds counts as anything.
        """
        prediction = prediction.detach()
        own = float(prediction @ self.candidate(target))
        lowest = highest = 0.0
        for item, vector in enumerate(candidates):
            if item != target:
                difference = float(prediction @ vector) - own
                if abs(difference) < 3e-7:
                    lowest, highest = lowest + 0.5, highest + 0.5
                else:
                    lowest += float(difference > 1e-5)
                    highest += float(difference > -1e-5)
        others = len(candidates) - (target < len(candidates))
        return lowest / max(1, others), highest / max(1, others)
