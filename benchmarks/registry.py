"""The benchmarks by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from benchmarks.measure import Report

NAMES = ("loader", "encoder", "step", "end-to-end", "evaluate", "workers", "prepare")
# They measure shards, and know no device.
OF_SHARDS = ("cache", "growth")


def names() -> tuple[str, ...]:
    """Returns what can be run."""
    return (*NAMES, *OF_SHARDS)


def run(name: str, *, quick: bool, device: torch.device) -> Sequence[Report]:
    """Runs one benchmark."""
    module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
    reports: Sequence[Report] = (
        module.run(quick) if name in OF_SHARDS else module.run(quick, device)
    )
    return reports
