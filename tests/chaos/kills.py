"""A training on Ray, and a thread that kills its processes while it goes on."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.training.checkpoint import CheckpointStore
from felrec_dist.training.trainer import NoProgress, Progress
from launch import on_ray
from tests import tiny
from tests.processes import actors

WORKERS, SHARDS, EPOCHS = 2, 2, 4
# What may be killed, by the class of its actor.
KINDS = {"worker": "TrainingWorker", "shard": "ShardActor"}

# Each kill gets so many training steps of its own, of tens of milliseconds each.
_STEPS_PER_KILL = 24
_LONGEST_DELAY_S = 0.3
_RECOVERY_S = 6.0
_POLL_S = 0.02
_NAME = re.compile(r"epoch-(\d+)(?:-step-(\d+))?")


@dataclass(frozen=True)
class Kill:
    """A kill and what became of it.

    Attributes:
        kind: of ``KINDS``.
        step: global step of the newest checkpoint then.
        noticed_s: seconds until the driver knew.
        recovered_s: seconds until the first checkpoint after it; it takes a few training steps.
            None when the run ended without another one.
    """

    kind: str
    step: int
    noticed_s: float
    recovered_s: float | None


def prepare_events(folder: Path, num_kills: int) -> PreparedDataset:
    """A data set with enough steps an epoch for so many kills in a run."""
    num_steps = max(15, -(-num_kills * _STEPS_PER_KILL // EPOCHS))
    # Training has eight tenths of the events.
    return tiny.prepare_events(folder, num_events=num_steps * tiny.BATCH * 10 // 8 + tiny.BATCH)


def experiment(
    data_url: str, run_url: str, *, timeout_s: float = 300.0, start_timeout_s: float = 300.0
) -> ExperimentConfig:
    """In float64, with 2 workers, 2 shards and a checkpoint every 4 steps.

    Args:
        data_url, run_url: of the run.
        timeout_s: limit of a rank's wait for the others, and for a shard.
        start_timeout_s: of the cluster.
    """
    return tiny.experiment(
        data_url,
        run_url,
        {
            "training": {"dtype": "float64", "schedule": {"epochs": EPOCHS, "warmup_epochs": 1}},
            "cache": {
                "num_shards": SHARDS,
                "block_rows": 16,
                "storage": "float64",
                "timeout_s": min(timeout_s, 60.0),
            },
            "checkpoint": {"every_steps": 4},
            "cluster": {
                "num_workers": WORKERS,
                "collective_timeout_s": timeout_s,
                "start_timeout_s": start_timeout_s,
            },
        },
    )


def train(
    config: ExperimentConfig, progress: Progress | None = None, timeout_s: float = 600.0
) -> None:
    """Runs to the end, within a time limit.

    Raises:
        RunStoppedError: the time was over.
    """
    deadline = time.monotonic() + timeout_s
    on_ray.run(config, on_ray.Job(), progress or NoProgress(), lambda: time.monotonic() > deadline)


class Lines(NoProgress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    @property
    def num_lost(self) -> int:
        """How often something was lost, and the driver noticed."""
        return sum(line.startswith("lost: ") for line in self.lines)


class Killer(Lines):
    """Kills -9 one process after the other while its body trains.

    Which and when is drawn from the seed: the kills are spread over the run's steps, each comes a
    random moment after a checkpoint, and none before the run made a checkpoint since the last one.
    It is the progress of its run, too: that is how it learns what the driver noticed.

    Args:
        config: of the run.
        num_steps: of the whole run.
        num_kills: in it.
        seed: of what is drawn.
        kinds: what may be killed, of ``KINDS``.
        is_merciless: every other time, kills once more while the run recovers. ``num_more`` counts
            these; such a failure comes without progress.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        num_steps: int,
        num_kills: int,
        seed: int,
        kinds: Sequence[str] = ("worker", "shard"),
        is_merciless: bool = False,
    ) -> None:
        super().__init__()
        self.kills: list[Kill] = []
        self.num_more = 0
        self._store = CheckpointStore(config.run.url)
        self._steps_per_epoch = num_steps // config.training.schedule.epochs
        self._draw = np.random.default_rng(seed)
        self._kinds = kinds
        self._is_merciless = is_merciless
        # In each of as many equal parts of the run; the last ends a little before the run does.
        part = (num_steps - _STEPS_PER_KILL / 2) / num_kills
        self._due = part * (np.arange(num_kills) + self._draw.random(num_kills))
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._kill_all, name="killer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _kill_all(self) -> None:
        for due in self._due:
            if not self._kill_once(due):
                return

    def _kill_once(self, due: float) -> bool:
        """Returns whether the run made a checkpoint since; otherwise it has ended."""
        kind = str(self._draw.choice(self._kinds))
        is_killed = False
        while not is_killed:  # there is none while the run recovers from one kill more
            if not self._wait(lambda: self._steps_done() >= due):
                return False
            self._is_over.wait(self._draw.uniform(0, _LONGEST_DELAY_S))
            num_lost, step = self.num_lost, self._steps_done()
            began = time.monotonic()
            is_killed = self._kill_one_of(actors(KINDS[kind]))
        if not self._wait(lambda: self.num_lost > num_lost):
            return False
        noticed_s = time.monotonic() - began
        # What was committed until now may be the dead attempt's.
        done = self._steps_done()
        if self._is_merciless and self._draw.random() < 0.5:
            self._is_over.wait(self._draw.uniform(0, _RECOVERY_S))
            anything = [pid for each in self._kinds for pid in actors(KINDS[each])]
            self.num_more += self._kill_one_of(anything)
        is_recovered = self._wait(lambda: self._steps_done() > done)
        recovered_s = time.monotonic() - began if is_recovered else None
        self.kills.append(Kill(kind, step, noticed_s, recovered_s))
        return is_recovered

    def _kill_one_of(self, pids: Sequence[int]) -> bool:
        """Returns whether there was one."""
        if not pids:
            return False
        with suppress(ProcessLookupError):
            os.kill(int(self._draw.choice(pids)), signal.SIGKILL)
        return True

    def _steps_done(self) -> int:
        """Global steps behind the newest checkpoint."""
        newest = self._store.latest()
        match = _NAME.search(newest or "")
        if match is None:
            return 0
        epoch, step = int(match[1]), int(match[2] or self._steps_per_epoch)
        return epoch * self._steps_per_epoch + step

    def _wait(self, condition: Callable[[], bool]) -> bool:
        """Returns whether the condition came true before the run ended."""
        while not condition():
            if self._is_over.wait(_POLL_S):
                return False
        return True
