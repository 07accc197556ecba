"""How a command of ``felrec`` ended; the fixture ``felrec`` runs one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Felrec = Callable[..., Ended]


def assert_failed(ended: Ended, error: str, *words: str) -> None:
    """One line says what failed, indented lines the rest; no traceback."""
    assert ended.code == 1
    assert ended.out == ""
    # Bars of what was done before may precede it.
    lines = ended.err[ended.err.index("error: ") :].splitlines()
    assert lines[0].startswith(f"error: {error}: ")
    assert all(line.startswith("  ") for line in lines[1:])
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err
