"""Forward and backward pass of the encoder at the paper's sizes, by the lengths of histories."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from benchmarks.measure import Figure, Ratio, Report, alternate
from benchmarks.straightforward import StraightforwardEncoder
from benchmarks.workloads import NAMES, Int64s, history_lengths, workload
from felrec_dist.model.dropout import dropout_keys
from felrec_dist.model.encoder import EncoderConfig, HistoryEncoder
from felrec_dist.model.packing import PADDED_ROWS_PER_GROUP, pack

OURS, REFERENCE = "ours", "straightforward"


def run(quick: bool, device: torch.device) -> list[Report]:
    """Uniform lengths, those of MovieLens-100K, those of Globo; both sides of each event."""
    batch_size = 64 if quick else 1024
    config = EncoderConfig()
    torch.manual_seed(0)
    encoder = HistoryEncoder(config).to(device).train()
    reference = StraightforwardEncoder(config).to(device).train()
    reference.load_state_dict(encoder.state_dict())

    figures, ratios = [], []
    for case, lengths_B in _lengths(batch_size, config.history_length).items():
        steps = _forward_and_backward(encoder, reference, lengths_B, device)
        seconds = alternate(steps, repeats=2 if quick else 5, warmups=1)
        figures += [Figure(case, side, 1e3 * s, "ms") for side, s in seconds.items()]
        speedup = seconds[REFERENCE] / seconds[OURS]
        ratios.append(Ratio(case, REFERENCE, speedup, "times faster"))
    setting = {"histories": batch_size, "N": 64, "D": 128, "L": 3, "dropout": config.dropout}
    return [Report("encoder", setting, figures, ratios)]


def _lengths(batch_size: int, history_length: int) -> dict[str, Int64s]:
    generator = np.random.default_rng(0)
    lengths = {"lengths 0 to 64": generator.integers(0, history_length + 1, batch_size)}
    for name in NAMES:
        work = workload(name)
        users_B, items_B = history_lengths(work, batch_size // 2, history_length)
        lengths[f"lengths of {work.name}"] = np.concatenate([users_B, items_B])
    return lengths


def _forward_and_backward(
    encoder: HistoryEncoder,
    reference: StraightforwardEncoder,
    lengths_B: Int64s,
    device: torch.device,
) -> dict[str, Callable[[], object]]:
    num_slots, width = encoder.history_length, encoder.positions_ND.shape[1]
    history_BND = torch.randn(len(lengths_B), num_slots, width, device=device)
    packing = pack(lengths_B, num_slots, PADDED_ROWS_PER_GROUP[device.type]).to(device)
    keys_B = dropout_keys(0, 0, np.arange(len(lengths_B)))[0].to(device)
    type_D = torch.zeros(width, device=device, requires_grad=True)

    def step(module: nn.Module) -> None:
        module.zero_grad()
        module(history_BND, packing, type_D, None, keys_B).square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return {OURS: lambda: step(encoder), REFERENCE: lambda: step(reference)}
