"""How a command of ``felrec`` is run in the tests' own process, and how it ended."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from launch.cli import main


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Felrec = Callable[..., Ended]


def runner(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Felrec:
    """Returns what runs the command as the console script does."""

    def run(*args: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["felrec", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        code = end.value.code or 0
        assert isinstance(code, int)
        out, err = capfd.readouterr()
        return Ended(code, out, err)

    return run


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
