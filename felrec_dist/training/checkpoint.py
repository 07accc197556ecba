"""Checkpoints: consistent cuts of a run between two steps, on any fsspec URL.

::

    <run>/checkpoints/epoch-0003/                    after the epoch's validation
                          model.safetensors          parameters, queues, running statistics
                          optimizer.safetensors      momentum of each parameter
                          losses.safetensors         of the epoch's steps
                          tables-00000.safetensors   a rank's rows of the sharded tables
                          cache/*.arrow              a snapshot of each shard and table
                          manifest.json              written last: it makes the rest valid
                      epoch-0004-step-00000200/      after 200 training steps of the next epoch

The manifest lists size and SHA-256 of each of these files and the parts of the snapshot, and holds
the config, the digest of the data set, the position of the run, the metrics of all validations, the
time that training took, and a SHA-256 of itself. Within an epoch a snapshot may hold only what was
written since the cut before: then the manifest also names the parts of earlier checkpoints that it
goes on from, and they stay as long as it does. Random states are not stored because there are none:
dropout is a function of the event. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from cache_server import SnapshotPart
from felrec_dist.errors import CheckpointError, storage_errors
from felrec_dist.section import Section
from felrec_dist.storage import exists, json_sha256, write_whole
from felrec_dist.training.clock import TrainingCosts

FORMAT = "felrec-dist checkpoint"
VERSION = 3
MANIFEST = "manifest.json"
CACHE_FOLDER = "cache"
DENSE_FILES = ("model.safetensors", "optimizer.safetensors", "losses.safetensors")
_FOLDER = re.compile(r"epoch-(\d{4,})(?:-step-(\d{8,}))?")
_PART = re.compile(r"[\w.-]+/cache/[\w.-]+")
_TABLES = re.compile(r"tables-\d{5,}\.safetensors")
_GO_BACK = "remove this checkpoint and go back to an earlier one"

# A chain's deltas hold at most as many rows as its full snapshot, and its files stay few to open.
_MAX_CUTS_IN_CHAIN = 100


class CheckpointConfig(Section):
    """When checkpoints are taken, beside those at the end of each epoch."""

    every_steps: int | None = Field(
        None, ge=1, description="also after every so many training steps of an epoch"
    )
    keep: int = Field(2, ge=1, description="the newest so many stay, and the best epoch")
    on_stop: bool = Field(True, description="take one when the run is asked to stop in training")


@dataclass(frozen=True)
class BestEpoch:
    """The epoch with the lowest mean validation rank so far."""

    epoch: int
    validation_rank: float


@dataclass(frozen=True)
class RunPosition:
    """Where a run stands at a cut.

    Attributes:
        epoch: the epoch, from 0.
        steps: training steps of it that are done.
        is_validated: whether the epoch is over, trained and validated.
        global_step: training steps of all epochs.
        cache_step: step of the cache's life that comes next.
        next_position: position of the next event; the cache holds what all earlier ones wrote.
        best: the best epoch so far; None before the first validation.
    """

    epoch: int
    steps: int
    is_validated: bool
    global_step: int
    cache_step: int
    next_position: int
    best: BestEpoch | None

    def __post_init__(self) -> None:
        counts = (self.epoch, self.steps, self.global_step, self.cache_step, self.next_position)
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"{self}: a position is made of numbers from 0 on")

    @property
    def name(self) -> str:
        """The checkpoint's folder."""
        whole = f"epoch-{self.epoch:04d}"
        return whole if self.is_validated else f"{whole}-step-{self.steps:08d}"

    @property
    def first_epoch(self) -> int:
        """The epoch that a run goes on with."""
        return self.epoch + self.is_validated


@dataclass(frozen=True)
class SnapshotChain:
    """What a cut's cache is made of: a full snapshot and what was written since, oldest first.

    Attributes:
        parts: their paths begin at the folder of all checkpoints.
        next_position: the first position whose event wrote nothing to it.
    """

    parts: tuple[SnapshotPart, ...]
    next_position: int

    @property
    def wants_full(self) -> bool:
        """Whether the next snapshot should be a full one again."""
        written_since = sum(part.num_rows for part in self.parts if part.since is not None)
        in_full = sum(part.num_rows for part in self.parts if part.since is None)
        num_cuts = len({part.since for part in self.parts})
        return written_since >= in_full or num_cuts >= _MAX_CUTS_IN_CHAIN


