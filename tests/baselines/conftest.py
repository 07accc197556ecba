"""Fixtures of these tests."""

from __future__ import annotations

from tests.training.conftest import one_thread

__all__ = ["one_thread"]
