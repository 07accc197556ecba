"""Variants of the test against dictionaries and a loop over single events and single scores."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from felrec_dist.config import ExperimentConfig, parse_config
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.stream import EventStream
from felrec_dist.errors import CheckpointError, ConfigError
from felrec_dist.evaluation.candidate_set import CandidateSets
from felrec_dist.evaluation.evaluator import EvaluationConfig, Protocol
from felrec_dist.evaluation.free_baselines import most_popular
from felrec_dist.evaluation.result import PartResult
from felrec_dist.model.felrec import FELRecP, FELRecQ
from felrec_dist.training.checkpoint import read_checkpoint
from felrec_dist.training.trainer import NoProgress
from tests import tiny
from tests.data.oracle import Row, prepare_rows
from tests.reference import Event, ReferenceCache, ReferenceFELRec, encode

N, BATCH = 4, 8
DAY_US = 86_400_000_000
FRACTIONS: dict[str, Any] = {"validation_fraction": "0.15", "test_fraction": "0.2"}
Counts = list[tuple[int, int, int]]
LIST_LENGTH = 10
Array = npt.NDArray[np.float64]


def random_rows(seed: int, num_events: int = 123) -> list[Row]:
    """In time order, ties among them; items come and go, so that some are not seen for long.

    User and item of the first event, which the training leaves out, are never seen again.
    """
    generator = np.random.default_rng(seed)
    rows: list[Row] = [
        (
            int(generator.zipf(1.5) % 25) - 4,
            int((event // 15 * 2 + generator.zipf(1.5)) % 40) * 10**9,
            event // 2 * DAY_US // 3,
        )
        for event in range(num_events)
    ]
    return [(99, 99 * 10**9, 0), *rows[1:]]


def experiment(dataset: PreparedDataset, run: Path, **changes: Any) -> ExperimentConfig:
    """One epoch in float64, without dropout."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"url": dataset.url, "batch_size": BATCH},
        "run": {"url": str(run), "device": "cpu"},
        "model": {
            "encoder": {
                "history_length": N,
                "width": 8,
                "feedforward_width": 12,
                "num_layers": 1,
                "num_heads": 2,
                "dropout": 0.0,
            },
            "queue_size": 11,
        },
        "cache": {"storage": "float64", "num_shards": 2, "block_rows": 16},
        "training": {
            "schedule": {"epochs": 1, "warmup_epochs": 0, "base_lr": 0.05},
            "dtype": "float64",
        },
        "evaluation": {"num_negatives": 5},
    }
    for section, values in changes.items():
        tree[section] = {**tree[section], **values}
    return parse_config(tree, where="test")


@dataclass
class Trained:
    """A run of one epoch, its data in time order, and its weights in a model of their own."""

    rows: list[Row]
    dataset: PreparedDataset
    run: Path
    checkpoint: str
    model: FELRecQ | FELRecP

    @cached_property
    def batches(self) -> list[ScoredBatch]:
        return replayed(self)

    @property
    def train_start(self) -> int:
        return len(self.dataset.split.train) % BATCH


