"""WholeBatchNorm, and the model on it: any cut of a batch over ranks gives what one rank gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from torch import nn

from felrec_dist.model import batchnorm
from felrec_dist.model.batchnorm import WholeBatchNorm
from felrec_dist.model.collective import gather_ranks, num_ranks, rank
from felrec_dist.model.felrec import build_model
from tests.model.inputs import encoder_inputs, model_config, normal, slice_inputs
from tests.ranks import run_on_ranks

D = 5
Arrays = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Case:
    """Rows of each rank, and the mean of the values."""

    rows: tuple[int, ...]
    mean: float = 0.0


CASES = {
    2: (Case((4, 4)), Case((5, 2)), Case((6, 0)), Case((0, 6)), Case((1, 1)), Case((5, 3), 1e6)),
    3: (Case((3, 3, 3)), Case((1, 0, 4)), Case((0, 0, 2)), Case((2, 5, 1), 1e6)),
}
# With the all-gathers of the normalisations of a step.
VARIANTS = (
    (model_config("felrec-q"), 2),
    (model_config("felrec-q", negatives="batch"), 2),
    (model_config("felrec-p"), 4),
    (model_config("felrec-q", projection="shared", type_embedding=False), 2),
    (model_config("felrec-p", projection="none"), 2),
    (model_config("felrec-p", projection="none", head_norm="layer"), 0),
)
BATCH = 6


def normalise(case: Case, norm: nn.BatchNorm1d) -> Arrays:
    """Two batches through the layer in training, one in evaluation, of this rank's rows."""
    stops = [0, *accumulate(case.rows)]
    mine = slice(stops[rank()], stops[rank() + 1]) if num_ranks() > 1 else slice(None)
    norm = norm.double()
    with torch.no_grad():
        norm.weight.copy_(normal(1, D))
        norm.bias.copy_(normal(2, D))
    results: Arrays = {}
    for batch in range(2):
        x_BD = normal(10 + batch, sum(case.rows), D) * torch.arange(1, D + 1) + case.mean
        x_bD = x_BD[mine].clone().requires_grad_()
        factors_bD = normal(20 + batch, sum(case.rows), D)[mine]
        y_bD = norm(x_bD)
        norm.zero_grad()
        (factors_bD * (y_bD + y_bD.square())).sum().backward()
        assert x_bD.grad is not None
        results |= {f"row/output{batch}": y_bD.detach().numpy()}
        results |= {f"row/gradient{batch}": x_bD.grad.numpy()}
        for name, parameter in norm.named_parameters():
            assert parameter.grad is not None
            results[f"sum/{name}{batch}"] = parameter.grad.clone().numpy()
    norm.eval()
    results |= {"row/evaluation": norm(x_bD).detach().numpy()}
    return results | {f"same/{k}": v.clone().numpy() for k, v in norm.named_buffers()}


def train_on_slice(variant: int) -> Arrays:
    """Loss and averaged gradients of one batch, each rank with its slice."""
    torch.manual_seed(0)
    config, _ = VARIANTS[variant]
    model = build_model(config).double()
    inputs = encoder_inputs(0, BATCH)
    size = BATCH // num_ranks()
    output = model(slice_inputs(inputs, rank() * size, (rank() + 1) * size))
    output.loss.backward()
    values = {"loss": output.loss.detach(), "user_loss": output.user_loss}
    values |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for value in values.values():
        if num_ranks() > 1:
            dist.all_reduce(value)
            value /= num_ranks()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {name: value.numpy() for name, value in (values | buffers).items()}


def num_gathers(variant: int) -> int:
    """All-gathers of the normalisations, forward and backward."""
    calls = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return gather_ranks(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batchnorm, "gather_ranks", counted)
        train_on_slice(variant)
    return len(calls)


def refusal() -> str:
    """What is said of a batch of one row."""
    with pytest.raises(ValueError, match="2 rows or more") as error:
        WholeBatchNorm(D)(torch.zeros(int(rank() == 0), D))
    return str(error.value)


def all_on_this_rank(world_size: int) -> dict[str, Any]:
    """Everything that is computed on W ranks, in one go: processes are slow to start."""
    results: dict[str, Any] = {"refusal": refusal()}
    for case in CASES[world_size]:
        results[str(case)] = normalise(case, WholeBatchNorm(D))
    for variant in range(len(VARIANTS)):
        results[f"variant {variant}"] = train_on_slice(variant)
    results["gathers"] = [num_gathers(variant) for variant in range(len(VARIANTS))]
    return results


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    kept: dict[int, list[dict[str, Any]]] = {}

    def get(world_size: int) -> list[dict[str, Any]]:
        if world_size not in kept:
            folder: Path = tmp_path_factory.mktemp("ranks")
            kept[world_size] = run_on_ranks(world_size, folder, all_on_this_rank, world_size)
        return kept[world_size]

    return get


@pytest.mark.parametrize(
    ("world_size", "case"),
    [(world_size, case) for world_size in CASES for case in CASES[world_size]],
    ids=str,
)
def test_is_the_batchnorm_of_the_whole_batch(
    world_size: int, case: Case, on_ranks: Callable[[int], list[dict[str, Any]]]
) -> None:
    expected = normalise(case, nn.BatchNorm1d(D))
    ranks = [results[str(case)] for results in on_ranks(world_size)]
    assert [len(results["row/output0"]) for results in ranks] == list(case.rows)
    # A sum of squares would be wrong by 1e-4 at a mean of 1e6; the input itself has 1e-10.
    tolerance = 1e-7 if case.mean else 1e-11
    for name, value in expected.items():
        parts = [results[name] for results in ranks]
        if name.startswith("row/"):
            found = np.concatenate(parts)
        elif name.startswith("sum/"):
            found = np.sum(parts, axis=0)
        else:
            for part in parts[1:]:
                np.testing.assert_array_equal(part, parts[0], err_msg=f"{name} differs by rank")
            found = parts[0]
        np.testing.assert_allclose(found, value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_the_models_gradient_is_that_of_one_rank(
    world_size: int, variant: int, on_ranks: Callable[[int], list[dict[str, Any]]]
) -> None:
    """FELRec-Q against its queue, against the batch, FELRec-P, and ablations of both."""
    expected = train_on_slice(variant)
    for results in on_ranks(world_size):
        found = results[f"variant {variant}"]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_ranks_meet_once_for_the_heads_of_both_sides(
    on_ranks: Callable[[int], list[dict[str, Any]]],
) -> None:
    expected = [num_gathers for _, num_gathers in VARIANTS]
    assert [results["gathers"] for results in on_ranks(2)] == [expected, expected]


def test_a_batch_of_one_row_is_refused_on_all_ranks(
    on_ranks: Callable[[int], list[dict[str, Any]]],
) -> None:
    said = [results["refusal"] for results in on_ranks(2)]
    assert said == ["batch normalisation needs 2 rows or more in the batch, got 1"] * 2


@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_one_rank_is_torchs_own(mean: float) -> None:
    case = Case((7,), mean)
    expected = normalise(case, nn.BatchNorm1d(D))
    for name, value in normalise(case, WholeBatchNorm(D)).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
