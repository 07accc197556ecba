"""What a run told TensorBoard, read back from any fsspec URL."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
from fsspec.implementations.local import LocalFileSystem
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from felrec_dist.errors import storage_errors
from felrec_dist.storage import exists


@dataclass(frozen=True)
class Curve:
    """A scalar over the steps of a run.

    Attributes:
        steps: (n,) int64, training steps that were done; ascending.
        values: (n,) float64.
    """

    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    def mean_over(self, num_points: int) -> Curve:
        """Returns at most so many points, each the mean of its neighbours."""
        if len(self) <= num_points:
            return self
        starts = np.linspace(0, len(self), num_points, endpoint=False).astype(np.int64)
        counts = np.diff(np.append(starts, len(self)))
        return Curve(
            np.add.reduceat(self.steps, starts) // counts,
            np.add.reduceat(self.values, starts) / counts,
        )


def read_curves(run_url: str) -> Mapping[str, Curve]:
    """Returns every scalar of a run by its tag; nothing where the run logged none.

    What a run logged before it was stopped, and again after it went on, counts once.

    Raises:
        StorageError: the log cannot be read.
    """
    url = f"{run_url.rstrip('/')}/tensorboard"
    with storage_errors("the TensorBoard log of a run cannot be read", url):
        fs, path = fsspec.core.url_to_fs(url)
        fs.invalidate_cache()
        if not exists(fs, path):
            return {}
        with _on_this_machine(fs, path) as folder:
            log = EventAccumulator(folder, size_guidance={"scalars": 0})
            log.Reload()
            return {tag: _curve(log.Scalars(tag)) for tag in log.Tags()["scalars"]}


@contextmanager
def _on_this_machine(fs: Any, path: str) -> Iterator[str]:
    """Yields a local folder with the files: TensorBoard itself reads few kinds of storage."""
    if isinstance(fs, LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="felrec-report-") as folder:
        for file in fs.find(path):
            fs.get_file(file, f"{folder}/{file.rpartition('/')[2]}")
        yield folder


def _curve(events: Any) -> Curve:
    # A stop and a resume may log one step twice; the later one counts.
    values = {event.step: event.value for event in events}
    steps = np.array(sorted(values), dtype=np.int64)
    return Curve(steps, np.array([values[step] for step in steps], dtype=np.float64))
