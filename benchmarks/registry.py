"""The benchmarks by name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

import torch

from benchmarks.measure import Report

NAMES = ("loader", "encoder", "step", "end-to-end", "evaluate", "workers", "prepare")
# It measures shards, and knows no device.
CACHE = "cache"


def names() -> tuple[str, ...]:
    """Returns what can be run."""
    has_cache = importlib.util.find_spec(f"benchmarks.{CACHE}") is not None
    return (*NAMES, CACHE) if has_cache else NAMES


def run(name: str, *, quick: bool, device: torch.device) -> Sequence[Report]:
    """Runs one benchmark."""
    module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
    reports: Sequence[Report] = module.run(quick) if name == CACHE else module.run(quick, device)
    return reports
