"""Dropout by event against torch's own, one thread: ``python -m benchmarks.dropout``."""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console

from benchmarks.measure import Figure, Ratio, Report, alternate
from felrec_dist.model.dropout import EventDropout, draw_factors, dropout_keys

EVENTS, SLOTS, WIDTH = 256, 64, 128


def run(quick: bool = False) -> list[Report]:
    """Masks and products for full histories of 256 events, float32."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keys_B = dropout_keys(0, 0, np.arange(EVENTS, dtype=np.int64))[0]
    keys_R, slot_R = keys_B.repeat_interleave(SLOTS), torch.arange(SLOTS).repeat(EVENTS)
    x_RD = torch.randn(EVENTS * SLOTS, WIDTH)
    layer, reference = EventDropout(0.1, place=0).train(), torch.nn.Dropout(0.1).train()
    sides = {
        "one compiled loop (CPU)": lambda: layer(x_RD, keys_R, slot_R),
        "torch operations (other devices)": lambda: (
            x_RD * draw_factors(keys_R, slot_R, 0, WIDTH, layer.threshold, x_RD.dtype)
        ),
        "torch.nn.Dropout": lambda: reference(x_RD),
    }
    seconds = alternate(sides, repeats=3 if quick else 25)
    torch.set_num_threads(num_threads)
    case = f"dropout of {EVENTS} x {SLOTS} x {WIDTH}"
    theirs = seconds.pop("torch.nn.Dropout")
    return [
        Report(
            "dropout",
            {"threads": 1, "dtype": "float32"},
            [
                *(Figure(case, name, 1e3 * value, "ms") for name, value in seconds.items()),
                Figure(case, "torch.nn.Dropout", 1e3 * theirs, "ms"),
            ],
            [
                Ratio(f"{case}, {name}", "torch.nn.Dropout", theirs / value, "times faster")
                for name, value in seconds.items()
            ],
        )
    ]


if __name__ == "__main__":
    for report in run():
        report.show(Console())
