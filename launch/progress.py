"""What a person watching a run sees: a bar with events/s and time left.

Where there is no terminal, lines.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_INTERVAL_S = 10.0


class TerminalProgress:
    """Reports of the trainer, drawn; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} events"),
            TextColumn("{task.fields[facts]}"),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._num_events = 0
        self._done = 0
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def begin(self, stage: str, num_events: int) -> None:
        if self._task is not None:
            self.bar.remove_task(self._task)
        self._stage, self._num_events, self._done = stage, num_events, 0
        self._began = self._last_line = time.monotonic()
        self._task = self.bar.add_task(stage, total=num_events, facts="")

    def advance(self, num_events: int, facts: Mapping[str, float]) -> None:
        self._done += num_events
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        words = f"{rate:,.0f} events/s"
        words += "".join(f", {name} {value:.4f}" for name, value in facts.items())
        if self._task is not None:
            self.bar.update(self._task, completed=self._done, facts=words)
        if not self.console.is_terminal and now - self._last_line >= LINE_INTERVAL_S:
            self._last_line = now
            left_s = (self._num_events - self._done) / max(rate, 1e-9)
            self.console.print(
                f"{self._stage}: {self._done:,}/{self._num_events:,} events, {words}, "
                f"{left_s:.0f} s left",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def say(self, line: str) -> None:
        # Paths may hold brackets, and a line that a program reads must stay one.
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def measure(self, scalars: Mapping[str, float]) -> None:
        """They are in TensorBoard."""