@dataclass(frozen=True)
class TablePart:
    """Some rows of the sharded tables, as one rank wrote them: safetensors.

    Attributes:
        path: in the checkpoint's folder.
        first_rows: by table, the table's row that is the file's first.
        bytes, sha256: of the file.
    """

    path: str
    first_rows: dict[str, int]
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, verified; the cache's rows stay in storage, and are verified when restored.

    Attributes:
        url: its folder.
        position: of the run.
        config: as plain values.
        dataset_digest: of the data set.
        validation: metrics of each epoch's validation, as JSON.
        model, optimizer: by name.
        losses_nk: of the epoch's n steps so far, float64.
        chain: the cache.
        tables: the sharded tables; empty where there are none.
        costs: of the training so far, of the process that took the checkpoint.
    """

    url: str
    position: RunPosition
    config: dict[str, Any]
    dataset_digest: str
    validation: list[Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    losses_nk: Tensor
    chain: SnapshotChain
    tables: tuple[TablePart, ...]
    costs: TrainingCosts

    @property
    def cache_prefix(self) -> str:
        """Where the paths of the chain's parts begin."""
        return self.url.rpartition("/")[0]

    @property
    def training_loss(self) -> float:
        """Mean total loss of the epoch's steps so far."""
        return float(self.losses_nk.sum(dim=1).mean())


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run_url: str) -> None:
        self.url = f"{run_url.rstrip('/')}/checkpoints"

    def epoch_url(self, epoch: int) -> str:
        """Returns the folder of the checkpoint taken after an epoch's validation."""
        return f"{self.url}/epoch-{epoch:04d}"

    def url_of(self, position: RunPosition) -> str:
        """Returns the folder of the checkpoint taken at a position."""
        return f"{self.url}/{position.name}"

    def begin(self, position: RunPosition) -> str:
        """Clears what a killed run may have left of this checkpoint and returns its folder.

        The cache's snapshot goes to ``<folder>/cache``; ``commit`` then makes the checkpoint valid.

        Raises:
            StorageError: the folder cannot be made.
        """
        url = self.url_of(position)
        with storage_errors("a checkpoint cannot be begun", url):
            fs, path = fsspec.core.url_to_fs(url)
            if exists(fs, path):
                _remove(fs, path)
            fs.makedirs(f"{path}/{CACHE_FOLDER}", exist_ok=True)
        return url

    def commit(
        self,
        position: RunPosition,
        *,
        config: Mapping[str, Any],
        dataset_digest: str,
        validation: Sequence[Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        chain: SnapshotChain,
        tables: Sequence[TablePart],
        costs: TrainingCosts,
    ) -> None:
        """Writes the dense state, then the manifest.

        Args:
            position: of ``begin``.
            config, dataset_digest, validation, chain, tables, costs: as in ``Checkpoint``.
            tensors: of ``model``, ``optimizer`` and ``losses``.

        Raises:
            StorageError: a file cannot be written; there is no such checkpoint then.
        """
        url = self.url_of(position)
        files = []
        for name, by_name in tensors.items():
            content = safetensors.torch.save(
                {key: tensor.detach().cpu().contiguous() for key, tensor in by_name.items()}
            )
            file = f"{name}.safetensors"
            write_whole(f"{url}/{file}", content, "a checkpoint cannot be written")
            digest = hashlib.sha256(content).hexdigest()
            files.append({"path": file, "bytes": len(content), "sha256": digest})
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "position": asdict(position),
            "config": dict(config),
            "dataset_digest": dataset_digest,
            "validation": list(validation),
            "files": files,
            "cache_parts": [
                asdict(part) | {"path": posixpath.relpath(part.path, position.name)}
                for part in chain.parts
            ],
            "tables": [asdict(part) for part in tables],
            "costs": asdict(costs),
        }
        manifest["sha256"] = json_sha256(manifest)
        content = json.dumps(manifest, indent=1).encode()
        write_whole(f"{url}/{MANIFEST}", content, "a checkpoint cannot be written")

    def discard(self, position: RunPosition) -> None:
        """Removes, as far as the storage lets it, what a checkpoint left that was not committed."""
        with suppress(Exception):  # the error that made it fail says more
            fs, path = fsspec.core.url_to_fs(f"{self.url}/{position.name}")
            if not exists(fs, f"{path}/{MANIFEST}"):
                _remove(fs, path)

    def latest(self) -> str | None:
        """Returns the folder of the newest committed checkpoint; None where there is none.

        Raises:
            StorageError: the run's folder cannot be read.
        """
        with storage_errors("the checkpoints of a run cannot be listed", self.url):
            committed = self._committed()
        return f"{self.url}/{committed[-1]}" if committed else None

    def keep(self, num_newest: int, best: BestEpoch | None) -> None:
        """Removes all checkpoints but the newest and the best, and the parts no one names any more.

        Raises:
            StorageError: the storage refuses.
        """
        with storage_errors("old checkpoints cannot be removed", self.url):
            fs, path = fsspec.core.url_to_fs(self.url)
            committed = self._committed()
            kept = set(committed[-num_newest:])
            if best is not None:
                kept |= {f"epoch-{best.epoch:04d}"}.intersection(committed)
            named = {
                part.path
                for name in kept
                for part in _chain(_read_manifest(f"{self.url}/{name}"), name).parts
            }
            for name in _folders(fs, path) - kept:
                _remove(fs, f"{path}/{name}", named=named)

    def _committed(self) -> list[str]:
        """The names of all checkpoints that have a manifest, oldest first."""
        fs, path = fsspec.core.url_to_fs(self.url)
        fs.invalidate_cache()
        if not exists(fs, path):
            return []
        names = sorted(_folders(fs, path), key=_order)
        return [name for name in names if exists(fs, f"{path}/{name}/{MANIFEST}")]