@pytest.fixture(scope="module", params=["felrec-q", "felrec-p"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    rows = random_rows(3)
    dataset = prepare_rows(rows, folder, **FRACTIONS)
    config = experiment(dataset, folder / "run", model={"variant": request.param})
    trainer = tiny.build_trainer(config, dataset)
    checkpoint = trainer.fit().checkpoint_url
    model = tiny.felrec_of(trainer).model.eval()
    assert isinstance(model, FELRecQ | FELRecP)
    known = Trained(rows, dataset, folder / "run", checkpoint, model)
    assert known.train_start > 0, "the stream must drop events, to see that they count"
    return known


def fast(known: Trained, protocol: Protocol = "causal", **evaluation: Any) -> PartResult:
    """The test of the checkpoint, as a command would make it."""
    variant = "felrec-q" if isinstance(known.model, FELRecQ) else "felrec-p"
    config = experiment(
        known.dataset,
        known.run,
        model={"variant": variant},
        evaluation={"num_negatives": 5, **evaluation},
    )
    trainer = tiny.build_trainer(config, known.dataset)
    return trainer.test(read_checkpoint(known.checkpoint), protocol)


def rows_of(result: PartResult) -> Counts:
    counts = result.counts
    columns = counts.above.tolist(), counts.tied.tolist(), counts.num_candidates.tolist()
    return list(zip(*columns, strict=True))


@dataclass(frozen=True)
class ScoredBatch:
    """A batch of the test as the slow truth has it, after a replay from an empty cache.

    Attributes:
        start, stop: positions.
        users: what the model makes of each event's user.
        before, after: the cache's rows when the batch began, and when it was written.
    """

    start: int
    stop: int
    users: list[Tensor]
    before: ReferenceCache
    after: ReferenceCache


def replayed(known: Trained) -> list[ScoredBatch]:
    """One event after the other."""
    events = [Event(int(str(user)), int(str(item))) for user, item, _ in known.rows]
    truth = ReferenceFELRec(known.model, N, events)
    truth.skip(0, known.train_start)
    batches = []
    split = known.dataset.split
    with torch.no_grad():
        for span in (Span(known.train_start, split.train.stop), split.validation, split.test):
            for start in range(span.start, span.stop, BATCH):
                stop = min(start + BATCH, span.stop)
                before = ReferenceCache(dict(truth.cache.users), dict(truth.cache.items))
                users, items = truth.represent_batch(start, stop)
                truth.write_batch(start, stop, users, items)
                after = ReferenceCache(dict(truth.cache.users), dict(truth.cache.items))
                batches.append(ScoredBatch(start, stop, users, before, after))
    return [batch for batch in batches if batch.start >= split.test.start]


def slow(
    known: Trained, protocol: Protocol = "causal", **evaluation: Any
) -> tuple[Counts, Counter[int]]:
    """Above, tied and candidates of each test event, from an empty cache; and how often each item
    is among the first ten.
    """
    settings = EvaluationConfig(**evaluation)
    vectors = Vectors(known.model, settings)
    with torch.no_grad():
        unseen = encode(known.model, [], known.model.user_type_embedding, N)
    counts = []
    listed: Counter[int] = Counter()
    place = {item: row for row, item in enumerate(known.dataset.items.ids.tolist())}
    for batch in known.batches:
        cache, until = (
            (batch.before, batch.start) if protocol == "causal" else (batch.after, batch.stop)
        )
        last_seen = {int(str(item)): time for _, item, time in known.rows[:until]}
        item_of = {item: vectors.of_item(row) for item, row in cache.items.items()}
        absent = (
            0.0 * vectors.of_item(unseen) if protocol == "released" else vectors.of_item(unseen)
        )
        sample = [vectors.of_user(cache.users[key]) for key in sampled_users(known, settings)]
        for position in range(batch.start, batch.stop):
            user_key, target, now = known.rows[position]
            row = batch.users[position - batch.start]
            if protocol == "released":
                row = cache.users[int(str(user_key))]
            peers = [vectors.of_user(row)]
            if settings.nearest_users is not None:
                near = sorted(sample, key=lambda other: -float(peers[0] @ other))
                peers = near[: settings.nearest_users]

            def score(vector: Array, peers: list[Array] = peers) -> float:
                return sum(float(peer @ vector) for peer in peers) / len(peers)

            window = settings.available_within
            scores = [
                score(item_of.get(item, absent))
                for item, time in last_seen.items()
                if item != target and (window is None or time >= now - window * DAY_US)
            ]
            own = score(
                item_of.get(int(str(target)), absent)
                if target in last_seen
                else vectors.of_item(unseen)
            )
            above = sum(s > own + 1e-9 for s in scores)
            tied = sum(abs(s - own) <= 1e-9 for s in scores)
            counts.append((above, tied, len(scores) + 1))
            choice = {
                item: -round(1e9 * score(item_of.get(item, absent)))
                for item, time in last_seen.items()
                if window is None or time >= now - window * DAY_US
            }
            listed.update(
                sorted(choice, key=lambda item: (choice[item], place[item]))[:LIST_LENGTH]
            )
    return counts, listed


@dataclass(frozen=True)
class Vectors:
    """What is compared, in the words of the loss: products are its cosines."""

    model: FELRecQ | FELRecP
    settings: EvaluationConfig

    def of_user(self, row: Tensor) -> Array:
        if not self.settings.use_heads:
            return unit(row)
        projection = self.model.user_projection(row[None])
        if isinstance(self.model, FELRecQ):
            return unit(projection[0])
        prediction = self.model.user_prediction(projection)
        return np.concatenate([unit(prediction[0]), unit(projection[0])]) / np.sqrt(2)

    def of_item(self, row: Tensor) -> Array:
        if not self.settings.use_heads:
            return unit(row)
        projection = self.model.item_projection(row[None])
        if isinstance(self.model, FELRecQ):
            return unit(projection[0])
        prediction = self.model.item_prediction(projection)
        return np.concatenate([unit(projection[0]), unit(prediction[0])]) / np.sqrt(2)


def unit(vector: Tensor) -> Array:
    array: Array = vector.detach().numpy()
    return array / np.linalg.norm(array)


def sampled_users(known: Trained, settings: EvaluationConfig) -> list[int]:
    """The documented draw: a seeded permutation of the users seen, of whom the cache knows some."""
    start = known.dataset.split.test.start
    seen = list(dict.fromkeys(int(str(user)) for user, *_ in known.rows[:start]))
    order = np.random.default_rng([settings.seed, start]).permutation(len(seen))
    cached = [seen[index] for index in order if seen[index] in known.batches[0].before.users]
    return cached[: settings.sampled_users]


CASES: list[dict[str, Any]] = [
    {},
    {"use_heads": True},
    {"nearest_users": 3},
    {"nearest_users": 2, "sampled_users": 5, "seed": 4},
    {"nearest_users": 50},
    {"available_within": 6.0},
    {"nearest_users": 2, "use_heads": True, "available_within": 4.5},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)) or "reset")
