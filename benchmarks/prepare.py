"""Many events prepared in little memory, and one epoch of them read.

::

    felrec benchmark prepare

Each phase is a process of its own, so that its peak of memory is its own. That peak is of resident
pages, those of mapped neighbour files included, which the system takes back where others need them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import Figure, Report
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.histories import HistoryReader
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource
from felrec_dist.data.stream import EventStream
from felrec_dist.data.synthetic import SyntheticConfig, synthesize
from felrec_dist.errors import ConfigError

if TYPE_CHECKING:
    import torch  # a phase needs none, and it would count as its memory

NUM_EVENTS, NUM_USERS, NUM_ITEMS = 50_000_000, 1_000_000, 200_000
QUICK_SHARE = 250
MEMORY_LIMIT = "1GB"
BATCH_SIZE, HISTORY_LENGTH = 8192, 64
BYTES_PER_EVENT = 200
"""Of disk: the raw file, the sorted tables and the data set."""
LIMIT_S = 3600.0
_POLL_S = 0.2

PREPARE, STREAM, HISTORIES = "prepare", "stream", "stream and histories"


def run(quick: bool, device: torch.device) -> list[Report]:
    """Seconds, memory and disk of each phase; the device plays no part."""
    share = QUICK_SHARE if quick else 1
    config = SyntheticConfig(NUM_EVENTS // share, NUM_USERS // share, NUM_ITEMS // share)
    with tempfile.TemporaryDirectory(prefix="felrec-benchmark-") as name:
        folder = Path(name)
        free, needed = shutil.disk_usage(folder).free, config.num_events * BYTES_PER_EVENT
        if free < needed:
            raise ConfigError(
                "There is too little room for the events.",
                where=name,
                got=f"{free:,} bytes",
                expected=f"{needed:,} bytes",
                remedy="set TMPDIR to a folder with more room",
            )
        synthesize(folder / "raw.parquet", config)
        figures = []
        for phase in (PREPARE, STREAM, HISTORIES):
            seconds, peak_bytes, disk_bytes = _measure(phase, folder)
            figures.append(Figure(phase, "time", seconds, "s"))
            figures.append(Figure(phase, "events a second", config.num_events / seconds, "/s"))
            figures.append(Figure(phase, "peak memory", peak_bytes / 1e6, "MB"))
            if phase == PREPARE:
                figures.append(Figure(phase, "peak disk, with the result", disk_bytes / 1e9, "GB"))
        result = _size(folder / "data")
    figures.append(Figure("data set", "size", result / 1e9, "GB"))
    setting = {
        "events": f"{config.num_events:,}",
        "users": f"{config.num_users:,}",
        "items": f"{config.num_items:,}",
        "memory limit": MEMORY_LIMIT,
        "batch": BATCH_SIZE,
        "N": HISTORY_LENGTH,
    }
    return [Report("prepare", setting, figures)]


def _measure(phase: str, folder: Path) -> tuple[float, int, int]:
    """Seconds and the peak of memory of a phase, and the peak of what the folder held besides."""
    before, peak = _size(folder), 0
    deadline = time.monotonic() + LIMIT_S
    command = [sys.executable, "-m", "benchmarks.prepare", phase, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None and time.monotonic() < deadline:
                peak = max(peak, _size(folder) - before)
                time.sleep(_POLL_S)
        finally:
            process.kill()
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the phase {phase} failed, or took more than {LIMIT_S:.0f} s")
    measured = json.loads(said)
    return measured["seconds"], measured["peak_bytes"], peak


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # Files come and go.
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _work(phase: str, folder: Path) -> int:
    """Does the phase; returns how many events it has seen."""
    if phase == PREPARE:
        source = RawSource.parquet(
            folder / "raw.parquet",
            user="user",
            item="item",
            timestamp="timestamp",
            timestamp_unit="ms",
        )
        return prepare(
            source, folder / "data", name="synthetic", memory_limit=MEMORY_LIMIT
        ).num_events
    dataset = PreparedDataset.open(folder / "data")
    reader = HistoryReader(dataset, HISTORY_LENGTH) if phase == HISTORIES else None
    num_events = 0
    for batch, _ in EventStream(dataset, Span(0, dataset.num_events), BATCH_SIZE).batches():
        if reader is not None:
            reader.read(batch)
        num_events += len(batch)
    assert num_events == dataset.num_events, (num_events, dataset.num_events)
    return num_events


def _peak_bytes() -> int:
    # Not getrusage(), which knows of the process before exec, too.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell the peak of a process's memory")


def main(phase: str, folder: str) -> None:
    began = time.perf_counter()
    _work(phase, Path(folder))
    print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": _peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