def read_checkpoint(url: str, *, with_dense: bool = True) -> Checkpoint:
    """Reads and verifies a checkpoint's manifest and dense state.

    Args:
        url: the checkpoint's folder.
        with_dense: whether to read model, optimizer and losses; without, they are empty.

    Raises:
        CheckpointError: there is none, it was not committed, it is of another version, or a file
            differs from what the manifest says.
    """
    url = url.rstrip("/")
    manifest = _read_manifest(url)
    fs, path = fsspec.core.url_to_fs(url)
    try:
        files = {file["path"]: file for file in manifest["files"]}
        # By name: a manifest must not lead out of its folder.
        names = DENSE_FILES if with_dense else ()
        dense = {name: _read_dense(fs, path, url, files[name]) for name in names}
        position = dict(manifest["position"])
        best = position.pop("best")
        return Checkpoint(
            url=url,
            position=RunPosition(**position, best=None if best is None else BestEpoch(**best)),
            config=manifest["config"],
            dataset_digest=manifest["dataset_digest"],
            validation=manifest["validation"],
            model=dense["model.safetensors"] if with_dense else {},
            optimizer=dense["optimizer.safetensors"] if with_dense else {},
            losses_nk=dense["losses.safetensors"]["losses_nk"] if with_dense else torch.empty(0, 1),
            chain=_chain(manifest, url.rpartition("/")[2]),
            tables=tuple(_table_part(part) for part in manifest["tables"]),
            # Checkpoints of before there were costs have none.
            costs=TrainingCosts(**manifest.get("costs", {})),
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged_manifest(url, f"{type(error).__name__}: {error}") from error


def write_table_part(
    url: str, rank: int, rows: Mapping[str, Tensor], first_rows: Mapping[str, int]
) -> TablePart:
    """Writes this rank's rows of the sharded tables into a checkpoint's folder.

    Args:
        url: the folder, that ``CheckpointStore.begin`` made.
        rank: of this process.
        rows: tensors of equally many rows for each table, as ``<table>`` and ``<table>:<state>``.
        first_rows: by table, which of its rows is the first here.

    Raises:
        StorageError: the file cannot be written.
    """
    content = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in rows.items()}
    )
    path = f"tables-{rank:05d}.safetensors"
    write_whole(f"{url}/{path}", content, "a checkpoint cannot be written")
    return TablePart(path, dict(first_rows), len(content), hashlib.sha256(content).hexdigest())


def read_table_part(checkpoint_url: str, part: TablePart) -> dict[str, Tensor]:
    """Returns what ``write_table_part`` was given, verified.

    Raises:
        CheckpointError: the file is missing or differs from what the manifest says.
    """
    fs, path = fsspec.core.url_to_fs(checkpoint_url)
    return _read_dense(fs, path, checkpoint_url, asdict(part))


def _table_part(facts: Mapping[str, Any]) -> TablePart:
    # A manifest must not lead out of its folder.
    if not _TABLES.fullmatch(facts["path"]):
        raise KeyError(f"table part {facts['path']!r}")
    return TablePart(**facts)


