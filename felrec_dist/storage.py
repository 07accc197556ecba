"""Files that are whole or not there, on any fsspec URL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from felrec_dist.errors import storage_errors


def write_whole(url: str, content: bytes, what: str) -> None:
    """Writes a file that appears under its name only when all of it is there.

    Args:
        url: of the file; its folder is made where it is missing.
        content: of the file.
        what: could not be done if this fails, one sentence.

    Raises:
        StorageError: it cannot be written. What was there under its name before still is, unless
            the storage took half of the file for the whole: that half is removed.
    """
    with storage_errors(what, url):
        fs, path = fsspec.core.url_to_fs(url)
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        if isinstance(fs, LocalFileSystem):
            _replace(Path(path), content)
            return
        with fs.transaction, fs.open(path, "wb") as file:
            file.write(content)
        fs.invalidate_cache()
        arrived = fs.size(path)
        if arrived != len(content):
            fs.rm_file(path)
            raise OSError(f"{arrived} of {len(content)} bytes arrived")


def check_names_one_folder(url: str) -> None:
    """Raises ValueError for a folder elsewhere than on a local disk that is named with a wildcard.

    fsspec takes one for a pattern when it removes a folder: ``s3://runs/[ab]`` would remove from
    ``s3://runs/a``.
    """
    if "://" in url and any(character in url for character in "*?["):
        raise ValueError("a folder that is not on a local disk is named without * ? [")


def exists(fs: Any, path: str) -> bool:
    """Whether there is a file or folder; fsspec's own takes any error for a no on many storages.

    A moment without connection must not make a run begin anew, or a whole checkpoint look cut off.
    """
    try:
        fs.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def json_sha256(facts: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of what JSON says, whatever its white space and the order of its keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Writes a local file beside its place and moves it there.

    fsspec's own transaction would write to the system's folder for temporary files, and a file that
    is moved to another disk is copied there: half of one if that disk is full.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
