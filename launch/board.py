"""What the workers tell the driver while they train, and its wish to stop back to them.

The board is an actor of its own. Its process imports little: not torch, not the trainer.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from launch.ray_metrics import TrainingMetrics

if TYPE_CHECKING:
    from felrec_dist.training.trainer import Progress

REPORT_INTERVAL_S = 0.5
ANSWER_TIMEOUT_S = 10.0


class ProgressBoard:
    """Holds the first rank's reports until the driver takes them, and whether it wants to stop."""

    def __init__(self) -> None:
        self.reports: list[tuple[Any, ...]] = []
        self.stopping = False

    def stop(self) -> None:
        self.stopping = True

    def is_stopping(self) -> bool:
        return self.stopping

    def post(self, reports: list[tuple[Any, ...]]) -> None:
        self.reports += reports

    def take(self) -> list[tuple[Any, ...]]:
        taken, self.reports = self.reports, []
        return taken


def create_board() -> Any:
    """Starts a board.

    Ray starts it again when its process or its node dies: what it held is lost, the run goes on.
    """
    return ray.remote(num_cpus=0, max_restarts=-1)(ProgressBoard).remote()


class BoardProgress:
    """Reports of a worker, sent at most every half second; and whether it should stop.

    Args:
        board: of the run.
        metrics: takes what the worker measures.
    """

    def __init__(self, board: Any, metrics: TrainingMetrics) -> None:
        self.board = board
        self.measure = metrics.measure
        self._stopping = False
        self._question: Any = None
        self._asked = -math.inf
        self._waiting: list[tuple[Any, ...]] = []
        self._sent = 0.0

    def begin(self, stage: str, num_events: int) -> None:
        self._add(("begin", stage, num_events))

    def advance(self, num_events: int, facts: Mapping[str, float]) -> None:
        self._add(("advance", num_events, {name: float(value) for name, value in facts.items()}))

    def say(self, line: str) -> None:
        self._add(("say", line))

    def should_stop(self) -> bool:
        """Whether the board said so; asks it now and then, and never waits for the answer."""
        if self._question is not None and ray.wait([self._question], timeout=0)[0]:
            with suppress(ray.exceptions.RayError):  # the board is gone; it comes back
                self._stopping = ray.get(self._question)
            self._question = None
        if self._question is None and time.monotonic() - self._asked >= REPORT_INTERVAL_S:
            self._asked = time.monotonic()
            self._question = self.board.is_stopping.remote()
        return self._stopping

    def _add(self, report: tuple[Any, ...]) -> None:
        self._waiting.append(report)
        if time.monotonic() - self._sent >= REPORT_INTERVAL_S:
            self._send()

    def _send(self) -> Any:
        sent, self._waiting = self._waiting, []
        self._sent = time.monotonic()
        return self.board.post.remote(sent)

    def flush(self) -> None:
        """Waits, with a limit, until the last reports have arrived."""
        if self._waiting:
            ray.wait([self._send()], timeout=ANSWER_TIMEOUT_S)


@contextmanager
def shown(board: Any, progress: Progress, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Draws what the board holds, and tells it to stop, while the body runs."""
    done = threading.Event()
    question: Any = None

    def draw() -> None:
        nonlocal question
        question = question or board.take.remote()
        try:
            reports = ray.get(question, timeout=ANSWER_TIMEOUT_S)
        except TimeoutError:
            return  # its machine is busy: the answer may still come
        except ray.exceptions.RayError:
            reports = []  # it starts again
        question = None
        for name, *facts in reports:
            getattr(progress, name)(*facts)

    def watch() -> None:
        while not done.wait(REPORT_INTERVAL_S):
            if should_stop():
                # Again and again: a board that was started again has forgotten it.
                board.stop.remote()
            draw()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(2 * ANSWER_TIMEOUT_S)
        draw()
