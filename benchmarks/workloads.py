"""The interactions that benchmarks run on: real ones where they are, else synthetic ones.

``FELREC_DATA`` names the folder of ``ml-100k/u.data`` and ``globo-clicks.parquet``. Ids are made
dense, so that a plain tensor can be indexed by them; the prepared data live in a temporary folder
until the process ends.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.histories import HistoryReader
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource
from felrec_dist.data.stream import EventStream
from felrec_dist.data.synthetic import SyntheticConfig, synthesize

Int64s = npt.NDArray[np.int64]
Name = Literal["MovieLens-100K", "Globo"]
NAMES: tuple[Name, ...] = ("MovieLens-100K", "Globo")

# Beside the checkout, where the tests of real interactions look for them too.
DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"
# Long histories of few users, as MovieLens; short ones of many, as news.
SYNTHETIC = {
    "MovieLens-100K": SyntheticConfig(num_events=100_000, num_users=1_000, num_items=1_700),
    "Globo": SyntheticConfig(
        num_events=300_000, num_users=60_000, num_items=8_000, item_active_days=10.0
    ),
}


@dataclass(frozen=True)
class Workload:
    """A prepared data set with dense ids.

    Attributes:
        name: of what it is.
        dataset: keys are 0 to num_users - 1 and 0 to num_items - 1.
    """

    name: str
    dataset: PreparedDataset

    def middle(self, num_batches: int, batch_size: int) -> Span:
        """Whole batches in the middle of the training part, where histories have grown."""
        train = self.dataset.split.train
        start = (train.start + train.stop) // 2
        return Span(start, start + num_batches * batch_size)


@cache
def workload(name: Name) -> Workload:
    """Prepares a data set, once in a process."""
    folder = Path(_folder().name)
    raw = folder / f"{name}.parquet"
    columns = _real(name)
    title = name if columns is not None else f"synthetic in place of {name}"
    if columns is None:
        table = pq.read_table(synthesize(folder / "synthetic.parquet", SYNTHETIC[name]))
        columns = tuple(table[column].to_numpy() for column in ("user", "item", "timestamp"))
    user, item, timestamp = columns
    dense = {
        "user": np.unique(user, return_inverse=True)[1],
        "item": np.unique(item, return_inverse=True)[1],
        "timestamp": timestamp,
    }
    pq.write_table(pa.table(dense), raw)
    source = RawSource.parquet(
        str(raw), user="user", item="item", timestamp="timestamp", timestamp_unit="ms"
    )
    return Workload(title, prepare(source, str(folder / name), name=title))


def history_lengths(work: Workload, num_events: int, history_length: int) -> tuple[Int64s, Int64s]:
    """Returns the lengths of the user and of the item histories of events in the middle."""
    stream = EventStream(work.dataset, work.middle(1, num_events), num_events)
    batch, _ = next(stream.batches())
    users, items = HistoryReader(work.dataset, history_length).read(batch)
    return users.lengths_B, items.lengths_B


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="felrec-benchmark-")


def _real(name: Name) -> tuple[Int64s, ...] | None:
    """User, item and milliseconds of each event; None where the files are not."""
    folder = Path(os.environ.get("FELREC_DATA", DEFAULT_FOLDER))
    if name == "Globo":
        path = folder / "globo-clicks.parquet"
        if not path.exists():
            return None
        table = pq.read_table(path)
        return tuple(table[column].to_numpy() for column in ("user", "item", "timestamp_ms"))
    path = folder / "ml-100k" / "u.data"
    if not path.exists():
        return None
    table = pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(column_names=["user", "item", "rating", "seconds"]),
        parse_options=pyarrow.csv.ParseOptions(delimiter="\t"),
    )
    return (
        table["user"].to_numpy(),
        table["item"].to_numpy(),
        1000 * table["seconds"].to_numpy(),
    )
