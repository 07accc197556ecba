"""The benchmarks by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from benchmarks.measure import Report

NAMES = ("loader", "encoder", "step", "end-to-end", "evaluate", "workers", "prepare")
# They measure shards and nodes, and know no device.
WITHOUT_DEVICE = ("cache", "growth", "nodes")


def names() -> tuple[str, ...]:
    """Returns what can be run."""
    return (*NAMES, *WITHOUT_DEVICE)


def run(name: str, *, quick: bool, device: torch.device) -> Sequence[Report]:
    """Runs one benchmark."""
    module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
    reports: Sequence[Report] = (
        module.run(quick) if name in WITHOUT_DEVICE else module.run(quick, device)
    )
    return reports