def test_against_single_events(trained: Trained, case: dict[str, Any]) -> None:
    """Both protocols."""
    protocols: tuple[Protocol, ...] = ("causal", "released")
    for protocol in protocols:
        found = fast(trained, protocol, cache="reset", **case)
        counts, listed = slow(trained, protocol, **case)
        assert rows_of(found) == counts
        assert found.exposure is not None
        of_item = zip(trained.dataset.items.ids.tolist(), found.exposure.counts_I, strict=True)
        assert {item: count for item, count in of_item if count} == listed
        assert found.exposure.num_lists == len(counts)


def test_each_variant_changes_the_ranks(trained: Trained) -> None:
    """What follows would otherwise pass if a setting did nothing."""
    plain = fast(trained).counts.ranks.tolist()
    assert fast(trained).counts.ranks.tolist() == plain
    variants = [{"cache": "reset"}, CASES[1], CASES[4], CASES[5]]
    ranks = [plain, *(fast(trained, **case).counts.ranks.tolist() for case in variants)]
    assert len({tuple(of_one) for of_one in ranks}) == len(ranks)


def test_names_tell_the_variant() -> None:
    names: dict[str, dict[str, Any]] = {
        "": {},
        "reset": {"cache": "reset"},
        "zero-heads-nn": {"cache": "zero", "use_heads": True, "nearest_users": 10},
        "nn3-within-7.5d": {"nearest_users": 3, "available_within": 7.5},
    }
    for name, settings in names.items():
        config = EvaluationConfig.model_validate(settings)
        assert config.variant == name
        assert {**config.variant_settings(), **settings} == config.variant_settings()


