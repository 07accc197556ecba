"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

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
