"""A step hands its work to the device: it waits for no result, and loops over no event."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.stream import EventStream
from felrec_dist.model.dropout import dropout_keys
from felrec_dist.model.felrec import EncoderInputs, ModelConfig, build_model
from felrec_dist.model.packing import pack
from felrec_dist.training.loader import LoadedBatch
from felrec_dist.training.trainer import Trainer
from tests import tiny
from tests.ranks import run_on_ranks

aten = torch.ops.aten
READS_A_RESULT = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
}


class NoSynchronisation(TorchDispatchMode):
    """Forbids what makes the host wait for a GPU; that shows on a CPU as well.

    Indexing with a mask does too: how many elements it selects is a result.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function not in READS_A_RESULT, function
        if function in (aten.index.Tensor, aten.index_put_.default):
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            assert not masks, f"{function} with a mask"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["felrec-q", "felrec-p"])
@pytest.mark.parametrize("hot_rows", [0, 20, 1000])
@pytest.mark.parametrize("absent_row", ["zero", "identity"])
def test_nothing_waits_for_a_result(
    dataset: PreparedDataset, tmp_path: Path, variant: str, hot_rows: int, absent_row: str
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "model": {"variant": variant, "absent_row": absent_row},
        "cache": {"hot_rows": hot_rows},
    }
    config = tiny.experiment(dataset.url, str(tmp_path), changes)

    def step(trainer: Trainer, loaded: LoadedBatch) -> None:
        with NoSynchronisation():  # type: ignore[no-untyped-call]
            tiny.felrec_of(trainer).step(loaded, 0, 0.01)

    with tiny.build_trainer(config, dataset) as trainer:
        each_step(trainer, tiny.BATCH, step)


@pytest.mark.parametrize("variant", ["felrec-q", "felrec-p"])
def test_nothing_waits_for_a_result_between_ranks(
    dataset: PreparedDataset, tmp_path: Path, variant: str
) -> None:
    config = tiny.experiment(dataset.url, str(tmp_path), {"model": {"variant": variant}})
    run_on_ranks(2, tmp_path, forward_and_backward, config.felrec)


def forward_and_backward(config: ModelConfig) -> None:
    model = build_model(config).train()
    history_length = config.encoder.history_length
    lengths_B = np.arange(6) % (history_length + 1)
    packing = pack(lengths_B, history_length, 0)
    rows_BSD = torch.randn(len(lengths_B), history_length, config.encoder.width)
    keys_2B = dropout_keys(0, 0, np.arange(len(lengths_B)))
    inputs = EncoderInputs(rows_BSD, packing, rows_BSD, packing, dropout_keys_2B=keys_2B)
    with NoSynchronisation():  # type: ignore[no-untyped-call]
        model(inputs).loss.backward()


def test_calls_do_not_grow_with_the_batch(dataset: PreparedDataset, tmp_path: Path) -> None:
    """A loop over events, or over their ids, would call at least one function for each."""
    more_events = 120 - 40
    more_calls = calls_of_last_step(dataset, tmp_path, 120) - calls_of_last_step(
        dataset, tmp_path, 40
    )
    # Some more groups of lengths may be padded, and some rows not be wanted any more.
    assert more_calls < more_events, more_calls


def calls_of_last_step(dataset: PreparedDataset, folder: Path, batch_size: int) -> int:
    """Calls of Python and C functions in this thread."""
    counts: list[int] = []

    def step(trainer: Trainer, loaded: LoadedBatch) -> None:
        counts.append(0)

        def count(frame: object, event: str, argument: object) -> None:
            counts[-1] += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            tiny.felrec_of(trainer).step(loaded, 0, 0.01)
        finally:
            sys.setprofile(None)

    changes = {"data": {"batch_size": batch_size}}
    config = tiny.experiment(dataset.url, str(folder), changes)
    with tiny.build_trainer(config, dataset) as trainer:
        each_step(trainer, batch_size, step)
    return counts[-1]


def each_step(
    trainer: Trainer, batch_size: int, step: Callable[[Trainer, LoadedBatch], None]
) -> None:
    """Calls ``step`` with the batches of the training part."""
    stream = EventStream(trainer.dataset, tiny.felrec_of(trainer).train_span, batch_size)
    with tiny.felrec_of(trainer).loader.batches(stream, 0) as batches:
        for loaded in batches:
            step(trainer, loaded)
