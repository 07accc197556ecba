"""The command ``felrec`` in the tests' own process."""

from __future__ import annotations

import sys

import pytest

from launch.cli import main
from tests.launch.commands import Ended, Felrec


@pytest.fixture
def felrec(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Felrec:
    """Runs the command in this process, as the console script does."""

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
