"""Fixtures of these tests."""

from __future__ import annotations

# On a busy machine, threads that wait for one another cost more than tiny sums take.
from tests.training.conftest import one_thread

__all__ = ["one_thread"]
