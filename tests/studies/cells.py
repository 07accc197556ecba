"""Cells of a machine whose constants are known: what a study would measure there."""

from __future__ import annotations

import math
from typing import Any

from felrec_dist.config import parse_config
from felrec_dist.studies.config import Cell, Setting
from felrec_dist.studies.cost import Constants
from felrec_dist.studies.figures import CellFigures
from felrec_dist.studies.outcome import CellOutcome, Machine
from felrec_dist.training.hot_tier import SMALLEST_RESERVE

TRUTH = Constants(
    compute_step_s=2e-3,
    compute_event_s=1e-4,
    hot_row_s=1e-6,
    write_back_step_s=1e-3,
    write_back_event_s=3e-6,
    read_event_s=1e-6,
    history_event_s=2e-6,
    plan_row_s=5e-7,
    call_s=1e-4,
    message_s=3e-4,
    fetch_byte_s=2e-9,
    latency_s=5e-4,
    network_byte_s=1e-9,
    cache_row_bytes=160.0,
    checkpoint_s=0.25,
    checkpoint_byte_s=4e-9,
)
ROWS_PER_EVENT, WRITTEN_PER_EVENT = 3.0, 1.5
ROW_BYTES, KEY_BYTES, GATHERED_BYTES, GRADIENT_BYTES = 128, 9, 512, 400_000
CORES = 64


def figures(
    num_workers: int = 1,
    num_shards: int = 1,
    batch_size: int = 512,
    hot_rows: int = 0,
    cache_rows: int = 1_000_000,
    **changes: Any,
) -> CellFigures:
    """What a run measures where ``TRUTH`` holds, misses fall with the hot tier's share of the rows,
    and cores abound.
    """
    t = TRUTH
    b = batch_size / num_workers
    read = ROWS_PER_EVENT * b
    missed = read * (1.0 - min(1.0, 2 * (hot_rows + SMALLEST_RESERVE) / cache_rows))
    messages = num_shards if missed else 0
    fetch_wait_s = bool(missed) * t.call_s + messages * t.message_s
    fetch_wait_s += missed * (ROW_BYTES + KEY_BYTES) * t.fetch_byte_s
    gathered = (num_workers - 1) * batch_size * GATHERED_BYTES
    phase_s = {
        "wait": 0.0,
        "rows": read * t.hot_row_s,
        "encode": 0.4 * (t.compute_step_s + b * t.compute_event_s),
        "backward": 0.6 * (t.compute_step_s + b * t.compute_event_s)
        + 4 * math.log2(num_workers) * t.latency_s
        + 2 * (num_workers - 1) / num_workers * GRADIENT_BYTES * t.network_byte_s,
        "exchange": math.log2(num_workers) * t.latency_s
        + gathered / num_workers * t.network_byte_s,
        "write_back": t.write_back_step_s + batch_size * t.write_back_event_s,
    }
    values: dict[str, Any] = {
        "num_workers": num_workers,
        "num_shards": num_shards,
        "batch_size": batch_size,
        "hot_rows": hot_rows,
        "cores": CORES,
        "events_per_s": batch_size / sum(phase_s.values()),
        "phase_s": phase_s,
        "loader_s": {
            "data": batch_size * t.read_event_s,
            "histories": b * t.history_event_s,
            "fetch": read * t.plan_row_s + fetch_wait_s,
        },
        "read_rows": read * num_workers,
        "hit_rate": 1.0 - missed / read,
        "fetched_rows": missed * num_workers,
        "fetch_messages": messages * num_workers,
        "fetched_bytes": missed * num_workers * (ROW_BYTES + KEY_BYTES),
        "fetch_wait_s": fetch_wait_s,
        "written_rows": WRITTEN_PER_EVENT * batch_size,
        "written_bytes": WRITTEN_PER_EVENT * batch_size * (ROW_BYTES + 16),
        "gathered_bytes": gathered,
        "cache_rows": cache_rows,
        "cache_bytes": cache_rows * t.cache_row_bytes,
        "checkpoint_s": t.checkpoint_s
        + cache_rows * t.cache_row_bytes / num_shards * t.checkpoint_byte_s,
        "validation_rank": 0.3,
        "gradient_bytes": GRADIENT_BYTES,
        "row_bytes": ROW_BYTES,
    }
    return CellFigures(**{**values, **changes})


def outcome(measured: CellFigures | None = None, **settings: Setting) -> CellOutcome:
    """A cell with these settings; finished where it has figures."""
    chosen = {
        "cluster.num_workers": 1,
        "data.batch_size": 512,
        "synthetic.num_events": 1000,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    name = ",".join(f"{key}={value}" for key, value in chosen.items())
    tree = {
        "data": {"url": "data", "batch_size": chosen["data.batch_size"]},
        "run": {"url": f"study/cells/{name}"},
        "cluster": {"num_workers": chosen["cluster.num_workers"]},
    }
    cell = Cell(name, chosen, parse_config(tree, where="test"), None)
    if measured is None:
        return CellOutcome(cell, "not run", reason="2 of 8 CPU")
    return CellOutcome(cell, "finished", measured, Machine(1, 2, 0), 3.21, "2026-11-21")
