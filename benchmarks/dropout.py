"""Dropout by event against torch's own, and behind a ReLU, one thread: ``python -m
benchmarks.dropout``.
"""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console

from benchmarks.measure import Figure, Ratio, Report, alternate
from felrec_dist.model.dropout import EventDropout, draw_factors, dropout_keys

EVENTS, SLOTS, WIDTH = 256, 64, 128
ONE_PASS, APART = "one pass", "one after the other"


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
    hidden_RF = torch.randn(EVENTS * SLOTS, 2 * WIDTH, requires_grad=True)
    gradient_RF = torch.randn(EVENTS * SLOTS, 2 * WIDTH)
    behind_relu = {
        ONE_PASS: lambda: torch.autograd.grad(
            layer(hidden_RF, keys_R, slot_R, relu=True), hidden_RF, gradient_RF
        ),
        APART: lambda: torch.autograd.grad(
            layer(hidden_RF.relu(), keys_R, slot_R), hidden_RF, gradient_RF
        ),
    }
    repeats = 3 if quick else 25
    seconds = alternate(sides, repeats=repeats)
    relu_seconds = alternate(behind_relu, repeats=repeats)
    torch.set_num_threads(num_threads)
    relu_case = f"ReLU and dropout of {EVENTS} x {SLOTS} x {2 * WIDTH}, forward and backward"
    case = f"dropout of {EVENTS} x {SLOTS} x {WIDTH}"
    theirs = seconds.pop("torch.nn.Dropout")
    return [
        Report(
            "dropout",
            {"threads": 1, "dtype": "float32"},
            [
                *(Figure(case, name, 1e3 * value, "ms") for name, value in seconds.items()),
                Figure(case, "torch.nn.Dropout", 1e3 * theirs, "ms"),
                *(
                    Figure(relu_case, name, 1e3 * value, "ms")
                    for name, value in relu_seconds.items()
                ),
            ],
            [
                Ratio(f"{case}, {name}", "torch.nn.Dropout", theirs / value, "times faster")
                for name, value in seconds.items()
            ]
            + [
                Ratio(
                    relu_case, APART, relu_seconds[APART] / relu_seconds[ONE_PASS], "times faster"
                )
            ],
        )
    ]


if __name__ == "__main__":
    for report in run():
        report.show(Console())
