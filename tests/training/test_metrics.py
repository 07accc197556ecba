"""What TensorBoard reads back of a run: every figure, with its unit."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.evaluation.result import Metrics
from felrec_dist.training.clock import (
    LOADER_PHASES,
    STEP_PHASES,
    PhaseClock,
    TrainingCosts,
    TrainingTimes,
)
from felrec_dist.training.metrics import RunLog
from felrec_dist.training.trainer import CHECKPOINT_TAKEN, NoProgress
from tests import tiny

STEPS = 15
PARTITIONS = ("observed", "new_users", "new_items", "total")
STEP_TAGS = {
    "loss/total",
    "loss/user",
    "loss/item",
    "optimizer/learning_rate",
    "optimizer/gradient_norm",
    "speed/train(events per s)",
    "cache/read(rows per step)",
    "cache/hot_tier_hits(%)",
    "cache/fetched(rows per step)",
    "cache/fetch_messages(per step)",
    "cache/fetched(bytes per step)",
    "cache/fetch_wait(ms per step)",
    "cache/written(rows per step)",
    "cache/written(bytes per step)",
    "cache/write_wait(ms per step)",
    "exchange/gathered(bytes per step)",
    *(
        f"time_share/{phase}(%)"
        for phase in ("wait", "rows", "encode", "backward", "exchange", "write_back")
    ),
    *(f"loader/{phase}(ms per step)" for phase in ("data", "histories", "fetch")),
}
CHANCE_TAGS = {"loss/user_below_chance(nats)", "loss/item_below_chance(nats)"}
EPOCH_TAGS = {"checkpoint/save(s)"}
CACHE_TAGS = EPOCH_TAGS | {
    f"cache/{table}/{name}/shard_{shard}"
    for table in ("user", "item")
    for name in ("size(rows)", "size(bytes)", "spilled(bytes)")
    for shard in range(2)
}


def read(folder: Path) -> dict[str, dict[int, float]]:
    """Value by step, by tag."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)}
        for tag in accumulator.Tags()["scalars"]
    }


def evaluation_tags(part: str, partitions: tuple[str, ...] = PARTITIONS) -> set[str]:
    kinds = ("rank(0..1)", "HR@10(%)", "MRR", "NDCG@10", "full_HR@10(%)")
    return {f"{part}/{kind}/{partition}" for kind in kinds for partition in partitions}


class Told(NoProgress):
    """Remembers what whoever watches was told the names of."""

    def __init__(self) -> None:
        self.tags: set[str] = set()

    def measure(self, scalars: Mapping[str, float]) -> None:
        self.tags |= scalars.keys()


@pytest.mark.parametrize("variant", ["felrec-q", "felrec-p"])
def test_a_run_logs_every_figure(dataset: PreparedDataset, tmp_path: Path, variant: str) -> None:
    base = tiny.experiment(dataset.url, "run").model_dump()["model"]
    changes = {"model": {**base, "variant": variant}}
    config = tiny.experiment(dataset.url, str(tmp_path / "run"), changes)
    told = Told()
    trainer = tiny.build_trainer(config, dataset, told)
    result = trainer.fit()
    scalars = read(tmp_path / "run" / "tensorboard")

    present = tuple(name for name, m in result.test.metrics().items() if m.num_events)
    in_validation = tuple(name for name, m in result.validation[0].items() if m.num_events)
    expected = STEP_TAGS | CACHE_TAGS
    expected |= evaluation_tags("validation", in_validation) | evaluation_tags("test", present)
    if variant == "felrec-q":
        expected |= CHANCE_TAGS
    by_occurrence = {tag for tag in scalars if "_by_occurrence/" in tag}
    assert scalars.keys() - by_occurrence == expected
    groups = result.test.occurrence()
    assert {tag for tag in by_occurrence if tag.startswith("test")} == {
        f"test_by_occurrence/{kind}/{side} {name}"
        for side, metrics in groups.items()
        for name, m in zip(("1", "2", "3-5", "6-20", "21-100", "101-"), metrics, strict=True)
        for kind in ("rank(0..1)", "HR@10(%)")
        if m.num_served
    }
    found = scalars["test_by_occurrence/rank(0..1)/user 3-5"]
    assert found == pytest.approx({45: groups["user"][2].normalized_rank}, rel=1e-5)
    assert list(scalars["validation_by_occurrence/HR@10(%)/item 1"]) == [15, 30, 45]
    assert told.tags == scalars.keys() | {CHECKPOINT_TAKEN}

    for tag in STEP_TAGS:
        assert list(scalars[tag]) == [5, 10, 15, 20, 25, 30, 35, 40, 45]
    for tag in CACHE_TAGS | evaluation_tags("validation", in_validation):
        assert list(scalars[tag]) == [15, 30, 45]
    assert list(scalars["test/rank(0..1)/total"]) == [45]

    for step, total in scalars["loss/total"].items():
        user, item = scalars["loss/user"][step], scalars["loss/item"][step]
        assert total == pytest.approx(user + item, rel=1e-5)
        if variant == "felrec-q":
            below = scalars["loss/user_below_chance(nats)"][step]
            assert below == pytest.approx(math.log(41) - user, abs=1e-4)
        shares = [values[step] for tag, values in scalars.items() if tag.startswith("time_share")]
        assert sum(shares) == pytest.approx(100.0, abs=0.01)
        assert 0 < scalars["cache/hot_tier_hits(%)"][step] <= 100
        for phase in LOADER_PHASES:
            assert scalars[f"loader/{phase}(ms per step)"][step] > 0
        assert scalars["optimizer/gradient_norm"][step] > 0
        assert scalars["speed/train(events per s)"][step] > 0
        # An id is sent as 8 bytes; whether it was found and its row come back.
        rows = scalars["cache/fetched(rows per step)"][step]
        fetched_bytes = scalars["cache/fetched(bytes per step)"][step]
        assert fetched_bytes == pytest.approx(rows * (8 + 1 + 4 * 8), rel=1e-5)
        rows = scalars["cache/written(rows per step)"][step]
        written_bytes = scalars["cache/written(bytes per step)"][step]
        assert written_bytes == pytest.approx(rows * (16 + 4 * 8), rel=1e-5)
        assert rows > 0
        # One to each of two shards at most; the loader is up to two steps ahead.
        assert 0 < scalars["cache/fetch_messages(per step)"][step] <= 2 * 7 / 5
        assert scalars["exchange/gathered(bytes per step)"][step] == 0
    # The last epoch's five steps are the last entry: their mean loss, and the rate of the last.
    assert scalars["optimizer/learning_rate"][45] == pytest.approx(1e-7, rel=1e-3)
    mean_loss = sum(scalars["loss/total"][step] for step in (35, 40, 45)) / 3
    if result.best.epoch == 2:
        assert mean_loss == pytest.approx(result.training_loss, rel=1e-5)

    rows = sum(scalars[f"cache/user/size(rows)/shard_{shard}"][15] for shard in range(2))
    batches = range(
        tiny.felrec_of(trainer).train_span.start, tiny.felrec_of(trainer).train_span.stop
    )
    assert 0 < rows <= len(batches)
    assert scalars["cache/user/size(bytes)/shard_0"][15] >= 4 * 8 * rows / 4
    metrics = result.test.metrics()["total"]
    found_rank = scalars["test/rank(0..1)/total"][45]
    assert found_rank == pytest.approx(metrics.normalized_rank, rel=1e-5)
    assert scalars["test/HR@10(%)/total"][45] == pytest.approx(100 * metrics.hit_rate, rel=1e-5)
    assert scalars["test/MRR/total"][45] == pytest.approx(metrics.mrr, rel=1e-5)
    assert scalars["test/NDCG@10/total"][45] == pytest.approx(metrics.ndcg, rel=1e-5)
    full_hits = scalars["test/full_HR@10(%)/total"][45]
    assert full_hits == pytest.approx(100 * metrics.full_hit_rate, rel=1e-5)


