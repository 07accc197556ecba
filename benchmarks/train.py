"""Training events a second: all of this project against a straightforward encoder on a tensor."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from benchmarks.measure import Figure, Ratio, Report, alternate
from benchmarks.plain_tensor import PlainTensor
from benchmarks.training_side import (
    SeededRows,
    TrainingSide,
    cached_representations,
    in_process_client,
    plain_tensor,
    training_side,
)
from benchmarks.workloads import NAMES, Workload, workload
from felrec_dist.model.encoder import EncoderConfig
from felrec_dist.training.representations import Representations
from felrec_dist.training.world import World

OURS, BFLOAT16, REFERENCE = "ours", "ours, bfloat16", "straightforward on a tensor"
WARMUPS = 1


def run(quick: bool, device: torch.device) -> list[Report]:
    """MovieLens-100K and Globo, from the middle of their training parts."""
    return [measure(workload(name), quick, device) for name in NAMES]


def measure(work: Workload, quick: bool, device: torch.device) -> Report:
    """Steps through the same batches on both sides, one after the other."""
    batch_size, repeats = (64, 2) if quick else (1024, 3)
    world = World(0, 1, device)
    encoder = EncoderConfig()
    span = work.middle(WARMUPS + repeats, batch_size)
    seeded = SeededRows.of(work, span, encoder.width, encoder.history_length)
    with ExitStack() as stack:
        sides: dict[str, TrainingSide] = {}
        for name in (OURS, BFLOAT16, REFERENCE):
            rows: PlainTensor | Representations
            if name == REFERENCE:
                rows = plain_tensor(work, encoder.width, world, is_padded=True)
            else:
                client = stack.enter_context(in_process_client(1, encoder.width))
                rows = cached_representations(client, world)
                stack.callback(rows.close)
            seeded.fill(rows)
            sides[name] = stack.enter_context(
                training_side(
                    work,
                    span,
                    batch_size,
                    rows,
                    world,
                    is_straightforward=name == REFERENCE,
                    uses_bfloat16=name == BFLOAT16,
                )
            )
        seconds = alternate(
            {name: lambda side=side: side.run(1) for name, side in sides.items()},  # type: ignore[misc]
            repeats=repeats,
            warmups=WARMUPS,
        )
    figures = [
        Figure(work.name, name, batch_size / one_step, "events/s")
        for name, one_step in seconds.items()
    ]
    ratios = [
        Ratio(case, REFERENCE, seconds[REFERENCE] / seconds[name], "times faster")
        for case, name in ((work.name, OURS), (f"{work.name}, bfloat16", BFLOAT16))
    ]
    setting = {"B": batch_size, "N": 64, "D": 128, "L": 3, "model": "felrec-q"}
    return Report("train", setting, figures, ratios)
