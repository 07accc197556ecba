"""The fast code agrees with dictionaries and a loop over single events, on random streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cache_server import CacheClient, InProcessTransport
from felrec_dist.config import ExperimentConfig, parse_config
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource
from felrec_dist.data.stream import EventStream
from felrec_dist.model.felrec import FELRecP, FELRecQ
from felrec_dist.training.metrics import RunLog
from felrec_dist.training.trainer import Trainer
from felrec_dist.training.world import World
from tests import tiny
from tests.reference import Event, ReferenceFELRec, contrast

N, BATCH, K = 4, 8, 11  # K is no multiple of the batch


def random_stream(
    path: Path, seed: int, num_events: int = 124
) -> tuple[PreparedDataset, list[Event]]:
    """Few ids, few distinct times: repeats in a batch, ties, histories of 0 to beyond N events."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(-(2**62), 2**62, size=40)
    columns = {
        "user": ids[generator.zipf(1.6, num_events) % 20],
        "item": ids[20 + generator.zipf(1.4, num_events) % 20],
        "time": generator.integers(0, num_events // 3, num_events) + 1_700_000_000,
    }
    pq.write_table(pa.table(columns), path / "raw.parquet")
    source = RawSource.parquet(
        path / "raw.parquet", user="user", item="item", timestamp="time", timestamp_unit="s"
    )
    dataset = prepare(source, str(path / "data"), name="random")
    order = sorted(range(num_events), key=lambda row: (columns["time"][row], row))
    events = [Event(int(columns["user"][row]), int(columns["item"][row])) for row in order]
    return dataset, events


def experiment(
    path: Path, dataset: PreparedDataset, variant: str, candidates: str
) -> ExperimentConfig:
    return parse_config(
        {
            "data": {"url": dataset.url, "batch_size": BATCH},
            "run": {"url": str(path / "run"), "device": "cpu"},
            "model": {
                "variant": variant,
                "encoder": {
                    "history_length": N,
                    "width": 8,
                    "feedforward_width": 12,
                    "num_layers": 2,
                    "num_heads": 2,
                    "dropout": 0.0,
                },
                "queue_size": K,
            },
            "cache": {"storage": "float64", "num_shards": 2, "block_rows": 16},
            "training": {
                "schedule": {"epochs": 2, "warmup_epochs": 1, "base_lr": 0.05},
                "dtype": "float64",
            },
            "evaluation": {"candidates": candidates},
        },
        where="test",
    )


def build(config: ExperimentConfig, dataset: PreparedDataset) -> Trainer:
    tables = config.cache_tables()
    transport = InProcessTransport(
        tables,
        num_shards=config.cache.num_shards,
        block_rows=config.cache.block_rows,
        can_wait=True,
    )
    return Trainer(config, dataset, CacheClient(transport, timeout_s=5.0), World.current())


@pytest.mark.parametrize(
    ("variant", "seed", "candidates"),
    [
        ("felrec-q", 0, "growing"),
        ("felrec-q", 1, "growing"),
        ("felrec-p", 0, "growing"),
        ("felrec-p", 1, "growing"),
        ("felrec-q", 2, "training"),
    ],
)
def test_training_and_causal_ranks(
    tmp_path: Path, variant: str, seed: int, candidates: str
) -> None:
    dataset, events = random_stream(tmp_path, seed)
    config = experiment(tmp_path, dataset, variant, candidates)
    trainer = build(config, dataset)
    slow = tiny.felrec_of(build(config, dataset))  # the same seed: the same initial weights
    slow.model.train()
    truth = ReferenceFELRec(slow.model, N, events)
    truth.skip(0, tiny.felrec_of(trainer).train_span.start)
    assert tiny.felrec_of(trainer).train_span.start > 0, (
        "the stream must drop events, to see that they count"
    )

    losses = []
    queues = None
    if isinstance(slow.model, FELRecQ):
        queues = [
            slow.model.user_queue.entries_KD.clone(),
            slow.model.item_queue.entries_KD.clone(),
        ]
    for step in range(trainer.steps_per_epoch):
        start = tiny.felrec_of(trainer).train_span.start + step * BATCH
        users, items = truth.represent_batch(start, start + BATCH)
        loss, projections = slow_loss(slow.model, users, items, queues, config.felrec.temperature)
        losses.append(float(loss.detach()))
        slow.optimizer.zero_grad()
        loss.backward()
        rate = slow_rate(step, trainer.steps_per_epoch, config)
        for parameter in slow.model.parameters():
            assert parameter.grad is not None
            parameter.grad.clamp_(-1.0, 1.0)
        for group in slow.optimizer.param_groups:
            group["lr"] = rate
        slow.optimizer.step()
        truth.write_batch(start, start + BATCH, users, items)
        if queues is not None:
            queues = [
                torch.cat([queue, new])[-K:] for queue, new in zip(queues, projections, strict=True)
            ]

    fast = trainer.train_epoch(0, RunLog(config.run.url, is_writer=False))
    np.testing.assert_allclose(fast.total, losses, rtol=1e-9)
    for side, table in (("user", truth.cache.users), ("item", truth.cache.items)):
        ids = np.array(sorted(table), dtype=np.int64)
        rows = trainer.client.fetch(trainer.steps_per_epoch, {side: ids})[side].rows
        expected = torch.stack([table[int(key)] for key in ids]).numpy()
        np.testing.assert_allclose(rows, expected, rtol=1e-8, atol=1e-10)

    span = dataset.split.validation
    result, _ = trainer.evaluate(span, trainer.steps_per_epoch, "validation")
    slow.model.eval()
    expected_counts: list[tuple[int, int, int]] = []
    with torch.no_grad():
        for batch, _ in EventStream(dataset, span, BATCH).batches():
            start, stop = batch.position[0], batch.position[-1] + 1
            last = start if candidates == "growing" else dataset.split.train.stop
            seen = list({event.item for event in events[:last]})
            users, items = truth.represent_batch(start, stop)
            expected_counts += truth.causal_counts(start, users, seen)
            truth.write_batch(start, stop, users, items)
    counts = result.counts
    found = list(
        zip(
            counts.above.tolist(), counts.tied.tolist(), counts.num_candidates.tolist(), strict=True
        )
    )
    in_training = {event.item for event in events[: dataset.split.train.stop]}
    targets = [event.item for event in events[span.start : span.stop]]
    is_served = [candidates == "growing" or target in in_training for target in targets]
    assert result.is_served.tolist() == is_served
    assert all(is_served) == (candidates == "growing"), "some targets must be new"
    for event, counted in enumerate(found):
        if is_served[event]:
            assert counted == expected_counts[event]


def slow_loss(
    model: FELRecQ | FELRecP,
    users: list[Tensor],
    items: list[Tensor],
    queues: list[Tensor] | None,
    temperature: float,
) -> tuple[Tensor, list[Tensor]]:
    """The loss written out; heads see the whole batch because of their BatchNorm."""
    user_BD, item_BD = torch.stack(users), torch.stack(items)
    p_user, p_item = model.user_projection(user_BD), model.item_projection(item_BD)
    if isinstance(model, FELRecQ):
        assert queues is not None
        p_user, p_item = F.normalize(p_user, dim=1), F.normalize(p_item, dim=1)
        loss = contrast(list(p_user), list(p_item), queues[1], temperature) + contrast(
            list(p_item), list(p_user), queues[0], temperature
        )
        return loss, [p_user.detach(), p_item.detach()]
    z_user, z_item = model.user_prediction(p_user), model.item_prediction(p_item)
    terms = [
        (2 - 2 * F.cosine_similarity(z, p.detach(), dim=0))
        for z, p in [*zip(z_user, p_item, strict=True), *zip(z_item, p_user, strict=True)]
    ]
    return torch.stack(terms).sum() / len(users), []


def slow_rate(step: int, steps_per_epoch: int, config: ExperimentConfig) -> float:
    """Linear warm-up over the first of two epochs."""
    schedule = config.training.schedule
    return schedule.eta_min + (schedule.base_lr - schedule.eta_min) * step / steps_per_epoch
