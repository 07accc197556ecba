"""Checkpoints: one consistent cut of a run at the end of an epoch, on any fsspec URL.

::

    <run>/checkpoints/epoch-0003/model.safetensors       parameters, queues, running statistics
                                 optimizer.safetensors   momentum of each parameter
                                 cache/*.arrow           a snapshot of each shard and table
                                 manifest.json           written last: it makes the rest valid

The manifest lists size and SHA-256 of each file, and holds the config, the digest of the data set and the position of
the run. Random states are not stored because none outlive a step: each step seeds its own stream from (seed, epoch,
step, rank). Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cache_server import SnapshotPart
from felrec_dist.errors import CheckpointError

FORMAT = "felrec-dist checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
CACHE_FOLDER = "cache"


@dataclass(frozen=True)
class BestEpoch:
    """The epoch with the lowest mean validation rank so far."""

    epoch: int
    validation_rank: float


@dataclass(frozen=True)
class RunPosition:
    """How far a run has come.

    Attributes:
        epochs_done: epochs trained and validated.
        global_step: training steps of all epochs.
        cache_step: step of the cache's life that comes next, after the validation.
        best: the best epoch, this one included.
    """

    epochs_done: int
    global_step: int
    cache_step: int
    best: BestEpoch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read whole and verified; the cache's rows stay in storage until restored."""

    url: str
    position: RunPosition
    config: dict[str, Any]
    dataset_digest: str
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    cache_parts: list[SnapshotPart]

    @property
    def cache_prefix(self) -> str:
        return f"{self.url}/{CACHE_FOLDER}"


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run_url: str) -> None:
        self.url = f"{run_url.rstrip('/')}/checkpoints"

    def epoch_url(self, epoch: int) -> str:
        """Returns the folder of the checkpoint taken after an epoch, counted from 0."""
        return f"{self.url}/epoch-{epoch:04d}"

    def begin(self, epoch: int) -> str:
        """Clears what a killed run may have left of this checkpoint and returns its folder.

        The cache's snapshot goes to ``<folder>/cache``; ``commit`` then makes the checkpoint valid.
        """
        url = self.epoch_url(epoch)
        fs, path = fsspec.core.url_to_fs(url)
        if fs.exists(path):
            # The manifest first: a half-removed checkpoint must not look whole.
            if fs.exists(f"{path}/{MANIFEST}"):
                fs.rm(f"{path}/{MANIFEST}")
            fs.rm(path, recursive=True)
        fs.makedirs(f"{path}/{CACHE_FOLDER}", exist_ok=True)
        return url

    def commit(
        self,
        epoch: int,
        *,
        position: RunPosition,
        config: Mapping[str, Any],
        dataset_digest: str,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        cache_parts: list[SnapshotPart],
    ) -> None:
        """Writes the dense state, then the manifest."""
        fs, path = fsspec.core.url_to_fs(self.epoch_url(epoch))
        files = []
        for name, tensors in (("model", model), ("optimizer", optimizer)):
            content = safetensors.torch.save(
                {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            )
            file = f"{name}.safetensors"
            fs.pipe_file(f"{path}/{file}", content)
            files.append(
                {
                    "path": file,
                    "bytes": len(content),
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
            )
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "position": asdict(position),
            "config": dict(config),
            "dataset_digest": dataset_digest,
            "files": files,
            "cache_parts": [asdict(part) for part in cache_parts],
        }
        content = json.dumps(manifest, indent=1).encode()
        # One call writes the whole object; local files are moved into place so that no half is ever seen.
        with fs.transaction:
            with fs.open(f"{path}/{MANIFEST}", "wb") as stream:
                stream.write(content)

    def latest(self) -> str | None:
        """Returns the folder of the newest committed checkpoint; None where there is none."""
        fs, path = fsspec.core.url_to_fs(self.url)
        fs.invalidate_cache()
        if not fs.exists(path):
            return None
        folders = sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))
        for folder in reversed(folders):
            if folder.startswith("epoch-") and fs.exists(f"{path}/{folder}/{MANIFEST}"):
                return f"{self.url}/{folder}"
        return None

    def keep(self, epochs: set[int]) -> None:
        """Removes the checkpoints of all other epochs, their manifests first."""
        fs, path = fsspec.core.url_to_fs(self.url)
        kept = {self.epoch_url(epoch).rsplit("/", 1)[-1] for epoch in epochs}
        for name in fs.ls(path, detail=False):
            folder = name.rstrip("/").rsplit("/", 1)[-1]
            if folder.startswith("epoch-") and folder not in kept:
                if fs.exists(f"{path}/{folder}/{MANIFEST}"):
                    fs.rm(f"{path}/{folder}/{MANIFEST}")
                fs.rm(f"{path}/{folder}", recursive=True)


def read_checkpoint(url: str) -> Checkpoint:
    """Reads and verifies a checkpoint's manifest and dense state.

    Raises:
        CheckpointError: there is none, it was not committed, it is of another version, or a file differs from what
            the manifest says.
    """
    url = url.rstrip("/")
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    try:
        manifest = json.loads(fs.cat_file(f"{path}/{MANIFEST}"))
    except FileNotFoundError as error:
        raise CheckpointError(
            "there is no committed checkpoint",
            where=url,
            got="no manifest.json",
            remedy="give a folder such as <run>/checkpoints/epoch-0003; "
            "one without a manifest was cut off while it was written",
        ) from error
    except ValueError as error:
        raise CheckpointError(
            "the manifest of a checkpoint is damaged", where=f"{url}/{MANIFEST}", got=error
        ) from error
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
    try:
        dense = {file["path"]: _read_dense(fs, path, url, file) for file in manifest["files"]}
        position = dict(manifest["position"])
        return Checkpoint(
            url=url,
            position=RunPosition(**{**position, "best": BestEpoch(**position["best"])}),
            config=manifest["config"],
            dataset_digest=manifest["dataset_digest"],
            model=dense["model.safetensors"],
            optimizer=dense["optimizer.safetensors"],
            cache_parts=[SnapshotPart(**part) for part in manifest["cache_parts"]],
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            "the manifest of a checkpoint is damaged",
            where=f"{url}/{MANIFEST}",
            got=f"{type(error).__name__}: {error}",
        ) from error


def _read_dense(fs: Any, path: str, url: str, file: Mapping[str, Any]) -> dict[str, Tensor]:
    where = f"{url}/{file['path']}"
    remedy = "go back to an earlier checkpoint"
    try:
        content = fs.cat_file(f"{path}/{file['path']}")
    except FileNotFoundError as error:
        raise CheckpointError(
            "a file of a checkpoint is missing", where=where, remedy=remedy
        ) from error
    if len(content) != file["bytes"]:
        raise CheckpointError(
            "a file of a checkpoint is truncated",
            where=where,
            got=f"{len(content)} bytes",
            expected=f"{file['bytes']} bytes",
            remedy=remedy,
        )
    found = hashlib.sha256(content).hexdigest()
    if found != file["sha256"]:
        raise CheckpointError(
            "a file of a checkpoint is damaged",
            where=where,
            got=f"SHA-256 {found}",
            expected=f"SHA-256 {file['sha256']}",
            remedy=remedy,
        )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise CheckpointError(
            "a file of a checkpoint is no safetensors file", where=where, got=error, remedy=remedy
        ) from error
