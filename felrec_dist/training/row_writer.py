"""Sends the rows of each step to the shards, behind the training.

The shards' fence makes it exact: a fetch waits for the writes it needs, however late they leave.

Shape legend: M rows, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_server import CacheClient

# One is under way while the next step computes; more would only hide that shards cannot keep up.
_MAX_WAITING_STEPS = 2


@dataclass(frozen=True)
class RowWrite:
    """Rows of one side.

    Attributes:
        ids_M: distinct.
        positions_M: of the events that made the rows.
        rows_MD: in the storage type, on the model's device.
    """

    ids_M: npt.NDArray[np.int64]
    positions_M: npt.NDArray[np.int64]
    rows_MD: Tensor


class RowWriter:
    """Writes in a thread of its own, in the order of the steps.

    Args:
        client: of this thread alone.
        shards: the shards whose single writer this rank is.
    """

    def __init__(self, client: CacheClient, shards: tuple[int, ...]) -> None:
        self.client = client
        self._shards = shards
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="row-writer")
        self._waiting: deque[Future[None]] = deque()
        self._stream: torch.cuda.Stream | None = None

    def write(self, step: int, writes: Mapping[str, RowWrite]) -> None:
        """Takes a step's rows, by side, and returns before they are sent.

        Raises:
            CacheError: an earlier step's rows could not be written.
        """
        while self._waiting and (
            self._waiting[0].done() or len(self._waiting) >= _MAX_WAITING_STEPS
        ):
            self._waiting.popleft().result()
        ready = None
        device = next(iter(writes.values())).rows_MD.device
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
            ready = torch.cuda.Event()
            ready.record()
        self._waiting.append(self._executor.submit(self._send, step, writes, ready))

    def flush(self) -> None:
        """Waits until the shards have acknowledged everything.

        Raises:
            CacheError: as ``write``.
        """
        while self._waiting:
            self._waiting.popleft().result()
        self.client.flush()

    def close(self) -> None:
        """Ends the thread after the step under way."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _send(
        self, step: int, writes: Mapping[str, RowWrite], ready: torch.cuda.Event | None
    ) -> None:
        if ready is not None:
            assert self._stream is not None
            # A copy on the model's own stream would wait for the steps queued since.
            self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            tables = {
                side: (write.ids_M, write.positions_M, _to_numpy(write.rows_MD))
                for side, write in writes.items()
            }
        self.client.write_back(step, tables, shards=self._shards)


def _to_numpy(rows_MD: Tensor) -> npt.NDArray[np.floating]:
    if rows_MD.device.type == "cuda":
        rows_MD.record_stream(torch.cuda.current_stream(rows_MD.device))
    # NumPy has no bfloat16; the client stores the value again, which is exact.
    widened = rows_MD.float() if rows_MD.dtype == torch.bfloat16 else rows_MD
    array: npt.NDArray[np.floating] = widened.cpu().numpy()
    return array
