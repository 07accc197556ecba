"""What a run tells TensorBoard; names carry units."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from types import TracebackType
from typing import Self

import fsspec
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from cache_server import ShardStats
from felrec_dist.errors import StorageError, storage_errors
from felrec_dist.evaluation.result import (
    METRICS,
    OCCURRENCES,
    PAPER_METRICS,
    Metrics,
    occurrence_name,
)
from felrec_dist.training.representations import CacheTraffic

# An object store writes a file anew for every piece that is added to it.
WRITE_INTERVAL_S = 10.0


class RunLog:
    """Scalars of one run; ranks other than the first write nothing. Use as a context manager.

    Args:
        run_url: the run's folder.
        is_writer: whether this rank writes.
        steps_done: of a run that goes on; what it logged after them, before it was stopped, is
            hidden.
        listen: is told every scalar of the writer, too.

    Every method raises StorageError when the file cannot be written.
    """

    def __init__(
        self,
        run_url: str,
        *,
        is_writer: bool,
        steps_done: int = 0,
        listen: Callable[[Mapping[str, float]], None] = lambda scalars: None,
    ) -> None:
        self._listen = listen
        self._file = EventFile(f"{run_url.rstrip('/')}/tensorboard") if is_writer else None
        if self._file is not None and steps_done:
            # Steps are counted from 1 here: a scalar stands at the number of steps that were done.
            start = SessionLog(status=SessionLog.START)
            self._file.add([Event(step=steps_done + 1, session_log=start)])
            self._file.write()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            with suppress(StorageError):  # the error that ended the run says more
                self.close()

    def steps(
        self,
        global_step: int,
        *,
        losses: Mapping[str, float],
        chance_loss: float | None,
        learning_rate: float,
        gradient_norm: float,
        events_per_s: float,
        phase_seconds: Mapping[str, float],
        loader_seconds: Mapping[str, float],
        num_steps: int,
        traffic: CacheTraffic | None,
    ) -> None:
        """Logs means over the steps since the last call.

        ``wait`` is the trainer's wait for data and rows; the loader's phases run beside the others.
        Times are those of the first rank, the traffic is that of all ranks.
        """
        scalars = {
            "loss/total": sum(losses.values()),
            **{f"loss/{name}": loss for name, loss in losses.items()},
            "optimizer/learning_rate": learning_rate,
            "optimizer/gradient_norm": gradient_norm,
            "speed/train(events per s)": events_per_s,
        }
        if traffic is not None:
            scalars |= {
                "cache/read(rows per step)": traffic.read_rows / num_steps,
                "cache/hot_tier_hits(%)": 100.0 * traffic.hit_rate,
                "cache/fetched(rows per step)": traffic.fetched_rows / num_steps,
                "cache/fetch_messages(per step)": traffic.fetch_messages / num_steps,
                "cache/fetched(bytes per step)": traffic.fetched_bytes / num_steps,
                "cache/fetch_wait(ms per step)": 1000.0 * traffic.fetch_wait_s / num_steps,
                "cache/written(rows per step)": traffic.written_rows / num_steps,
                "cache/written(bytes per step)": traffic.written_bytes / num_steps,
                "cache/write_wait(ms per step)": 1000.0 * traffic.write_wait_s / num_steps,
                "exchange/gathered(bytes per step)": traffic.gathered_bytes / num_steps,
            }
        if chance_loss is not None:
            scalars |= {
                f"loss/{name}_below_chance(nats)": chance_loss - loss
                for name, loss in losses.items()
            }
        total = sum(phase_seconds.values())
        for phase, seconds in phase_seconds.items():
            if phase != "score":  # a phase of evaluation
                scalars[f"time_share/{phase}(%)"] = 100.0 * seconds / max(total, 1e-9)
        for phase, seconds in loader_seconds.items():
            scalars[f"loader/{phase}(ms per step)"] = 1000.0 * seconds / num_steps
        self._write(scalars, global_step)

    def cache(self, global_step: int, shards: Sequence[ShardStats]) -> None:
        """Logs rows and bytes of each table and shard."""
        self._write(
            {
                f"cache/{table}/{name}/shard_{shard.shard}": value
                for shard in shards
                for table, stats in shard.tables.items()
                for name, value in (
                    ("size(rows)", stats.num_rows),
                    ("size(bytes)", stats.nbytes),
                    ("spilled(bytes)", stats.spilled_bytes),
                )
            },
            global_step,
        )

    def checkpoint(self, global_step: int, seconds: float) -> None:
        """Logs how long all ranks stood still for a checkpoint."""
        self._write({"checkpoint/save(s)": seconds}, global_step)

    def evaluation(
        self, part: str, global_step: int, metrics: Mapping[str, Metrics], *, k: int
    ) -> None:
        """Logs the metrics of each partition that has events which were served.

        Where some were not, the tag ends in ``_served``.
        """
        names = {name: name if m.is_complete else f"{name}_served" for name, m in metrics.items()}
        self._write(
            {
                f"{part}/{kind.tag.format(k=k)}/{names[partition]}": kind.shown(m)
                for partition, m in metrics.items()
                if m.num_served
                for kind in METRICS.values()
            },
            global_step,
        )

    def occurrence(
        self, part: str, global_step: int, groups: Mapping[str, Sequence[Metrics]], *, k: int
    ) -> None:
        """Logs the paper's metrics of the events that are the k-th of their user, or item."""
        self._write(
            {
                f"{part}_by_occurrence/{kind.tag.format(k=k)}/{side} {occurrence_name(*bounds)}": (
                    kind.shown(m)
                )
                for side, metrics in groups.items()
                for bounds, m in zip(OCCURRENCES, metrics, strict=True)
                if m.num_served
                for kind in (METRICS[name] for name in PAPER_METRICS)
            },
            global_step,
        )

    def _write(self, scalars: Mapping[str, float], global_step: int) -> None:
        if self._file is not None:
            self._listen(scalars)
            self._file.add(
                [Event(step=global_step, summary=scalar(t, v)) for t, v in scalars.items()]
            )
            if self._file.seconds_since_write >= WRITE_INTERVAL_S:
                self._file.write()

    def close(self) -> None:
        if self._file is not None:
            self._file.write()


class EventFile:
    """A file of TensorBoard events on any fsspec URL.

    torch's ``SummaryWriter`` writes in a thread of its own; a storage that refuses ends that thread
    with a trace, and the run only when it next has something to log.
    """

    def __init__(self, folder: str) -> None:
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self.url = f"{folder}/{name}"
        with storage_errors("the TensorBoard log cannot be written", self.url):
            fs, path = fsspec.core.url_to_fs(folder)
            fs.makedirs(path, exist_ok=True)
        self._pending = BytesIO()
        self._records = RecordWriter(self._pending)
        self.add([Event(file_version="brain.Event:2")])
        self.write()

    @property
    def seconds_since_write(self) -> float:
        return time.monotonic() - self._written

    def add(self, events: Sequence[Event]) -> None:
        """Takes events, to be written with the next ``write``."""
        for event in events:
            event.wall_time = time.time()
            self._records.write(event.SerializeToString())

    def write(self) -> None:
        """Adds to the file what was taken since the last time."""
        with (
            storage_errors("the TensorBoard log cannot be written", self.url),
            fsspec.open(self.url, "ab") as file,
        ):
            file.write(self._pending.getvalue())
        self._pending.seek(0)
        self._pending.truncate()
        self._written = time.monotonic()