class Stages(NoProgress):
    """Events by stage."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}

    def begin(self, stage: str, num_events: int) -> None:
        self.stage = stage
        self.done[stage] = 0

    def advance(self, num_events: int, facts: Any) -> None:
        self.done[self.stage] += num_events


def test_a_replay_is_watched_and_leaves_the_run_alone(trained: Trained) -> None:
    before = {path: path.read_bytes() for path in trained.run.rglob("*") if path.is_file()}
    variant = "felrec-q" if isinstance(trained.model, FELRecQ) else "felrec-p"
    config = experiment(
        trained.dataset, trained.run, model={"variant": variant}, evaluation={"cache": "reset"}
    )
    stages = Stages()
    trainer = tiny.build_trainer(config, trained.dataset, stages)
    trainer.test(read_checkpoint(trained.checkpoint))
    split = trained.dataset.split
    assert stages.done == {
        "replay of the training part": len(split.train) - trained.train_start,
        "replay of the validation part": len(split.validation),
        "test": len(split.test),
    }
    for path, content in before.items():
        assert path.read_bytes() == content


def test_zero_is_the_weights_on_other_events(trained: Trained, tmp_path: Path) -> None:
    rows = random_rows(5, 91)
    dataset = prepare_rows(rows, tmp_path, **FRACTIONS)
    other = Trained(rows, dataset, tmp_path / "run", trained.checkpoint, trained.model)
    assert rows_of(fast(other, cache="zero")) == slow(other)[0]
    with pytest.raises(CheckpointError, match=r"with another data set(.*\n)*.*cache=zero"):
        fast(other, cache="reset")
    with pytest.raises(CheckpointError, match=r"with this data set(.*\n)*.*cache=reset"):
        fast(trained, cache="zero")


def test_a_training_is_not_tested_on_another_data_set(trained: Trained, tmp_path: Path) -> None:
    config = experiment(trained.dataset, tmp_path / "run", evaluation={"cache": "zero"})
    with pytest.raises(ConfigError, match=r"its own data set\n  where: evaluation\.cache"):
        tiny.build_trainer(config, trained.dataset).fit()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"cache": "reset"}, {"use_heads": True}, {"nearest_users": 10}])
def test_baselines_have_no_such_variants(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="they are for FELRec, not for bpr-mf"):
        parse_config(
            {
                "data": {"url": "data"},
                "run": {"url": "run"},
                "model": {"variant": "bpr-mf"},
                "evaluation": {"candidates": "training", **change},
            },
            where="test",
        )


@pytest.mark.parametrize("with_replacement", [False, True])
@pytest.mark.parametrize("candidates", ["growing", "training"])
def test_negatives_are_available_at_the_time_of_the_event(
    candidates: str, with_replacement: bool, tmp_path: Path
) -> None:
    """All of the available ones are drawn where there are few, each as often as the others."""
    rows = random_rows(1)
    dataset = prepare_rows(rows, tmp_path, **FRACTIONS)
    config = EvaluationConfig.model_validate(
        {"candidates": candidates, "available_within": 3.0, "num_negatives": 400}
    )
    span = dataset.split.test
    sets = CandidateSets(config, dataset, span)
    items = dataset.items.ids.tolist()
    num_left_out = 0
    for batch, _ in EventStream(dataset, span, BATCH).batches():
        if with_replacement:
            sets.add(batch)
        until = batch.position[0] + len(batch) * with_replacement
        known = {int(item): time for _, item, time in rows[:until]}  # type: ignore[call-overload]
        drawn = sets.draw(batch, with_replacement=with_replacement)
        if not with_replacement:
            sets.add(batch)
        for event, negatives in enumerate(drawn.negatives_BM.tolist()):
            choice = {
                item
                for item, time in known.items()
                if time >= batch.timestamp[event] - 3 * DAY_US
                and (candidates == "growing" or items.index(item) < dataset.num_train_items)
            }
            num_left_out += len(known) - len(choice)
            target = int(batch.item[event])
            assert drawn.available is not None
            assert drawn.available.num_candidates_B[event] == len(choice | {target})
            found = [items[row] for row in negatives if row >= 0]
            if with_replacement:
                assert not choice or set(found) == choice
                assert len(found) == 400
            else:
                assert sorted(found) == sorted(choice - {target})
    assert num_left_out > 0


def test_most_popular_among_available_items(tmp_path: Path) -> None:
    rows = random_rows(2)
    dataset = prepare_rows(rows, tmp_path, **FRACTIONS)
    config = EvaluationConfig(available_within=5.0, num_negatives=7)
    result = most_popular(dataset, dataset.split.test, config, batch_size=BATCH)
    span = dataset.split.test
    for event in range(len(span)):
        position = span.start + event
        before = rows[: span.start + event // BATCH * BATCH]
        last_seen = {item: time for _, item, time in before}
        _, target, now = rows[position]
        choice = [i for i, time in last_seen.items() if time >= now - 5 * DAY_US and i != target]
        count = {item: sum(row[1] == item for row in before) for item in [*choice, target]}
        above = sum(count[item] > count[target] for item in choice)
        assert result.counts.above[event] == above
        assert result.counts.tied[event] == sum(count[i] == count[target] for i in choice)
        assert result.counts.num_candidates[event] == len(choice) + 1
    everything = most_popular(dataset, span, EvaluationConfig(num_negatives=7), batch_size=BATCH)
    assert (result.counts.num_candidates < everything.counts.num_candidates).any()
