"""Checkpoints: one consistent cut of a run at the end of an epoch, on any fsspec URL.

::

    <run>/checkpoints/epoch-0003/model.safetensors       parameters, queues, running statistics
                                 optimizer.safetensors   momentum of each parameter
                                 cache/*.arrow           a snapshot of each shard and table
                                 manifest.json           written last: it makes the rest valid

The manifest lists size and SHA-256 of each dense file and the parts of the snapshot, and holds the
config, the digest of the data set, the position of the run, and a SHA-256 of itself. Random states
are not stored because none outlive a step: each step seeds its own stream from (seed, epoch, step,
rank). Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
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
_FOLDER = re.compile(r"epoch-(\d{4,})")
_GO_BACK = "remove this checkpoint and go back to an earlier one"


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
        training_loss: mean total loss of the epoch just done.
        best: the best epoch, this one included.
    """

    epochs_done: int
    global_step: int
    cache_step: int
    training_loss: float
    best: BestEpoch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, verified; the cache's rows stay in storage, and are verified when restored."""

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
            _remove(fs, path)
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
        manifest["sha256"] = _sha256_of(manifest)
        content = json.dumps(manifest, indent=1).encode()
        # One call writes the whole object; local files are moved into place: no half is ever seen.
        with fs.transaction:
            with fs.open(f"{path}/{MANIFEST}", "wb") as stream:
                stream.write(content)

    def latest(self) -> str | None:
        """Returns the folder of the newest committed checkpoint; None where there is none."""
        fs, path = fsspec.core.url_to_fs(self.url)
        fs.invalidate_cache()
        if not fs.exists(path):
            return None
        for epoch in sorted(_epochs_in(fs, path), reverse=True):
            url = self.epoch_url(epoch)
            if fs.exists(f"{path}/{url.rsplit('/', 1)[-1]}/{MANIFEST}"):
                return url
        return None

    def keep(self, epochs: set[int]) -> None:
        """Removes the checkpoints of all other epochs, their manifests first."""
        fs, path = fsspec.core.url_to_fs(self.url)
        for epoch in _epochs_in(fs, path) - epochs:
            _remove(fs, f"{path}/{self.epoch_url(epoch).rsplit('/', 1)[-1]}")


def read_checkpoint(url: str, *, with_dense: bool = True) -> Checkpoint:
    """Reads and verifies a checkpoint's manifest and dense state.

    Args:
        url: the checkpoint's folder.
        with_dense: whether to read model and optimizer; without, they are empty.

    Raises:
        CheckpointError: there is none, it was not committed, it is of another version, or a file
            differs from what the manifest says.
    """
    url = url.rstrip("/")
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    try:
        manifest = json.loads(fs.cat_file(f"{path}/{MANIFEST}"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            "there is no committed checkpoint",
            where=url,
            got="no manifest.json",
            remedy="give a folder such as <run>/checkpoints/epoch-0003; "
            "one without a manifest was cut off while it was written",
        ) from error
    except ValueError as error:
        raise _damaged_manifest(url, error) from error
    except OSError as error:
        raise CheckpointError(
            "a checkpoint cannot be read", where=url, got=f"{type(error).__name__}: {error}"
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
    found = _sha256_of(manifest)
    if manifest.get("sha256") != found:
        raise _damaged_manifest(url, f"SHA-256 {found}, not the one it states")
    try:
        files = manifest["files"] if with_dense else []
        dense = {file["path"]: _read_dense(fs, path, url, file) for file in files}
        position = dict(manifest["position"])
        return Checkpoint(
            url=url,
            position=RunPosition(**{**position, "best": BestEpoch(**position["best"])}),
            config=manifest["config"],
            dataset_digest=manifest["dataset_digest"],
            model=dense["model.safetensors"] if with_dense else {},
            optimizer=dense["optimizer.safetensors"] if with_dense else {},
            cache_parts=[SnapshotPart(**part) for part in manifest["cache_parts"]],
        )
    except (KeyError, TypeError) as error:
        raise _damaged_manifest(url, f"{type(error).__name__}: {error}") from error


def _damaged_manifest(url: str, got: object) -> CheckpointError:
    return CheckpointError(
        "the manifest of a checkpoint is damaged",
        where=f"{url}/{MANIFEST}",
        got=got,
        remedy=_GO_BACK,
    )


def _sha256_of(manifest: Mapping[str, Any]) -> str:
    """Returns the digest of all that a manifest holds, but for the digest it states."""
    facts = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _epochs_in(fs: Any, path: str) -> set[int]:
    """Returns the epochs that have a folder, committed or not; other names are not ours."""
    names = (name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))
    matches = (_FOLDER.fullmatch(name) for name in names)
    return {int(match[1]) for match in matches if match}


def _remove(fs: Any, path: str) -> None:
    """Removes a checkpoint, the manifest first: a half-removed one must not look whole."""
    if fs.exists(f"{path}/{MANIFEST}"):
        fs.rm(f"{path}/{MANIFEST}")
    fs.rm(path, recursive=True)


def _read_dense(fs: Any, path: str, url: str, file: Mapping[str, Any]) -> dict[str, Tensor]:
    where = f"{url}/{file['path']}"
    try:
        content = fs.cat_file(f"{path}/{file['path']}")
    except FileNotFoundError as error:
        raise CheckpointError(
            "a file of a checkpoint is missing", where=where, remedy=_GO_BACK
        ) from error
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