def test_a_mean_over_some_events_says_so(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path), is_writer=True)
    metrics = {
        "observed": Metrics(4, 4, 0.25, 0.5, 0.1, 0.2, 0.3),
        "new_items": Metrics(2, 0, *[math.nan] * 5),
        "total": Metrics(6, 4, 0.25, 0.5, 0.1, 0.2, 0.3),
    }
    log.evaluation("validation", 7, metrics, k=10)
    log.close()
    tags = read(tmp_path / "tensorboard").keys()
    assert tags == evaluation_tags("validation", ("observed", "total_served"))


class StopLate(NoProgress):
    """Stops in the second epoch, after ten of its steps were logged."""

    def __init__(self) -> None:
        self.stage = ""
        self.num_advances = 0

    def begin(self, stage: str, num_events: int) -> None:
        self.stage = stage

    def advance(self, num_events: int, facts: Mapping[str, float]) -> None:
        self.num_advances += self.stage == "epoch 2/3, training"
        if self.num_advances == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_is_one_curve(dataset: PreparedDataset, tmp_path: Path) -> None:
    whole = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "whole")), dataset)
    whole.fit()
    config = tiny.experiment(dataset.url, str(tmp_path / "parts"))
    with pytest.raises(KeyboardInterrupt):
        tiny.build_trainer(config, dataset, StopLate()).fit()
    folder = tmp_path / "parts" / "tensorboard"
    assert list(read(folder)["loss/total"]) == [5, 10, 15, 20, 25]
    # TensorBoard reads its files by name, that is by the second they were begun in.
    time.sleep(1.1)
    tiny.build_trainer(config, dataset).fit(resume=True)
    expected = read(tmp_path / "whole" / "tensorboard")
    accumulated = read(folder)
    for tag in ("loss/user", "optimizer/gradient_norm", "validation/rank(0..1)/total"):
        assert accumulated[tag] == expected[tag]
    # Steps that were done twice stand there once.
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    steps = [event.step for event in accumulator.Scalars("loss/total")]
    assert steps == sorted(set(steps))


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path), is_writer=False)
    log.cache(1, [])
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_the_median_step_and_the_mean_epoch() -> None:
    times = TrainingTimes()
    assert times.costs() == TrainingCosts(None, None)
    times.add_steps(4, 2.0)
    times.add_steps(1, 3.0)
    assert times.costs() == TrainingCosts(0.5, None)
    times.add_steps(5, 5.0)
    assert times.costs().step_seconds == 1.0
    times.add_epoch(2.0)
    times.add_epoch(3.0)
    assert times.costs().epoch_seconds == 2.5


def test_the_clock_gives_each_phase_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr("felrec_dist.training.clock.time.perf_counter", lambda: next(times))
    clock = PhaseClock()
    with clock("rows"):
        pass
    with clock("encode"):
        pass
    with pytest.raises(KeyError, match="x"), clock("rows"):
        raise KeyError("x")
    assert clock.take() == {**dict.fromkeys(STEP_PHASES, 0.0), "rows": 5.0, "encode": 2.0}
    assert set(clock.take().values()) == {0.0}