def _read_manifest(url: str) -> dict[str, Any]:
    """Returns a manifest, verified."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
        fs.invalidate_cache()
        content = fs.cat_file(f"{path}/{MANIFEST}")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            "there is no committed checkpoint",
            where=url,
            got="no manifest.json",
            remedy="give a folder such as <run>/checkpoints/epoch-0003; "
            "one without a manifest was cut off while it was written",
        ) from error
    except Exception as error:  # each storage has errors of its own
        raise _unreadable(url, error) from error
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged_manifest(url, error) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            "this is not a checkpoint", where=f"{url}/{MANIFEST}", expected=f"format {FORMAT!r}"
        )
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            "the checkpoint is of another version",
            where=url,
            got=manifest.get("version"),
            expected=VERSION,
            remedy="read it with the felrec-dist that wrote it",
        )
    found = json_sha256({key: value for key, value in manifest.items() if key != "sha256"})
    if manifest.get("sha256") != found:
        raise _damaged_manifest(url, f"SHA-256 {found}, not the one it states")
    return manifest


def _chain(manifest: Mapping[str, Any], name: str) -> SnapshotChain:
    """Returns the chain of the checkpoint of that name, with paths from the folder of all."""
    parts = []
    for facts in manifest["cache_parts"]:
        path = posixpath.normpath(posixpath.join(name, facts["path"]))
        # A manifest must not lead out of the checkpoints' folder.
        if not _PART.fullmatch(path):
            raise KeyError(f"cache part {facts['path']!r}")
        parts.append(SnapshotPart(**{**facts, "path": path}))
    return SnapshotChain(tuple(parts), manifest["position"]["next_position"])


def _damaged_manifest(url: str, got: object) -> CheckpointError:
    return CheckpointError(
        "the manifest of a checkpoint is damaged",
        where=f"{url}/{MANIFEST}",
        got=got,
        remedy=_GO_BACK,
    )


def _unreadable(where: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        "a checkpoint cannot be read",
        where=where,
        got=f"{type(error).__name__}: {error}",
        remedy="check the address, the rights and the connection",
    )


def _folders(fs: Any, path: str) -> set[str]:
    """Returns the names of all checkpoint folders, committed or not; other names are not ours."""
    names = {name.rstrip("/").rpartition("/")[2] for name in fs.ls(path, detail=False)}
    return {name for name in names if _FOLDER.fullmatch(name)}


def _order(name: str) -> tuple[int, float]:
    """Epoch, then step; the end of an epoch comes after all of its steps."""
    match = _FOLDER.fullmatch(name)
    assert match is not None
    return int(match[1]), float(match[2] or "inf")


def _remove(fs: Any, path: str, named: Set[str] = frozenset()) -> None:
    """Removes a checkpoint, the manifest first: a half-removed one must not look whole.

    Args:
        fs, path: its folder.
        named: parts that other checkpoints need, from the folder of all checkpoints; they stay.
    """
    if exists(fs, f"{path}/{MANIFEST}"):
        fs.rm(f"{path}/{MANIFEST}")
    name = path.rpartition("/")[2]
    files = {file: f"{name}/{file[len(path) :].lstrip('/')}" for file in fs.find(path)}
    if named.isdisjoint(files.values()):
        fs.rm(path, recursive=True)
        return
    for file, part in files.items():
        if part not in named:
            fs.rm(file)


def _read_dense(fs: Any, path: str, url: str, file: Mapping[str, Any]) -> dict[str, Tensor]:
    where = f"{url}/{file['path']}"
    try:
        content = fs.cat_file(f"{path}/{file['path']}")
    except FileNotFoundError as error:
        raise CheckpointError(
            "a file of a checkpoint is missing", where=where, remedy=_GO_BACK
        ) from error
    except Exception as error:  # each storage has errors of its own
        raise _unreadable(where, error) from error
    if len(content) != file["bytes"]:
        raise CheckpointError(
            "a file of a checkpoint is truncated",
            where=where,
            got=f"{len(content)} bytes",
            expected=f"{file['bytes']} bytes",
            remedy=_GO_BACK,
        )
    found = hashlib.sha256(content).hexdigest()
    if found != file["sha256"]:
        raise CheckpointError(
            "a file of a checkpoint is damaged",
            where=where,
            got=f"SHA-256 {found}",
            expected=f"SHA-256 {file['sha256']}",
            remedy=_GO_BACK,
        )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise CheckpointError(
            "a file of a checkpoint is no safetensors file",
            where=where,
            got=error,
            remedy=_GO_BACK,
        ) from error
