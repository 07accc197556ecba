"""One training step, the whole of it (spec, "Step")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from felrec_dist.model.dropout import dropout_keys
from felrec_dist.model.felrec import EncoderInputs, FELRec, ModelOutput
from felrec_dist.training.clock import PhaseClock
from felrec_dist.training.exchange import Exchange
from felrec_dist.training.loader import LoadedBatch
from felrec_dist.training.representations import Representations


class TrainingStep:
    """Takes a global batch on every rank; leaves model, cache and queue equal on all of them."""

    def __init__(
        self,
        *,
        model: FELRec,
        forward: Callable[[EncoderInputs], ModelOutput],
        optimizer: torch.optim.Optimizer,
        grad_clip_value: float | None,
        seed: int,
        representations: Representations,
        exchange: Exchange,
        clock: PhaseClock,
    ) -> None:
        """``forward`` is the model, or the DDP wrapper around it that averages the gradients."""
        self.model = model
        self.forward = forward
        self.optimizer = optimizer
        self.grad_clip_value = grad_clip_value
        self.seed = seed
        self.representations = representations
        self.exchange = exchange
        self.clock = clock
        self.world = exchange.world

    def __call__(self, loaded: LoadedBatch, epoch: int, learning_rate: float) -> ModelOutput:
        """Trains on the batch and returns this rank's part of the output.

        The loader has read its events, cut their histories and fetched their rows. The losses are
        means over this rank's slice.
        """
        batch, mine = loaded.batch, loaded.mine
        with self.clock("rows"):
            inputs = self.representations.take(loaded.rows)
        with self.clock("encode"):
            keys_2B = dropout_keys(self.seed, epoch, mine.position).to(self.world.device)
            output = self.forward(replace(inputs, dropout_keys_2B=keys_2B))
        with self.clock("exchange"):
            gathered = self.exchange.begin_gather(output.exchanged(), len(batch))
        with self.clock("backward"):
            self.optimizer.zero_grad()
            output.loss.backward()
            if self.grad_clip_value is not None:
                nn.utils.clip_grad_value_(self.model.parameters(), self.grad_clip_value)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        with self.clock("exchange"):
            user_BD, item_BD, *projections = gathered()
        with self.clock("write_back"):
            self.representations.write_back(loaded.step, batch, user_BD, item_BD)
            self.model.push_queues(*projections)
        return output
