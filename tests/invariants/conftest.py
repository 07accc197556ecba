"""Fixtures of these tests."""

from __future__ import annotations

from tests.training.conftest import no_spare_slots, one_thread

__all__ = ["no_spare_slots", "one_thread"]
