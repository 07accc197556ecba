"""GRU4Rec against a loop over single events: dictionaries of states, dense tables, GRU cells."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("ray")
pytest.importorskip("torchrec")

from cache_server import CacheClient
from cache_server.ray_transport import (
    RayTransport,
    ShardHandles,
    create_shard_actors,
    destroy_shard_actors,
)
from felrec_dist.baselines.gru4rec import INPUT, GRU4RecTraining, StackedGRU
from felrec_dist.baselines.sessions import SessionBatch, Sessions
from felrec_dist.baselines.shuffled import draw_negatives
from felrec_dist.baselines.training import ITEM
from felrec_dist.config import ExperimentConfig, parse_config
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.stream import EventStream
from felrec_dist.errors import ConfigError
from felrec_dist.evaluation.result import PartResult
from felrec_dist.training.checkpoint import read_checkpoint
from felrec_dist.training.metrics import RunLog
from felrec_dist.training.run import run_training
from felrec_dist.training.schedule import learning_rate
from felrec_dist.training.trainer import Trainer
from felrec_dist.training.world import World
from tests import tiny
from tests.data.oracle import prepare_rows
from tests.ray_sessions import ray_session, run_on_ray_ranks
from tests.runs import differences
from tests.training.test_run import StopIn, Stopped

WIDTH, LAYERS, NEGATIVES, SEED = 8, 2, 3, 5


def experiment(
    dataset: PreparedDataset,
    *,
    run: str = "memory://never-written",
    batch_size: int = 16,
    num_shards: int = 3,
    sessions: str = "carry-over",
    **sections: dict[str, Any],
) -> ExperimentConfig:
    tree: dict[str, Any] = {
        "data": {"url": dataset.url, "batch_size": batch_size},
        "run": {"url": run, "log_every_steps": 3, "device": "cpu"},
        "model": {
            "variant": "gru4rec",
            "width": WIDTH,
            "num_layers": LAYERS,
            "num_negatives": NEGATIVES,
            "sessions": sessions,
        },
        "cache": {"num_shards": num_shards, "block_rows": 16},
        "tables": {"initial_std": 0.5},
        "training": {"seed": SEED, "schedule": {"base_lr": 0.02, "epochs": 2, "warmup_epochs": 0}},
        "evaluation": {"num_negatives": 20, "candidates": "training"},
    }
    return parse_config({**tree, **sections}, where="test")


def gru4rec_of(trainer: Trainer) -> GRU4RecTraining:
    assert isinstance(trainer.recommender, GRU4RecTraining)
    return trainer.recommender


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """A quarter of the events are for evaluation: new items come to be inputs."""
    return tiny.prepare_events(tmp_path_factory.mktemp("data"), 403, seed=2)


@dataclass(frozen=True)
class Event:
    user: int
    item: int


def events_of(dataset: PreparedDataset, span: Span) -> list[Event]:
    """By catalogue rows, in time order."""
    return [
        Event(int(user), int(item))
        for batch, _ in EventStream(dataset, span, 1000).batches()
        for user, item in zip(batch.user_index, batch.item_index, strict=True)
    ]


class SlowGRU4Rec:
    """One user after the other, one event after the other."""

    def __init__(self, trainer: Trainer, dataset: PreparedDataset) -> None:
        recommender = gru4rec_of(trainer)
        self.config, self.dataset = trainer.config, dataset
        assert isinstance(recommender.model, StackedGRU)
        self.cells = nn.ModuleList(nn.GRUCell(WIDTH, WIDTH) for _ in range(LAYERS))
        for cell, other in zip(self.cells, recommender.model.cells, strict=True):
            cell.load_state_dict(other.state_dict())
        num_items = dataset.num_train_items
        self.inputs, self.outputs = (
            nn.Embedding.from_pretrained(
                recommender.tables.parameters[name].detach()[:num_items].clone(), freeze=False
            )
            for name in (INPUT, ITEM)
        )
        self.parameters = [
            *self.cells.parameters(),
            self.inputs.weight,
            self.outputs.weight,
        ]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1.0, momentum=0.9)
        self.history: dict[int, list[int]] = defaultdict(list)
        for event in events_of(dataset, dataset.split.train):
            self.history[event.user].append(event.item)
        self.begin()

    def begin(self) -> None:
        self.states: dict[int, list[Tensor]] = {}
        self.num_read: Counter[int] = Counter()

    def read(self, user: int, item: int) -> Tensor:
        """The user's state goes on over an item; returns the output."""
        before = self.states.get(user, [torch.zeros(WIDTH)] * LAYERS)
        output = self.inputs(torch.tensor(item))
        after = []
        for cell, state in zip(self.cells, before, strict=True):
            output = cell(output, state)
            after.append(output)
        self.states[user] = [state.detach() for state in after]
        return output

    def train(self, batch: SessionBatch, epoch: int, rate: float) -> float:
        targets, outputs = [], []
        for user in batch.user_index.tolist():
            history, place = self.history[user], self.num_read[user]
            outputs.append(self.read(user, history[place]))
            targets.append(history[place + 1])
            self.num_read[user] += 1
        generator = np.random.default_rng([SEED, epoch, batch.step])
        negatives = draw_negatives(
            generator, np.array(targets), self.dataset.num_train_items, NEGATIVES
        )
        losses = []
        for output, target, others in zip(outputs, targets, negatives.tolist(), strict=True):
            positive = torch.tanh(output @ self.outputs.weight[target])
            for other in others:
                negative = torch.tanh(output @ self.outputs.weight[other])
                losses.append(-F.logsigmoid(positive - negative))
        self.optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_value_(self.parameters, 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return float(torch.stack(losses).mean().detach())

    @torch.no_grad()
    def evaluate(self, span: Span, *, starts_anew: bool) -> list[float]:
        """Normalized ranks; NaN where an event is not served."""
        num_items = self.dataset.num_train_items
        if starts_anew:
            self.begin()
            self.history.clear()
        ranks, output = [], dict[int, Tensor]()
        for event in events_of(self.dataset, span):
            history = self.history[event.user]
            for item in history[self.num_read[event.user] :]:
                if item < num_items:
                    output[event.user] = self.read(event.user, item)
            self.num_read[event.user] = len(history)
            history.append(event.item)
            if event.item >= num_items:
                ranks.append(math.nan)
                continue
            if event.user not in self.states:
                ranks.append(0.5)  # all candidates tie
                continue
            scores = self.outputs.weight @ self.states[event.user][-1]
            others = torch.cat([scores[: event.item], scores[event.item + 1 :]])
            above = int((others > scores[event.item]).sum())
            ranks.append(above / (num_items - 1))
        return ranks


def shown(result: PartResult) -> npt.NDArray[np.float64]:
    return np.where(result.is_served, result.normalized_rank, math.nan)


@pytest.mark.parametrize("batch_size", [4, 16], ids=["all is trained", "long sessions are cut"])
@pytest.mark.parametrize("sessions", ["carry-over", "released"])
def test_it_computes_what_a_loop_over_events_does(
    dataset: PreparedDataset, sessions: Literal["carry-over", "released"], batch_size: int
) -> None:
    config = experiment(dataset, batch_size=batch_size, sessions=sessions)
    with tiny.build_trainer(config, dataset) as trainer:
        order = gru4rec_of(trainer).sessions
        missed = order.num_targets_U - order.num_trained_U
        assert (missed.max() > 1) == (batch_size == 16), "some must have events to catch up with"
        slow = SlowGRU4Rec(trainer, dataset)
        log = RunLog(config.run.url, is_writer=False)
        for epoch in range(2):
            slow.begin()
            losses = trainer.train_epoch(epoch, log).total
            expected = [
                slow.train(
                    batch,
                    epoch,
                    learning_rate(config.training.schedule, epoch, step, order.steps_per_epoch),
                )
                for step, batch in enumerate(order.batches(epoch, 0))
            ]
            np.testing.assert_allclose(losses, expected, rtol=1e-5)
        step = trainer.steps_per_epoch
        for name in ("validation", "test"):
            span = getattr(dataset.split, name)
            result, step = trainer.evaluate(span, step, name)
            ranks = slow.evaluate(span, starts_anew=sessions == "released")
            np.testing.assert_allclose(shown(result), ranks, atol=1e-12, err_msg=name)
            assert 0 < np.isnan(ranks).sum() < len(ranks)


def test_the_cases_of_evaluation_are_there(dataset: PreparedDataset) -> None:
    """Else the test above would not see them."""
    known, found = dataset.num_train_items, Counter[str]()
    history: dict[int, list[int]] = defaultdict(list)
    for event in events_of(dataset, dataset.split.train):
        history[event.user].append(event.item)
    for span in (dataset.split.validation, dataset.split.test):
        events = events_of(dataset, span)
        for start in range(0, len(events), 16):
            found["twice in a batch"] += len({e.user for e in events[start : start + 16]}) < 16
        for event in events:
            past = history[event.user]
            found["skipped input"] += len(past) > 1 and past[-1] >= known > min(past)
            found["no known input"] += bool(past) and min(past) >= known
            found["new user with input"] += (
                event.user >= dataset.num_train_users and bool(past) and min(past) < known
            )
            past.append(event.item)
    assert min(found.values()) > 0, found


@pytest.mark.parametrize("batch_size", [1, 4, 8, 16, 24, 40])
def test_each_step_has_the_next_event_of_different_users(
    dataset: PreparedDataset, batch_size: int
) -> None:
    sessions = Sessions(dataset, batch_size, SEED)
    lengths = dataset.users.train_counts[: dataset.num_train_users] - 1
    starts = {
        int(user): int(offset - length)
        for batch, _ in EventStream(dataset, dataset.split.train, 1000).batches()
        for user, offset, length in zip(
            batch.user_index, batch.user_offset, batch.user_length, strict=True
        )
    }
    orders = []
    for epoch in (0, 1, 1):
        batches = list(sessions.batches(epoch, 0))
        assert len(batches) == sessions.steps_per_epoch
        done: Counter[int] = Counter()
        for step, batch in enumerate(batches):
            assert batch.step == step
            users = batch.user_index.tolist()
            assert len(set(users)) == len(users) == batch_size
            for user, place in zip(users, batch.input_place.tolist(), strict=True):
                assert place == starts[user] + done[user]
                done[user] += 1
        assert [done[user] for user in range(len(lengths))] == sessions.num_trained_U.tolist()
        orders.append([batch.user_index.tolist() for batch in batches])
        rest = sessions.batches(epoch, 3)
        assert [batch.user_index.tolist() for batch in rest] == orders[-1][3:]
    assert orders[0] != orders[1] == orders[2]
    num_steps = sessions.steps_per_epoch
    assert np.minimum(lengths, num_steps + 1).sum() < (num_steps + 1) * batch_size, (
        "one more step is impossible"
    )


def test_a_batch_of_more_users_than_there_are_is_refused(dataset: PreparedDataset) -> None:
    with pytest.raises(ConfigError, match=r"batch needs more users(.*\n)*.*batch_size = 100"):
        Sessions(dataset, 100, SEED)


class Shapes(TorchDispatchMode):
    """Remembers the shapes of all results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.seen.add(tuple(tensor.shape))
        return result


def test_no_one_hot_vector_is_made(dataset: PreparedDataset) -> None:
    """None of a step's tensors has a number for each item, but for the tables' first dimension."""
    num_items = dataset.num_train_items
    with tiny.build_trainer(experiment(dataset), dataset) as trainer:
        recommender = trainer.recommender
        with recommender.batches(0, 0) as batches, Shapes() as shapes:
            recommender.train(next(batches), 0, 0.01)
    assert (16, LAYERS * WIDTH) in shapes.seen, "it looked at the step"
    assert (num_items, WIDTH) in shapes.seen
    assert not [shape for shape in shapes.seen if num_items in shape[1:]]


def test_it_overfits_a_cycle(tmp_path: Path) -> None:
    """Each item follows from the one before it; tanh leaves a loss of log(1 + e^-2)."""
    num_users, num_events, num_items = 8, 14, 6
    rows = [
        (user, (user + time) % num_items, 100 * time + user)
        for time in range(num_events)
        for user in range(num_users)
    ]
    dataset = prepare_rows(rows, tmp_path)
    config = experiment(
        dataset,
        batch_size=8,
        training={
            "optimizer": "adam",
            "schedule": {"base_lr": 0.05, "epochs": 20, "warmup_epochs": 0},
        },
    )
    with tiny.build_trainer(config, dataset) as trainer:
        log = RunLog(config.run.url, is_writer=False)
        losses = [trainer.train_epoch(epoch, log).total for epoch in range(20)]
        result, _ = trainer.evaluate(dataset.split.validation, trainer.steps_per_epoch, "")
    assert losses[-1].mean() == pytest.approx(math.log(1 + math.exp(-2)), abs=0.03)
    assert result.metrics()["total"].normalized_rank < 0.1


def test_a_resumed_run_equals_the_uninterrupted_one(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    def config(run: str) -> ExperimentConfig:
        return experiment(
            dataset, run=str(tmp_path / run), batch_size=4, checkpoint={"every_steps": 6}
        )

    def run(name: str, **kwargs: Any) -> None:
        client = tiny.build_client(config(name))
        run_training(config(name), client, World.current(), **kwargs)

    run("whole", resume=False)
    with pytest.raises(Stopped):
        run("parts", resume=False, progress=StopIn("epoch 2/2, training", 4 * 13))
    cut = read_checkpoint(str(tmp_path / "parts/checkpoints/epoch-0001-step-00000012"))
    assert any(part.since == 6 * 4 for part in cut.chain.parts), "it was a delta"
    run("parts", resume=True)
    assert differences(tmp_path / "whole", tmp_path / "parts") == []
    whole, parts = (
        read_checkpoint(str(tmp_path / name / "checkpoints/epoch-0001")).tables
        for name in ("whole", "parts")
    )
    assert whole == parts, "the files of the sharded tables are equal"


@dataclass(frozen=True)
class Outcome:
    """What a run computes, as one rank sees it."""

    losses: npt.NDArray[np.float64]
    ranks: list[npt.NDArray[np.float64]]
    states: npt.NDArray[np.floating]


def run_epoch(config: ExperimentConfig, dataset: PreparedDataset, client: CacheClient) -> Outcome:
    with Trainer(config, dataset, client, World.current()) as trainer:
        losses = trainer.train_epoch(0, RunLog(config.run.url, is_writer=False)).total
        step, ranks = trainer.steps_per_epoch, []
        for span in (dataset.split.validation, dataset.split.test):
            result, step = trainer.evaluate(span, step, "")
            ranks.append(shown(result))
        trainer.world.barrier()
        states = client.fetch(step, {"user": dataset.users.ids})["user"].rows
    return Outcome(losses, ranks, states)


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("session")
def test_ranks_and_shards_change_nothing(
    dataset: PreparedDataset, tmp_path: Path, num_workers: int
) -> None:
    """Three shards: each of two ranks is the writer of some, of four ranks one writes none."""
    config = experiment(dataset, batch_size=8)
    expected = run_epoch(config, dataset, tiny.build_client(config))
    shards = create_shard_actors(config.cache_tables(), config.cache.num_shards, block_rows=16)
    try:
        outcomes = run_on_ray_ranks(num_workers, tmp_path, 120.0, _work, config, dataset, shards)
    finally:
        destroy_shard_actors(shards)
    for found in outcomes:
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
        for ranks, expected_ranks in zip(found.ranks, expected.ranks, strict=True):
            np.testing.assert_array_equal(ranks, expected_ranks)
        assert np.count_nonzero(found.states)
        np.testing.assert_allclose(found.states, expected.states, rtol=1e-4, atol=1e-6)


def _work(config: ExperimentConfig, dataset: PreparedDataset, shards: ShardHandles) -> Outcome:
    with CacheClient(RayTransport(shards), timeout_s=30.0) as client:
        return run_epoch(config, dataset, client)
