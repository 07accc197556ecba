"""Training events a second: all of this project against a straightforward encoder on a tensor."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection

import torch

from benchmarks.measure import Figure, Ratio, Report, alternate
from benchmarks.plain_tensor import PlainTensor
from benchmarks.training_side import (
    SeededRows,
    cached_representations,
    in_process_client,
    plain_tensor,
    training_side,
)
from benchmarks.workloads import NAMES, Workload, workload
from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.model.encoder import EncoderConfig
from felrec_dist.training.representations import Representations
from felrec_dist.training.world import World

OURS, BFLOAT16 = "ours", "ours, bfloat16"
REFERENCE, KEPT = "straightforward on a tensor", "straightforward, memory kept"
WARMUPS = 1
TIMEOUT_S = 300.0


def run(quick: bool, device: torch.device) -> list[Report]:
    """MovieLens-100K and Globo, from the middle of their training parts."""
    return [measure(workload(name), quick, device) for name in NAMES]


def measure(work: Workload, quick: bool, device: torch.device) -> Report:
    """Steps through the same batches on all sides, in turn."""
    batch_size, repeats = (64, 2) if quick else (1024, 3)
    span = work.middle(WARMUPS + repeats, batch_size)
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(_side_process(name, work, span, batch_size, device))
            for name in (OURS, BFLOAT16, REFERENCE, KEPT)
        }
        seconds = alternate(sides, repeats=repeats, warmups=WARMUPS)
    figures = [
        Figure(work.name, name, batch_size / one_step, "events/s")
        for name, one_step in seconds.items()
    ]
    ratios = [
        Ratio(case, reference, seconds[reference] / seconds[name], "times faster")
        for reference in (REFERENCE, KEPT)
        for case, name in ((work.name, OURS), (f"{work.name}, bfloat16", BFLOAT16))
    ]
    setting = {"B": batch_size, "N": 64, "D": 128, "L": 3, "model": "felrec-q"}
    return Report("end-to-end", setting, figures, ratios)


@contextmanager
def _side_process(
    name: str, work: Workload, span: Span, batch_size: int, device: torch.device
) -> Iterator[Callable[[], object]]:
    """Yields a call that trains one step in a process that has nothing else to do: memory that one
    side's tensors freed may not serve another's.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (theirs, name, work.name, work.dataset.url, span, batch_size, str(device))
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    theirs.close()  # so that its end is heard

    def step() -> object:
        ours.send(True)
        if not ours.poll(TIMEOUT_S):
            raise SystemExit(f"{name} took more than {TIMEOUT_S:g} s for a step")
        return ours.recv()

    try:
        if not ours.poll(TIMEOUT_S):
            raise SystemExit(f"{name} did not begin within {TIMEOUT_S:g} s")
        ours.recv()
        yield step
    finally:
        ours.close()
        process.join(TIMEOUT_S)


def _serve(
    pipe: Connection,
    name: str,
    data_name: str,
    data_url: str,
    span: Span,
    batch_size: int,
    device: str,
) -> None:
    """Trains one step for each message."""
    work = Workload(data_name, PreparedDataset.open(data_url))
    world = World(0, 1, torch.device(device))
    encoder = EncoderConfig()
    is_reference = name in (REFERENCE, KEPT)
    with ExitStack() as stack:
        rows: PlainTensor | Representations
        if is_reference:
            rows = plain_tensor(work, encoder.width, world, is_padded=True)
        else:
            client = stack.enter_context(in_process_client(1, encoder.width))
            rows = cached_representations(client, world)
            stack.callback(rows.close)
        SeededRows.of(work, span, encoder.width, encoder.history_length).fill(rows)
        side = stack.enter_context(
            training_side(
                work,
                span,
                batch_size,
                rows,
                world,
                is_straightforward=is_reference,
                uses_bfloat16=name == BFLOAT16,
                keeps_memory=name != REFERENCE,
            )
        )
        with suppress(EOFError):
            while True:
                pipe.send(None)
                pipe.recv()
                side.run(1)
