"""Ctrl-C and SIGTERM: the first asks the run to stop at the end of a step, the second ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


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

    # Only the main thread may set handlers; elsewhere the caller has its own way to stop.
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
