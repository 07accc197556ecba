"""The command ``felrec`` in the tests' own process."""

from __future__ import annotations

import pytest

from tests.launch.commands import Felrec, runner


@pytest.fixture
def felrec(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Felrec:
    """Runs the command in this process, as the console script does."""
    return runner(capfd, monkeypatch)
