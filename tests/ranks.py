"""Runs a function on the ranks of a gloo group: processes of this machine, no fixed port."""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, start_processes


class RankError(Exception):
    """A rank raised, or did not come to an end; the message names it."""


def run_on_ranks(
    world_size: int, folder: Path, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Returns what the function returned on each rank, in rank order.

    Args:
        world_size: W.
        folder: an existing folder for the rendezvous and the results.
        function: defined at the top of a module, so that it can be pickled, as its arguments.
        timeout_s: limit for all of it, the start of the processes included.

    Raises:
        RankError: of the rank that raised first; the others then fail only because of it.
    """
    meeting = folder / f"ranks-{time.monotonic_ns()}"
    meeting.mkdir()
    context = start_processes(
        _run_rank,
        args=(world_size, meeting, timeout_s, function, args),
        nprocs=world_size,
        join=False,
        start_method="spawn",
    )
    deadline = time.monotonic() + timeout_s
    try:
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                raise RankError(f"no end within {timeout_s} s of ranks {_missing(context)}")
    except ProcessException as error:
        failures = sorted(meeting.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        if not failures:  # killed, or it did not even start
            raise RankError(f"rank {error.error_index} died: {error}") from error
        rank = failures[0].name.removeprefix("error-")
        raise RankError(f"rank {rank} raised\n{failures[0].read_text()}") from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [pickle.loads((meeting / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _run_rank(
    rank: int,
    world_size: int,
    meeting: Path,
    timeout_s: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting / 'rendezvous'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        result = function(*args)
        (meeting / f"result-{rank}").write_bytes(pickle.dumps(result))
        # A rank that leaves early would fail the others' last collective.
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (meeting / f"error-{rank}").write_text(traceback.format_exc())
        raise


def _missing(context: Any) -> str:
    return ", ".join(str(rank) for rank, p in enumerate(context.processes) if p.is_alive())
