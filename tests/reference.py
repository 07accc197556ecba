"""The slow truth: FELRec as two dictionaries and a loop over single events, in float64.

It shares the model's weights with the code under test and nothing else: no batches, no padding, no
index, no cache shards.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from felrec_dist.model.encoder import EncoderBlock
from felrec_dist.model.felrec import FELRec


@dataclass(frozen=True)
class Event:
    """One interaction, in event order."""

    user: int
    item: int


@dataclass
class ReferenceCache:
    """What a cache is: id -> representation."""

    users: dict[int, Tensor] = field(default_factory=dict)
    items: dict[int, Tensor] = field(default_factory=dict)


def encode(model: FELRec, rows: Sequence[Tensor], type_D: Tensor, history_length: int) -> Tensor:
    """Encodes one history, most recent first, slot by slot and head by head."""
    encoder = model.encoder
    width = len(type_D)
    slots = [row.clone() for row in rows]
    if len(slots) < history_length:
        slots.append(torch.zeros(width, dtype=type_D.dtype))
    x = []
    for position, slot in enumerate(slots):
        vector = math.sqrt(width) * (slot + type_D)
        for dim in range(width):
            angle = position / 10_000 ** (2 * (dim // 2) / width)
            vector[dim] += math.sin(angle) if dim % 2 == 0 else math.cos(angle)
        x.append(encoder.input_norm(vector))
    for block in encoder.blocks:
        assert isinstance(block, EncoderBlock)
        attention = block.attention
        head_width = width // attention.num_heads
        queries = [attention.query(slot) for slot in x]
        keys = [attention.key(slot) for slot in x]
        values = [attention.value(slot) for slot in x]
        attended = []
        for query in queries:
            heads = []
            for head in range(attention.num_heads):
                dims = slice(head * head_width, (head + 1) * head_width)
                scores = torch.stack([query[dims] @ key[dims] for key in keys])
                weights = torch.softmax(scores / math.sqrt(head_width), dim=0)
                weighted = [w * value[dims] for w, value in zip(weights, values, strict=True)]
                heads.append(torch.stack(weighted).sum(dim=0))
            attended.append(attention.output(torch.cat(heads)))
        x = [block.attention_norm(a + b) for a, b in zip(x, attended, strict=True)]
        x = [
            block.feedforward_norm(
                slot + block.feedforward_out(torch.relu(block.feedforward_in(slot)))
            )
            for slot in x
        ]
    pooled = torch.stack(list(x)).mean(dim=0)
    representation: Tensor = encoder.output(pooled)
    return representation


class ReferenceFELRec:
    """Histories and cache of a stream of events, in dictionaries."""

    def __init__(self, model: FELRec, history_length: int, events: Sequence[Event]) -> None:
        self.model = model
        self.history_length = history_length
        self.events = events
        self.cache = ReferenceCache()
        self.items_of: dict[int, list[int]] = defaultdict(list)
        self.users_of: dict[int, list[int]] = defaultdict(list)

    def skip(self, start: int, stop: int) -> None:
        """Events that are not trained on still count as history."""
        for event in self.events[start:stop]:
            self._remember(event)

    def represent_batch(self, start: int, stop: int) -> tuple[list[Tensor], list[Tensor]]:
        """Encodes each event of a batch from the cache as it was before the batch."""
        users, items = [], []
        width = len(self.model.user_type_embedding)
        zero = torch.zeros(width, dtype=self.model.user_type_embedding.dtype)
        for event in self.events[start:stop]:
            recent_items = self.items_of[event.user][::-1][: self.history_length]
            recent_users = self.users_of[event.item][::-1][: self.history_length]
            users.append(
                encode(
                    self.model,
                    [self.cache.items.get(item, zero) for item in recent_items],
                    self.model.item_type_embedding,
                    self.history_length,
                )
            )
            items.append(
                encode(
                    self.model,
                    [self.cache.users.get(user, zero) for user in recent_users],
                    self.model.user_type_embedding,
                    self.history_length,
                )
            )
            self._remember(event)
        return users, items

    def write_batch(
        self, start: int, stop: int, users: Sequence[Tensor], items: Sequence[Tensor]
    ) -> None:
        """One event after the other: the last one of an id stays."""
        for event, user, item in zip(self.events[start:stop], users, items, strict=True):
            self.cache.users[event.user] = user.detach().clone()
            self.cache.items[event.item] = item.detach().clone()

    def causal_counts(
        self, start: int, users: Sequence[Tensor], seen: Sequence[int]
    ) -> list[tuple[int, int, int]]:
        """Returns (above, tied, candidates) of each event among items seen before the batch."""
        unseen = encode(self.model, [], self.model.user_type_embedding, self.history_length)
        counts = []
        for event, user in zip(self.events[start : start + len(users)], users, strict=True):
            scores: Mapping[int, float] = {
                item: float(F.cosine_similarity(user, self.cache.items.get(item, unseen), dim=0))
                for item in {*seen, event.item}
            }
            target = (
                scores[event.item]
                if event.item in seen
                else float(F.cosine_similarity(user, unseen, dim=0))
            )
            others = [score for item, score in scores.items() if item != event.item]
            counts.append(
                (
                    sum(score > target + 1e-9 for score in others),
                    sum(abs(score - target) <= 1e-9 for score in others),
                    len(others) + 1,
                )
            )
        return counts

    def _remember(self, event: Event) -> None:
        self.items_of[event.user].append(event.item)
        self.users_of[event.item].append(event.user)


def contrast(
    queries: Sequence[Tensor], positives: Sequence[Tensor], queue: Tensor, t: float
) -> Tensor:
    """Mean over single events of -log softmax at the positive."""
    losses = []
    for query, positive in zip(queries, positives, strict=True):
        logits = torch.cat([(query @ positive.detach())[None], queue @ query]) / t
        losses.append(torch.logsumexp(logits, dim=0) - logits[0])
    return torch.stack(losses).mean()
