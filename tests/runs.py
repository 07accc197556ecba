"""Whether two runs ended equal, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from cache_server.contents import snapshot_contents
from felrec_dist.config import parse_config
from felrec_dist.training.checkpoint import Checkpoint, CheckpointStore, read_checkpoint


def differences(first: str | Path, second: str | Path) -> list[str]:
    """Returns what differs between two runs that were trained to their end; nothing if they equal.

    Compared are the newest checkpoint and that of the best epoch (position, metrics of all
    validations, model, queues, optimizer, losses of the epoch's steps, cache), and the test.

    Args:
        first, second: the runs' folders.
    """
    stores = [CheckpointStore(str(url)) for url in (first, second)]
    newest = [read_checkpoint(store.latest() or "no checkpoint") for store in stores]
    found = _of_checkpoints("newest", *newest)
    best = [checkpoint.position.best for checkpoint in newest]
    if None not in best and best[0] == best[1]:
        checkpoints = [
            read_checkpoint(store.epoch_url(epoch.epoch))
            for store, epoch in zip(stores, best, strict=True)
            if epoch is not None
        ]
        found += _of_checkpoints("best", *checkpoints)
    return found + _of_tests(Path(first) / "evaluation", Path(second) / "evaluation")


def cache_digests(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Returns rows and digest of each table, of the whole chain."""
    config = parse_config(checkpoint.config, where=checkpoint.url)
    tables = config.cache_tables()
    contents = snapshot_contents(checkpoint.cache_prefix, checkpoint.chain.parts, tables)
    return {name: (table.total_rows, table.digest) for name, table in contents.items()}


def _of_checkpoints(which: str, a: Checkpoint, b: Checkpoint) -> list[str]:
    found = []
    if a.position != b.position:
        found.append(f"{which} position: {a.position}, {b.position}")
    if a.validation != b.validation:
        found.append(f"{which} validation metrics")
    found += _of_tensors(f"{which} model", a.model, b.model)
    found += _of_tensors(f"{which} optimizer", a.optimizer, b.optimizer)
    found += _of_tensors(f"{which} losses", {"nk": a.losses_nk}, {"nk": b.losses_nk})
    if (caches := (cache_digests(a), cache_digests(b)))[0] != caches[1]:
        found.append(f"{which} cache: {caches[0]}, {caches[1]}")
    return found


def _of_tensors(what: str, a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    if a.keys() != b.keys():
        return [f"{what}: {sorted(a.keys() ^ b.keys())}"]
    return [f"{what}: {name}" for name in a if not torch.equal(a[name], b[name])]


def _of_tests(a: Path, b: Path) -> list[str]:
    found = []
    if not pq.read_table(a / "test-causal.parquet").equals(
        pq.read_table(b / "test-causal.parquet")
    ):
        found.append("ranks of the test's events")
    reports = [json.loads((folder / "test-causal.json").read_text()) for folder in (a, b)]
    for key in ("epoch", "training_loss", "rows"):
        if reports[0][key] != reports[1][key]:
            found.append(f"test report: {key}")
    return found
