"""Seconds and bytes of snapshots of the cache: all rows, a delta of one row in a hundred, and the
restore of both.

::

    python benchmarks/snapshots.py --rows 1000000

One shard in process, D = 128 float32, files in a temporary folder of the local disk (``TMPDIR``
moves it). The files are written as far as the system's page cache and read from there.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import typer
from rich import print as rich_print
from rich.table import Table

from cache_server import CacheClient, InProcessTransport, SnapshotPart, TableSpec

WIDTH = 128
ROWS_A_STEP = 10_000
CHANGED = 0.01


@dataclass(frozen=True)
class Measurement:
    """One operation on a cache of ``num_rows``.

    Args:
        operation: what was measured.
        num_rows: rows of the cache.
        seconds: wall-clock time.
        num_bytes: size of the files written or read.
    """

    operation: str
    num_rows: int
    seconds: float
    num_bytes: int

    @property
    def millions(self) -> float:
        """Million rows of the cache."""
        return self.num_rows / 1e6


def measure(num_rows: int, folder: str) -> list[Measurement]:
    """Fills a cache, saves it twice under ``folder``, restores it and verifies what came back."""
    client = new_client()
    keys = np.random.default_rng(0).permutation(num_rows)
    step = write(client, 0, 0, keys)
    measurements: list[Measurement] = []

    def timed(
        operation: str, call: Callable[[], list[SnapshotPart] | None], read: int = 0
    ) -> list[SnapshotPart]:
        began = time.perf_counter()
        parts = call() or []
        seconds = time.perf_counter() - began
        num_bytes = read or sum(part.nbytes for part in parts)
        measurements.append(Measurement(operation, num_rows, seconds, num_bytes))
        return parts

    full = timed("full snapshot", lambda: client.snapshot(folder, step))
    step = write(client, step, num_rows, keys[: max(1, int(num_rows * CHANGED))])
    delta = timed("delta of 1 %", lambda: client.snapshot(folder, step, since=num_rows))
    chain = [*full, *delta]
    restored = new_client()
    timed(
        "restore of both",
        lambda: restored.restore(folder, chain, 1, step),
        sum(part.nbytes for part in chain),
    )
    if restored.digest() != client.digest():
        raise SystemExit("The restored cache differs from the one that was saved.")
    return measurements


def new_client() -> CacheClient:
    """An empty cache of one table."""
    return CacheClient(InProcessTransport({"item": TableSpec(WIDTH)}))


def write(client: CacheClient, step: int, position: int, keys: np.typing.NDArray[np.int64]) -> int:
    """Writes random rows of ``keys`` from ``position`` on; returns the next step."""
    generator = np.random.default_rng(step)
    for start in range(0, keys.size, ROWS_A_STEP):
        part = keys[start : start + ROWS_A_STEP]
        versions = position + start + np.arange(part.size)
        rows = generator.standard_normal((part.size, WIDTH), np.float32)
        client.write_back(step, {"item": (part, versions, rows)})
        step += 1
    return step


def show(measurements: list[Measurement]) -> None:
    """Prints a table."""
    table = Table(title=f"{measurements[0].num_rows:,} rows, D = {WIDTH} float32")
    table.add_column("operation")
    for column in ("seconds", "MB", "seconds a million rows", "MB a million rows"):
        table.add_column(column, justify="right")
    for m in measurements:
        table.add_row(
            m.operation,
            f"{m.seconds:.2f}",
            f"{m.num_bytes / 1e6:,.1f}",
            f"{m.seconds / m.millions:.3f}",
            f"{m.num_bytes / 1e6 / m.millions:,.1f}",
        )
    rich_print(table)


def main(
    rows: int = typer.Option(1_000_000, min=100, help="Rows of the cache."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Seconds and bytes of a full snapshot, a delta of 1 % of the rows, and their restore."""
    with tempfile.TemporaryDirectory() as folder:
        measure(1_000, folder)  # compiles what is not yet compiled
        measurements = measure(rows, folder)
    if as_json:
        print(json.dumps([asdict(m) for m in measurements], indent=1))
    else:
        show(measurements)


if __name__ == "__main__":
    typer.run(main)
