"""Ctrl-C and SIGTERM: the first asks the run to stop at the end of a step, the second ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import typer
from rich.console import Console

from felrec_dist.errors import RunStoppedError

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell gives a process that the signal ended."""
        return 128 + (self.signal or signal.SIGINT)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Puts both signals' handlers back when the body has replaced them, as ``ray.init`` does."""
    numbers = _STOP_SIGNALS if _is_main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if callable(handler):
                signal.signal(number, handler)


@contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Takes over both signals while the body runs.

    Args:
        say: tells a person that the first one was understood.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request():
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)
        say(f"{request.signal.name}: stopping at the end of a step; once more stops at once")

    # Elsewhere than in the main thread the caller has a way of its own to stop.
    numbers = _STOP_SIGNALS if _is_main_thread() else ()
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stoppable(console: Console) -> Iterator[StopRequest]:
    """Ends after Ctrl-C and SIGTERM with a word on how to go on; Typer itself would say none."""
    # A signal may come while rich loads its table of emoji, when asking it for one would fail.
    with stop_requests(partial(console.print, emoji=False)) as request:
        try:
            yield request
        except RunStoppedError as error:
            console.print(f"stopped; {error.got}\n{error.remedy}", highlight=False, soft_wrap=True)
            raise typer.Exit(request.exit_code) from None
        except KeyboardInterrupt:
            console.print("stopped at once; the last committed checkpoint stays")
            raise typer.Exit(request.exit_code) from None


def _is_main_thread() -> bool:
    """Only there may handlers be set."""
    return threading.current_thread() is threading.main_thread()
