"""One side of a comparison of training steps: a model, its representations, and a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.plain_tensor import PlainTensor
from benchmarks.straightforward import StraightforwardEncoder
from benchmarks.workloads import Int64s, Workload
from cache_server import CacheClient, InProcessTransport
from felrec_dist.data.dataset import Span
from felrec_dist.data.histories import HistoryReader
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.model.felrec import ModelConfig, build_model
from felrec_dist.training.clock import LOADER_PHASES, PhaseClock
from felrec_dist.training.config import TrainingConfig
from felrec_dist.training.exchange import Exchange
from felrec_dist.training.host_memory import keep_freed_memory
from felrec_dist.training.loader import BatchLoader
from felrec_dist.training.representations import (
    ITEM,
    USER,
    CacheConfig,
    Representations,
)
from felrec_dist.training.step import TrainingStep
from felrec_dist.training.world import World

LEARNING_RATE = 0.01
# The seeded rows were written by a step of their own.
FIRST_STEP = 1


@dataclass
class TrainingSide:
    """Steps through consecutive batches.

    Attributes:
        step, clock: of the model.
        batches: of the loader.
        losses: of all steps so far.
    """

    step: TrainingStep
    clock: PhaseClock
    batches: Iterator[object]
    losses: list[float] = field(default_factory=list)

    def run(self, num_steps: int) -> None:
        """Takes the next steps."""
        outputs = []
        for _ in range(num_steps):
            with self.clock("wait"):
                loaded = next(self.batches)
            outputs.append(self.step(loaded, 0, LEARNING_RATE))  # type: ignore[arg-type]
        # On a GPU this waits until the steps are over.
        self.losses += [float(output.loss.detach()) for output in outputs]


@contextmanager
def training_side(
    work: Workload,
    span: Span,
    batch_size: int,
    representations: Representations | PlainTensor,
    world: World,
    *,
    is_straightforward: bool = False,
    uses_bfloat16: bool = False,
    keeps_memory: bool = True,
) -> Iterator[TrainingSide]:
    """Yields FELRec-Q of the paper's sizes on the batches of a span.

    Args:
        work, span, batch_size: the events.
        representations: seeded, or those of an earlier part of the run.
        world: of this rank.
        is_straightforward: whether the encoder is the reference's.
        uses_bfloat16: of the model.
        keeps_memory: whether freed memory serves the next tensors, as in training; a process that
            did so once does so ever after.
    """
    if keeps_memory and world.device.type == "cpu":
        keep_freed_memory()  # as in training
    config = ModelConfig()
    torch.manual_seed(0)
    model = build_model(config)
    if is_straightforward:
        encoder = StraightforwardEncoder(config.encoder)
        encoder.load_state_dict(model.encoder.state_dict())
        model.encoder = encoder  # type: ignore[assignment]  # it stands in
    model.to(world.device).train()
    model.uses_bfloat16 = uses_bfloat16
    forward: Callable[..., object] = model
    if world.world_size > 1:
        forward = DistributedDataParallel(model, broadcast_buffers=False)
    clock = PhaseClock()
    step = TrainingStep(
        model=model,
        forward=forward,  # type: ignore[arg-type]  # DDP has no types
        optimizer=TrainingConfig().build_optimizer(model.parameters()),
        grad_clip_value=TrainingConfig().grad_clip_value,
        seed=0,
        representations=representations,  # type: ignore[arg-type]  # a PlainTensor stands in
        exchange=Exchange(world),
        clock=clock,
    )
    loader = BatchLoader(
        HistoryReader(work.dataset, config.encoder.history_length),
        representations,  # type: ignore[arg-type]
        world,
        PhaseClock(LOADER_PHASES),
    )
    stream = EventStream(work.dataset, span, batch_size)
    with loader.batches(stream, FIRST_STEP) as batches:
        yield TrainingSide(step, clock, batches)


@dataclass(frozen=True)
class SeededRows:
    """Representations of the ids that the histories of a span name, as if written before it.

    Attributes:
        users, items: (M,) ids, distinct.
        rows: (M, D) float32, by side.
    """

    users: Int64s
    items: Int64s
    rows: dict[str, torch.Tensor]

    @classmethod
    def of(cls, work: Workload, span: Span, width: int, history_length: int) -> SeededRows:
        stream = EventStream(work.dataset, span, len(span))
        batch, _ = next(stream.batches())
        of_users, of_items = HistoryReader(work.dataset, history_length).read(batch)
        slots_N = np.arange(history_length)
        items = np.unique(of_users.ids_BN[slots_N < of_users.lengths_B[:, None]])
        users = np.unique(of_items.ids_BN[slots_N < of_items.lengths_B[:, None]])
        generator = torch.Generator().manual_seed(0)
        rows = {
            side: torch.randn(len(ids), width, generator=generator)
            for side, ids in ((USER, users), (ITEM, items))
        }
        return cls(users, items, rows)

    def fill(self, representations: Representations | PlainTensor) -> None:
        """Writes them, as step 0."""
        if isinstance(representations, PlainTensor):
            representations.write(USER, self.users, self.rows[USER])
            representations.write(ITEM, self.items, self.rows[ITEM])
            return
        num_events = max(len(self.users), len(self.items))
        # One write for both sides: the shorter one repeats its last id.
        chosen = {
            side: np.minimum(np.arange(num_events), len(ids) - 1)
            for side, ids in ((USER, self.users), (ITEM, self.items))
        }
        zeros = np.zeros(num_events, np.int64)
        batch = EventBatch(
            position=zeros,
            event_id=zeros,
            user=self.users[chosen[USER]],
            item=self.items[chosen[ITEM]],
            timestamp=zeros,
            user_offset=zeros,
            user_length=zeros,
            item_offset=zeros,
            item_length=zeros,
            user_index=zeros,
            item_index=zeros,
        )
        rows = {side: self.rows[side][torch.from_numpy(chosen[side])] for side in self.rows}
        device = representations.device
        representations.write_back(0, batch, rows[USER].to(device), rows[ITEM].to(device))
        representations.flush()


def in_process_client(num_shards: int, width: int) -> CacheClient:
    """An empty cache in this process."""
    tables = CacheConfig().tables(width)
    return CacheClient(InProcessTransport(tables, num_shards=num_shards, can_wait=True))


def cached_representations(
    client: CacheClient, world: World, *, hot_rows: int | None = None
) -> Representations:
    """The representations of a cache, as a run has them."""
    return Representations(
        client,
        storage=torch.float32,
        dtype=torch.float32,
        device=world.device,
        empty_slot="zero",
        absent_row="zero",
        written_shards=tuple(range(world.rank, client.num_shards, world.world_size)),
        hot_rows=CacheConfig().hot_rows if hot_rows is None else hot_rows,
    )


def plain_tensor(work: Workload, width: int, world: World, *, is_padded: bool) -> PlainTensor:
    """A tensor with room for all ids of a data set."""
    dataset = work.dataset
    return PlainTensor(
        dataset.num_users, dataset.num_items, width, world.device, is_padded=is_padded
    )
