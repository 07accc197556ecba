"""A run: what it leaves, how it goes on after it was stopped, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from felrec_dist.config import ExperimentConfig, load_config
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    NonFiniteLossError,
    RunStoppedError,
    TrainingError,
)
from felrec_dist.evaluation.evaluator import Protocol
from felrec_dist.evaluation.report import read_report, report_url
from felrec_dist.evaluation.result import PartResult, metrics_to_json
from felrec_dist.model.felrec import ModelOutput, build_model
from felrec_dist.training.checkpoint import CheckpointStore, RunPosition, read_checkpoint
from felrec_dist.training.run import run_evaluation, run_training
from felrec_dist.training.trainer import NoProgress, RunResult, Trainer
from felrec_dist.training.world import World
from tests import tiny
from tests.data.oracle import Row, prepare_rows


class Stopped(Exception):
    """The run was stopped from outside."""


class StopIn(NoProgress):
    """Stops a run once a stage has done so many events."""

    def __init__(self, stage: str, num_events: int) -> None:
        self.stage = stage
        self.num_events = num_events
        self.current = ""
        self.done = 0

    def begin(self, stage: str, num_events: int) -> None:
        self.current, self.done = stage, 0

    def advance(self, num_events: int, facts: Mapping[str, float]) -> None:
        self.done += num_events
        if self.current == self.stage and self.done >= self.num_events:
            raise Stopped


class Stages(NoProgress):
    """Remembers what began, and how many events of it were done."""

    def __init__(self) -> None:
        self.events: dict[str, int] = {}

    def begin(self, stage: str, num_events: int) -> None:
        self.events[stage] = num_events

    @property
    def epochs(self) -> list[int]:
        """Those that were trained, from 1."""
        return [int(stage[6]) for stage in self.events if stage.endswith("training")]


def state_of(trainer: Trainer, result: RunResult) -> dict[str, Any]:
    """All that two equal runs have in common, to the last bit."""
    return {
        "cache": trainer.client.digest(),
        "best": result.best,
        "training_loss": result.training_loss,
        "ranks": result.test.normalized_rank.tolist(),
        "hits": result.test.is_hit.tolist(),
        "model": {
            name: t.tolist() for name, t in tiny.felrec_of(trainer).model.state_dict().items()
        },
        "last": {
            name: (tensor.tolist(), tensor.dtype)
            for checkpoint in [read_checkpoint(trainer.store.epoch_url(2))]
            for name, tensor in {**checkpoint.model, **checkpoint.optimizer}.items()
        },
    }


ARITHMETIC = [
    pytest.param({"dtype": "float64"}, {"storage": "float64"}, {}, id="float64, SGD"),
    pytest.param({}, {}, {}, id="float32, SGD"),
    pytest.param({"optimizer": "adam"}, {}, {}, id="float32, Adam"),
    pytest.param(
        {"optimizer": "adam", "dtype": "float64"}, {"storage": "float64"}, {}, id="float64, Adam"
    ),
    pytest.param({"momentum": 0.0}, {"storage": "bfloat16"}, {}, id="bfloat16, no momentum"),
    pytest.param({}, {}, {"variant": "felrec-p"}, id="FELRec-P"),
    pytest.param(
        {},
        {},
        {"negatives": "batch", "empty_slot": "identity", "absent_row": "identity"},
        id="batch negatives, identity",
    ),
]


@pytest.mark.parametrize(("training", "cache", "model"), ARITHMETIC)
def test_a_resumed_run_equals_the_uninterrupted_one(
    dataset: PreparedDataset,
    tmp_path: Path,
    training: dict[str, Any],
    cache: dict[str, Any],
    model: dict[str, Any],
) -> None:
    def config(run: str) -> ExperimentConfig:
        base = tiny.experiment(dataset.url, str(tmp_path / run)).model_dump()
        changes = {
            "training": {**base["training"], **training},
            "cache": {**base["cache"], **cache},
            "model": {**base["model"], **model},
        }
        assert changes["model"]["encoder"]["dropout"] > 0
        return tiny.experiment(dataset.url, str(tmp_path / run), changes)

    whole = tiny.build_trainer(config("whole"), dataset)
    expected = state_of(whole, whole.fit())

    stopper = StopIn("epoch 2/3, training", 5 * tiny.BATCH)
    with pytest.raises(Stopped):
        tiny.build_trainer(config("parts"), dataset, stopper).fit()
    # The random state of a process that did something else before.
    torch.manual_seed(999)
    stages = Stages()
    resumed = tiny.build_trainer(config("parts"), dataset, stages)
    result = resumed.fit(resume=True)
    assert stages.epochs == [2, 3], "only the epochs that were missing were trained"
    assert len(result.validation) == 3
    assert state_of(resumed, result) == expected


@pytest.mark.parametrize(
    ("stage", "num_events", "epochs_left"),
    [
        ("epoch 1/3, training", 1, 3),
        ("epoch 1/3, validation", 1, 3),
        ("epoch 2/3, validation", 30, 2),
        ("test", 1, 0),
    ],
)
def test_a_run_may_be_stopped_anywhere(
    dataset: PreparedDataset, tmp_path: Path, stage: str, num_events: int, epochs_left: int
) -> None:
    whole = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "whole")), dataset)
    expected = state_of(whole, whole.fit())
    config = tiny.experiment(dataset.url, str(tmp_path / "parts"))
    with pytest.raises(Stopped):
        tiny.build_trainer(config, dataset, StopIn(stage, num_events)).fit()
    stages = Stages()
    resumed = tiny.build_trainer(config, dataset, stages)
    result = resumed.fit(resume=True)
    assert len(stages.epochs) == epochs_left
    assert state_of(resumed, result) == expected


def test_a_run_stopped_while_it_saves_goes_on_from_the_epoch_before(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "whole")), dataset)
    expected = state_of(whole, whole.fit())
    config = tiny.experiment(dataset.url, str(tmp_path / "parts"))
    real_commit = CheckpointStore.commit

    def commit(self: CheckpointStore, position: RunPosition, **state: Any) -> None:
        if position.epoch == 1:
            raise Stopped
        real_commit(self, position, **state)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "commit", commit)
        with pytest.raises(Stopped):
            tiny.build_trainer(config, dataset).fit()
    resumed = tiny.build_trainer(config, dataset)
    assert Path(resumed.store.epoch_url(1), "cache").exists(), "it was stopped in the middle"
    result = resumed.fit(resume=True)
    assert len(result.validation) == 3
    assert state_of(resumed, result) == expected


def test_a_run_lives_on_any_file_system(dataset: PreparedDataset, tmp_path: Path) -> None:
    local = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "run")), dataset)
    expected = state_of(local, local.fit())
    config = tiny.experiment(dataset.url, f"memory://{tmp_path.name}/run")
    with pytest.raises(Stopped):
        tiny.build_trainer(config, dataset, StopIn("epoch 2/3, validation", 1)).fit()
    trainer = tiny.build_trainer(config, dataset)
    assert state_of(trainer, trainer.fit(resume=True)) == expected
    assert load_config(f"{config.run.url}/config.yaml") == config


EVERY = 4  # of 15 steps: the epoch's last steps are in no cut of their own


@pytest.mark.parametrize(
    ("stage", "steps", "left"),
    [
        pytest.param("epoch 1/3, training", 3, {"epoch 1/3, training": 15}, id="before any cut"),
        pytest.param("epoch 1/3, training", 4, {"epoch 1/3, training": 15}, id="while it saves"),
        pytest.param("epoch 1/3, training", 6, {"epoch 1/3, training": 11}, id="after a cut"),
        pytest.param("epoch 2/3, training", 15, {"epoch 2/3, training": 3}, id="last step"),
        pytest.param("epoch 2/3, validation", 1, {"epoch 2/3, training": 3}, id="validation"),
        pytest.param("epoch 3/3, training", 9, {"epoch 3/3, training": 7}, id="last epoch"),
    ],
)
@pytest.mark.parametrize("num_shards", [2, 5])
def test_a_run_goes_on_from_the_middle_of_an_epoch(
    dataset: PreparedDataset,
    tmp_path: Path,
    stage: str,
    steps: int,
    left: dict[str, int],
    num_shards: int,
) -> None:
    """To the last bit, with other shards too; ``left`` is in training steps."""

    def config(run: str, num_shards: int = 2) -> ExperimentConfig:
        changes = {
            "run": {"log_every_steps": 1},
            "checkpoint": {"every_steps": EVERY},
            "cache": {"num_shards": num_shards, "block_rows": 16},
        }
        return tiny.experiment(dataset.url, str(tmp_path / run), changes)

    whole = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "whole")), dataset)
    expected = state_of(whole, whole.fit())
    stopper = StopIn(stage, steps * tiny.BATCH)
    with pytest.raises(Stopped):
        tiny.build_trainer(config("parts"), dataset, stopper).fit()
    stages = Stages()
    resumed = tiny.build_trainer(config("parts", num_shards), dataset, stages)
    result = resumed.fit(resume=True)
    first = next(iter(stages.events))
    assert {first: stages.events[first] // tiny.BATCH} == left
    assert state_of(resumed, result) == expected
    # Both the newest and the one before; the best is one of them here, or a third.
    assert names_of(resumed) >= {"epoch-0002", "epoch-0002-step-00000012"}
    assert len(names_of(resumed)) <= 3


def names_of(trainer: Trainer) -> set[str]:
    """The committed checkpoints of a local run."""
    return {path.parent.name for path in Path(trainer.store.url).glob("*/manifest.json")}


def test_cuts_within_an_epoch_hold_what_is_new(dataset: PreparedDataset, tmp_path: Path) -> None:
    """Rows of the cuts add up to more than the cache, and each cut to what its steps wrote."""
    changes = {"checkpoint": {"every_steps": 2, "keep": 100}}
    trainer = tiny.build_trainer(
        tiny.experiment(dataset.url, str(tmp_path / "run"), changes), dataset
    )
    trainer.fit()
    num_full = num_deltas = 0
    for name in sorted(names_of(trainer)):
        checkpoint = read_checkpoint(f"{trainer.store.url}/{name}")
        own = [part for part in checkpoint.chain.parts if part.path.startswith(f"{name}/")]
        if any(part.since is None for part in own):
            num_full += 1
            assert len(own) == len(checkpoint.chain.parts), "a full snapshot needs no other"
            continue
        num_deltas += 1
        first = own[0].since
        assert first is not None
        assert checkpoint.position.next_position - first <= 3 * tiny.BATCH
        for part in own:
            assert part.num_rows <= checkpoint.position.next_position - first
    assert num_full >= 3, "at least one full snapshot an epoch"
    assert num_deltas >= num_full


@pytest.mark.parametrize("on_stop", [True, False])
def test_asked_to_stop_it_stops_at_a_steps_end(
    dataset: PreparedDataset, tmp_path: Path, on_stop: bool
) -> None:
    whole = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "whole")), dataset)
    expected = state_of(whole, whole.fit())
    config = tiny.experiment(
        dataset.url, str(tmp_path / "run"), {"checkpoint": {"on_stop": on_stop}}
    )
    asked = iter(range(20))  # 15 steps and 2 batches of validation: the second epoch's third step
    trainer = tiny.build_trainer(config, dataset, should_stop=lambda: next(asked, None) is None)
    newest = "epoch-0001-step-00000004" if on_stop else "epoch-0000"
    with pytest.raises(RunStoppedError, match=rf"(?s)epoch 1, after 4 steps.*{newest}"):
        trainer.fit()
    stages = Stages()
    resumed = tiny.build_trainer(config, dataset, stages)
    result = resumed.fit(resume=True)
    assert stages.events["epoch 2/3, training"] == (11 if on_stop else 15) * tiny.BATCH
    assert state_of(resumed, result) == expected


@pytest.mark.parametrize(("num_asked", "stage"), [(15, "epoch 1/3, validation"), (51, "test")])
def test_asked_to_stop_it_does_not_finish_an_evaluation(
    dataset: PreparedDataset, tmp_path: Path, num_asked: int, stage: str
) -> None:
    asked = iter(range(num_asked))
    trainer = tiny.build_trainer(
        tiny.experiment(dataset.url, str(tmp_path / "run")),
        dataset,
        should_stop=lambda: next(asked, None) is None,
    )
    with pytest.raises(RunStoppedError, match=f"(?s)asked to stop.*where: {stage}"):
        trainer.fit()


def test_a_checkpoint_within_an_epoch_is_not_tested(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    changes = {"checkpoint": {"every_steps": EVERY}}
    trainer = tiny.build_trainer(
        tiny.experiment(dataset.url, str(tmp_path / "run"), changes), dataset
    )
    trainer.fit()
    checkpoint = read_checkpoint(f"{trainer.store.url}/epoch-0002-step-00000012")
    with pytest.raises(CheckpointError, match=r"(?s)within an epoch.*got: 12 training steps"):
        trainer.test(checkpoint)


def test_resuming_a_run_that_has_not_begun_begins_it(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    config = tiny.experiment(dataset.url, str(tmp_path / "run"))
    result = tiny.build_trainer(config, dataset).fit(resume=True)
    assert len(result.validation) == 3


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (
            "model",
            "queue_size",
            41,
            r"another model\n.*\n  got: queue_size 40 in the checkpoint, 41",
        ),
        ("training", "seed", 5, r"another training\n.*\n  got: seed 0 in the checkpoint, 5 in"),
        ("training", "optimizer", "adam", r"another training\n.*\n  got: optimizer 'sgd' in"),
        ("tables", "fused_lr", 0.5, r"another tables\n.*\n  got: fused_lr"),
        ("data", "batch_size", 8, r"another data\.batch_size\n.*\n  got: 16 in the check.*, 8 in"),
        (
            "data",
            "train_events",
            64,
            r"another data\.train_events\n.*\n  got: None in the ch.*, 64 in",
        ),
        ("cache", "storage", "float16", r"another cache\.storage\n.*\n  got: 'float32' in the"),
        (
            "evaluation",
            "protocol",
            "released",
            r"another evaluation\.protocol\n.*\n  got: 'causal'",
        ),
        (
            "evaluation",
            "candidates",
            "training",
            r"another evaluation\.candidates\n.*\n  got: 'growing'",
        ),
    ],
)
def test_a_run_does_not_go_on_as_another_one(
    dataset: PreparedDataset, tmp_path: Path, section: str, key: str, value: object, message: str
) -> None:
    run_url = str(tmp_path / "run")
    config = tiny.experiment(dataset.url, run_url)
    with pytest.raises(Stopped):
        tiny.build_trainer(config, dataset, StopIn("epoch 2/3, training", 1)).fit()
    base = config.model_dump()[section]
    other = tiny.experiment(dataset.url, run_url, {section: {**base, key: value}})
    events_before = sorted((tmp_path / "run" / "tensorboard").iterdir())
    with pytest.raises(CheckpointError, match=message) as caught:
        tiny.build_trainer(other, dataset).fit(resume=True)
    assert "config.yaml" in caught.value.remedy
    # What the remedy points to is still there.
    assert load_config(f"{run_url}/config.yaml") == config
    assert sorted((tmp_path / "run" / "tensorboard").iterdir()) == events_before


def test_a_run_may_train_on_the_last_events_alone(dataset: PreparedDataset, tmp_path: Path) -> None:
    train = dataset.split.train
    spans = []
    for num_events in (70, len(train) + 1):
        data = {"data": {"url": dataset.url, "batch_size": 16, "train_events": num_events}}
        config = tiny.experiment(dataset.url, str(tmp_path / f"run-{num_events}"), data)
        trainer = tiny.build_trainer(config, dataset)
        trainer.fit()
        spans.append(tiny.felrec_of(trainer).train_span)
        assert trainer.steps_per_epoch == len(spans[-1]) // 16
    # Whole batches of the last 70, next to the validation; and all that there are.
    assert spans == [Span(train.stop - 64, train.stop), Span(train.stop - 240, train.stop)]
    few = tiny.experiment(
        dataset.url, "run", {"data": {"url": "", "batch_size": 16, "train_events": 15}}
    )
    with pytest.raises(ConfigError, match=r"no whole batch\n(.*\n)*.*15 training events"):
        tiny.build_trainer(few, dataset)


def test_a_checkpoint_from_before_there_were_last_events_is_of_all(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    trainer = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "run")), dataset)
    checkpoint = read_checkpoint(trainer.fit().checkpoint_url)
    del checkpoint.config["data"]["train_events"]
    trainer.restore(checkpoint, generation=None)
    data = {"url": dataset.url, "batch_size": 16, "train_events": 64}
    other = tiny.experiment(dataset.url, str(tmp_path / "other"), {"data": data})
    with pytest.raises(CheckpointError, match=r"another data\.train_events"):
        tiny.build_trainer(other, dataset).restore(checkpoint, generation=None)


def test_a_deep_difference_is_named(dataset: PreparedDataset, tmp_path: Path) -> None:
    run_url = str(tmp_path / "run")
    with pytest.raises(Stopped):
        tiny.build_trainer(
            tiny.experiment(dataset.url, run_url), dataset, StopIn("epoch 2/3, training", 1)
        ).fit()
    schedule = {"schedule": {"epochs": 4, "warmup_epochs": 1}}
    longer = tiny.experiment(dataset.url, run_url, {"training": schedule})
    with pytest.raises(CheckpointError, match=r"got: schedule\.epochs 3 in the checkpoint, 4 in"):
        tiny.build_trainer(longer, dataset).fit(resume=True)


def test_what_does_not_change_the_model_may_change(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    whole = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "whole")), dataset)
    expected = state_of(whole, whole.fit())
    run_url = str(tmp_path / "parts")
    config = tiny.experiment(dataset.url, run_url)
    with pytest.raises(Stopped):
        tiny.build_trainer(config, dataset, StopIn("epoch 2/3, training", 1)).fit()
    other = tiny.experiment(
        dataset.url,
        run_url,
        {
            "cache": {"num_shards": 5, "block_rows": 32},
            "run": {"log_every_steps": 1},
            "training": {**config.training.model_dump(), "patience": 5},
        },
    )
    trainer = tiny.build_trainer(other, dataset)
    assert state_of(trainer, trainer.fit(resume=True)) == expected


def test_another_data_set_is_refused(dataset: PreparedDataset, tmp_path: Path) -> None:
    config = tiny.experiment(dataset.url, str(tmp_path / "run"))
    with pytest.raises(Stopped):
        tiny.build_trainer(config, dataset, StopIn("epoch 2/3, training", 1)).fit()
    other = tiny.prepare_events(tmp_path / "other", seed=1)
    with pytest.raises(
        CheckpointError, match=r"made with another data set(.*\n)*  remedy: set data\.url"
    ):
        tiny.build_trainer(config, other).fit(resume=True)


def test_a_folder_with_checkpoints_is_not_begun_again(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    config = tiny.experiment(dataset.url, str(tmp_path / "run"))
    with pytest.raises(Stopped):
        tiny.build_trainer(config, dataset, StopIn("epoch 2/3, training", 1)).fit()
    other = tiny.experiment(dataset.url, str(tmp_path / "run"), {"cache": {"num_shards": 1}})
    with pytest.raises(CheckpointError, match=r"already holds checkpoints(.*\n)*.*--no-resume"):
        tiny.build_trainer(other, dataset).fit()
    assert load_config(str(tmp_path / "run" / "config.yaml")) == config, "it was left alone"


def test_settings_that_are_newer_or_older_than_the_checkpoint(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    trainer = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "run")), dataset)
    checkpoint = read_checkpoint(trainer.fit().checkpoint_url)
    del checkpoint.config["training"]["autocast"]
    trainer.restore(checkpoint, generation=None)  # it had its default then
    checkpoint.config["training"]["warp"] = 9
    with pytest.raises(CheckpointError, match=r"got: warp only in the checkpoint"):
        trainer.restore(checkpoint, generation=None)


def test_no_served_event_of_the_validation_is_an_error(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "run")), dataset)
    real_evaluate = trainer.evaluate

    def evaluate(
        span: Span, step: int, stage: str, protocol: Protocol | None = None
    ) -> tuple[PartResult, int]:
        result, step = real_evaluate(span, step, stage, protocol)
        return dataclasses.replace(result, is_served=np.zeros_like(result.is_served)), step

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    with pytest.raises(TrainingError, match=r"can serve no event(.*\n)*  got: .* 0 served"):
        trainer.fit()


@pytest.mark.parametrize("best_epoch", [0, 1, 2])
def test_the_best_epoch_is_tested_and_kept(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best_epoch: int
) -> None:
    trainer = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "run")), dataset)
    real_evaluate = trainer.evaluate
    weights: list[torch.Tensor] = []

    def evaluate(
        span: Span, step: int, stage: str, protocol: Protocol | None = None
    ) -> tuple[PartResult, int]:
        result, step = real_evaluate(span, step, stage, protocol)
        if stage != "test":
            rank = 0.1 if len(weights) == best_epoch else 0.2
            result = dataclasses.replace(
                result, normalized_rank=np.full_like(result.normalized_rank, rank)
            )
        weights.append(tiny.felrec_of(trainer).model.encoder.output.weight.detach().clone())
        return result, step

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    result = trainer.fit()
    assert result.best.epoch == best_epoch
    assert result.best.validation_rank == pytest.approx(0.1)
    assert result.checkpoint_url == trainer.store.epoch_url(best_epoch)
    tested = weights[3]
    equal = [torch.equal(tested, weight) for weight in weights[:3]]
    assert equal == [epoch == best_epoch for epoch in range(3)]
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {f"epoch-{best_epoch:04d}", "epoch-0001", "epoch-0002"}
    assert read_checkpoint(trainer.store.epoch_url(2)).position.best == result.best


def test_of_equal_epochs_the_first_is_best(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "run")), dataset)
    real_evaluate = trainer.evaluate

    def evaluate(
        span: Span, step: int, stage: str, protocol: Protocol | None = None
    ) -> tuple[PartResult, int]:
        result, step = real_evaluate(span, step, stage, protocol)
        ranks = np.full_like(result.normalized_rank, 0.5)
        return dataclasses.replace(result, normalized_rank=ranks), step

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    assert trainer.fit().best.epoch == 0


@pytest.mark.parametrize(
    ("ranks", "patience", "epochs_trained"),
    [
        ([0.3, 0.4, 0.2], 1, 2),  # the third would have been the best
        ([0.3, 0.2, 0.1], 1, 3),
        ([0.3, 0.3, 0.1], 1, 2),  # as good is no better
        ([0.3, 0.4, 0.2], 2, 3),
        ([0.3, 0.4, 0.5], None, 3),
    ],
)
def test_training_ends_when_patience_does(
    dataset: PreparedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: list[float],
    patience: int | None,
    epochs_trained: int,
) -> None:
    config = tiny.experiment(dataset.url, str(tmp_path / "run"))
    training = {**config.training.model_dump(), "patience": patience}
    config = tiny.experiment(dataset.url, str(tmp_path / "run"), {"training": training})

    def fit(watcher: Stages) -> Trainer:
        trainer = tiny.build_trainer(config, dataset, watcher)
        real_evaluate = trainer.evaluate

        def evaluate(
            span: Span, step: int, stage: str, protocol: Protocol | None = None
        ) -> tuple[PartResult, int]:
            result, step = real_evaluate(span, step, stage, protocol)
            rank = ranks[len(trainer.validation)] if stage != "test" else 0.5
            equal = np.full_like(result.normalized_rank, rank)
            return dataclasses.replace(result, normalized_rank=equal), step

        monkeypatch.setattr(trainer, "evaluate", evaluate)
        best = trainer.fit(resume=True).best
        assert best.validation_rank == pytest.approx(min(ranks[:epochs_trained]))
        return trainer

    stages = Stages()
    fit(stages)
    assert stages.epochs == list(range(1, epochs_trained + 1))
    again = Stages()
    fit(again)
    assert again.epochs == [], "nor does it begin again"


@pytest.mark.parametrize("log_every_steps", [1, 4, 100])
@pytest.mark.parametrize("bad_step", [0, 6, 14])
def test_a_loss_that_is_not_finite_stops_the_run(
    dataset: PreparedDataset, tmp_path: Path, bad_step: int, log_every_steps: int
) -> None:
    run = {"log_every_steps": log_every_steps}
    config = tiny.experiment(dataset.url, str(tmp_path / "run"), {"run": run})
    trainer = tiny.build_trainer(config, dataset)
    real_step = tiny.felrec_of(trainer).step
    num_steps = 0

    def step(*args: Any) -> ModelOutput:
        nonlocal num_steps
        output = real_step(*args)
        num_steps += 1
        if num_steps == trainer.steps_per_epoch + bad_step + 1:
            output = dataclasses.replace(output, item_loss=torch.tensor(float("nan")))
        return output

    tiny.felrec_of(trainer).step = step  # type: ignore[assignment]
    first = tiny.felrec_of(trainer).train_span.start + bad_step * tiny.BATCH
    message = (
        rf"the loss is not finite\n  where: epoch 1, step {bad_step}, "
        rf"events at positions {first} to {first + tiny.BATCH - 1}\n  got: .*item loss nan"
    )
    with pytest.raises(NonFiniteLossError, match=message):
        trainer.fit()
    latest = trainer.store.latest()
    assert latest == trainer.store.epoch_url(0)
    assert read_checkpoint(latest).position.is_validated


def test_weights_that_the_last_step_broke_are_not_saved(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    """Their scores would be NaN, which is above nothing: the best ranks of all."""
    trainer = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "run")), dataset)
    real_step = tiny.felrec_of(trainer).step
    num_steps = 0

    def step(*args: Any) -> ModelOutput:
        nonlocal num_steps
        output = real_step(*args)
        num_steps += 1
        if num_steps == 2 * trainer.steps_per_epoch:
            with torch.no_grad():
                tiny.felrec_of(trainer).model.encoder.output.weight[0, 0] = float("inf")
        return output

    tiny.felrec_of(trainer).step = step  # type: ignore[assignment]
    message = r"weights are not finite\n  where: after the last step of epoch 1, encoder\.output"
    with pytest.raises(NonFiniteLossError, match=message):
        trainer.fit()
    assert trainer.store.latest() == trainer.store.epoch_url(0)


def test_the_learning_rate_too_high_ends_in_words(dataset: PreparedDataset, tmp_path: Path) -> None:
    schedule = {"base_lr": 1e38, "epochs": 2, "warmup_epochs": 0}
    changes = {"training": {"schedule": schedule}}
    config = tiny.experiment(dataset.url, str(tmp_path / "run"), changes)
    with pytest.raises(NonFiniteLossError, match=r"lower training\.schedule\.base_lr"):
        tiny.build_trainer(config, dataset).fit()


def test_the_report_and_its_re_evaluation(dataset: PreparedDataset, tmp_path: Path) -> None:
    config = tiny.experiment(dataset.url, str(tmp_path / "run"))
    with tiny.build_client(config) as client:
        result = run_training(config, client, World.current(), resume=False)
    report = read_report(config.run.url, "causal")
    assert metrics_to_json(report.rows["felrec-q"]) == metrics_to_json(result.test.metrics())
    assert list(report.rows) == ["felrec-q", "most popular", "recently popular", "random"]
    assert (report.dataset, report.dataset_digest) == ("tiny", dataset.digest)
    assert (report.split, report.candidates) == ([240, 30, 30], "growing")
    model = build_model(config.felrec)
    assert report.num_parameters == sum(p.numel() for p in model.parameters())
    assert report.step_seconds is not None
    assert report.epoch_seconds is not None
    assert report.checkpoint_url == result.checkpoint_url
    assert report.rows["random"]["total"].normalized_rank == pytest.approx(0.5)
    first = Path(f"{report_url(config.run.url, 'causal')}.parquet").read_bytes()

    with tiny.build_client(config) as client:
        again = run_evaluation(
            config,
            client,
            World.current(),
            checkpoint_url=result.checkpoint_url,
            protocol="causal",
        )
    np.testing.assert_array_equal(again.normalized_rank, result.test.normalized_rank)
    np.testing.assert_array_equal(again.is_hit, result.test.is_hit)
    assert Path(f"{report_url(config.run.url, 'causal')}.parquet").read_bytes() == first
    assert read_report(config.run.url, "causal").to_json() == report.to_json()


def test_a_batch_that_does_not_fit_is_refused(dataset: PreparedDataset, tmp_path: Path) -> None:
    data = {"url": dataset.url, "batch_size": 256}
    config = tiny.experiment(dataset.url, str(tmp_path), {"data": data})
    with pytest.raises(
        ConfigError, match=r"holds no whole batch\n.*\n  got: data\.batch_size = 256, 240 training"
    ):
        tiny.build_trainer(config, dataset)
    data["batch_size"] = 240
    config = tiny.experiment(dataset.url, str(tmp_path / "run"), {"data": data})
    assert tiny.build_trainer(config, dataset).steps_per_epoch == 1
    config = tiny.experiment(dataset.url, str(tmp_path))
    with pytest.raises(ConfigError, match=r"equal slices\n  got: data\.batch_size = 16, 3 ranks"):
        Trainer(config, dataset, tiny.build_client(config), World(0, 3, torch.device("cpu")))


def test_a_part_without_events_is_refused(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = dataclasses.replace(dataset.split, test=Span(300, 300))
    emptied = PreparedDataset.open(dataset.url)
    emptied.split = split
    monkeypatch.setattr(PreparedDataset, "open", lambda url: emptied)
    config = tiny.experiment(dataset.url, str(tmp_path / "run"))
    with (
        tiny.build_client(config) as client,
        pytest.raises(DatasetError, match=r"the test part (.*\n)*.*--test-fraction"),
    ):
        run_training(config, client, World.current(), resume=False)


def test_the_best_epoch_is_chosen_by_what_is_served(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    changes = {"evaluation": {"candidates": "training", "num_negatives": 20}}
    config = tiny.experiment(dataset.url, str(tmp_path / "run"), changes)
    stopper = StopIn("epoch 3/3, training", 5 * tiny.BATCH)
    config = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"every_steps": 4})}
    )
    with pytest.raises(Stopped):
        tiny.build_trainer(config, dataset, stopper).fit()
    with tiny.build_client(config) as client:
        result = run_training(config, client, World.current(), resume=True)
    ranks = [metrics["total"].normalized_rank for metrics in result.validation]
    assert result.best.validation_rank == min(ranks)
    assert ranks.index(min(ranks)) == result.best.epoch
    for metrics in (*result.validation, result.test.metrics()):
        assert metrics["new_items"].num_served == 0 < metrics["new_items"].num_events
        assert not metrics["total"].is_complete
    report = read_report(config.run.url, "causal")
    assert report.candidates == "training"
    for model in report.rows.values():
        assert [m.is_complete for m in model.values()] == [True, True, False, False]


@pytest.mark.parametrize(("part", "first"), [("validation", 80), ("test", 90)])
def test_a_part_of_new_items_alone_is_refused(tmp_path: Path, part: str, first: int) -> None:
    """Where only the items of the training part are candidates."""
    rows: list[Row] = [(n % 7, n if first <= n < first + 10 else n % 5, n) for n in range(100)]
    dataset = prepare_rows(rows, tmp_path)
    changes = {"evaluation": {"candidates": "training"}}
    config = tiny.experiment(dataset.url, str(tmp_path / "run"), changes)
    with (
        tiny.build_client(config) as client,
        pytest.raises(DatasetError, match=rf"(?s)of the {part} part .*candidates=growing"),
    ):
        run_training(config, client, World.current(), resume=False)


def test_representations_that_are_not_finite_are_not_ranked(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    trainer = tiny.build_trainer(tiny.experiment(dataset.url, str(tmp_path / "run")), dataset)
    with torch.no_grad():
        tiny.felrec_of(trainer).model.encoder.output.bias[0] = torch.inf
    span = dataset.split.validation
    where = f"positions {span.start} to {span.start + tiny.BATCH - 1}"
    with pytest.raises(TrainingError, match=f"(?s)representation is not finite.*{where}"):
        trainer.evaluate(span, 0, "validation")
