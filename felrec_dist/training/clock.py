"""Where the time of a step goes, and how long steps and epochs take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STEP_PHASES = ("wait", "rows", "encode", "backward", "exchange", "write_back", "score")
LOADER_PHASES = ("data", "histories", "fetch")


class PhaseClock:
    """Seconds of wall time for each phase since the last ``take``.

    On a GPU a phase counts the time the host spends in it: kernels are launched in one phase and
    may be waited for in a later one.
    """

    def __init__(self, phases: tuple[str, ...] = STEP_PHASES) -> None:
        self._phases = phases
        self._seconds = dict.fromkeys(phases, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Returns the seconds of each phase and starts anew."""
        taken, self._seconds = self._seconds, dict.fromkeys(self._phases, 0.0)
        return taken


@dataclass(frozen=True)
class TrainingCosts:
    """Wall time of a training, as the process that trained it measured it.

    Attributes:
        step_seconds: median over the training steps; None where there were none.
        epoch_seconds: mean over the whole epochs without validation; None where there were none.
    """

    step_seconds: float | None = None
    epoch_seconds: float | None = None


class TrainingTimes:
    """Seconds of the training steps and epochs of this process.

    Steps are timed together, from one reading of the losses to the next: on a GPU only then is it
    sure that they are done.
    """

    def __init__(self) -> None:
        self._steps: list[float] = []
        self._epochs: list[float] = []

    def add_steps(self, num_steps: int, seconds: float) -> None:
        """Takes so many steps, one after the other, that took so long together."""
        self._steps += [seconds / num_steps] * num_steps

    def add_epoch(self, seconds: float) -> None:
        """Takes a whole epoch's training, without its validation."""
        self._epochs.append(seconds)

    def costs(self) -> TrainingCosts:
        """Returns what the steps and epochs so far have cost."""
        return TrainingCosts(
            statistics.median(self._steps) if self._steps else None,
            statistics.fmean(self._epochs) if self._epochs else None,
        )
