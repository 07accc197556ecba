"""The folder that a data set will be, local or remote, and how it comes there all at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from felrec_dist.data.dataset import FORMAT, MANIFEST, file_system
from felrec_dist.data.sources import Progress
from felrec_dist.errors import ConfigError, DatasetError, storage_errors
from felrec_dist.storage import check_names_one_folder, exists


class Target:
    """The output folder."""

    def __init__(self, out: str, storage_options: Mapping[str, Any]) -> None:
        self.out = out
        try:
            check_names_one_folder(out)
        except ValueError as error:
            raise ConfigError(
                "The output folder has an impossible name.",
                where="out",
                got=out,
                expected=error,
                remedy="give it another name",
            ) from error
        self.fs, root = file_system(out, storage_options)
        self.root = root.rstrip("/")
        self.local: Path | None = Path(self.root) if isinstance(self.fs, LocalFileSystem) else None

    def check_free(self, overwrite: bool, unfinished: Path | None = None) -> None:
        """Raise unless nothing is there, or a prepared data set that may be overwritten.

        Args:
            unfinished: a folder that this preparation was uploading when it was cut off: some of
                its files may be there.
        """
        with storage_errors("The output folder cannot be looked into.", self.out):
            entries = self._entries()
            if not entries or (unfinished is not None and self._is_part_of(unfinished)):
                return
        is_prepared = MANIFEST in entries and entries <= {
            MANIFEST,
            "events",
            "neighbours",
            "catalogue",
        }
        is_prepared = is_prepared and self._manifest().get("format") == FORMAT
        if overwrite and is_prepared:
            return
        raise DatasetError(
            "The output folder is taken.",
            where=self.out,
            got="a prepared data set" if is_prepared else ", ".join(sorted(entries)[:5]),
            expected="no such folder, or an empty one",
            remedy="give another folder, or replace it with --overwrite"
            if is_prepared
            else "give another folder: only a prepared data set is ever replaced",
        )

    def holds(self, sha256: str) -> bool:
        """Whether the data set with this ``dataset.json`` is in its place."""
        with storage_errors("The output folder cannot be looked into.", self.out):
            return MANIFEST in self._entries() and self._manifest().get("sha256") == sha256

    def recover(self) -> None:
        """Puts a data set back that a preparation was about to replace when it was killed."""
        if self.local is None or not self._replaced.exists():
            return
        with storage_errors("The output folder cannot be put back.", self.out):
            if self.local.exists():
                shutil.rmtree(self._replaced)
            else:
                self._replaced.rename(self.local)

    def publish(self, building: Path, progress: Progress) -> None:
        """Give the finished folder its name, or upload it, ``dataset.json`` last."""
        with storage_errors("The prepared data set cannot be put in its place.", self.out):
            if self.local is None:
                self._clear()
                self._upload(building, progress, keep_written=False)
                return
            if self.local.exists():
                self.local.rename(self._replaced)
            try:
                building.rename(self.local)
            except BaseException:
                if self._replaced.exists():
                    self._replaced.rename(self.local)
                raise
            shutil.rmtree(self._replaced, ignore_errors=True)

    def add(self, building: Path, progress: Progress) -> None:
        """Put files beside those that are there, ``dataset.json`` last, in the place of the old
        one."""
        with storage_errors("The appended events cannot be put in their place.", self.out):
            if self.local is None:
                self._upload(building, progress, keep_written=True)
            else:
                for file in _files(building):
                    # One file system: each rename is all or nothing.
                    os.replace(building / file, self.local / file)

    def remove(self, files: Iterable[str]) -> None:
        """Remove files that ``dataset.json`` no longer names."""
        with storage_errors("The files of before cannot be removed.", self.out):
            for file in files:
                with suppress(FileNotFoundError):
                    self.fs.rm_file(f"{self.root}/{file}")

    @property
    def _replaced(self) -> Path:
        assert self.local is not None
        return self.local.with_name(f".{self.local.name}.replaced")

    def _manifest(self) -> dict[str, Any]:
        with storage_errors("The output folder cannot be looked into.", self.out):
            content = self.fs.cat_file(f"{self.root}/{MANIFEST}")
        try:
            manifest = json.loads(content)
        except (ValueError, RecursionError):
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def _is_part_of(self, building: Path) -> bool:
        """Whether all that is there are files of a data set that is not whole."""
        if self.local is not None:
            return False  # a rename is whole
        found = {path.removeprefix(self.root).lstrip("/") for path in self.fs.find(self.root)}
        return MANIFEST not in found and found <= set(_files(building))

    def _entries(self) -> set[str]:
        self.fs.invalidate_cache()
        # Not exists(), which takes a storage that is not reached for an empty one.
        try:
            kind = self.fs.info(self.root)["type"]
        except (FileNotFoundError, NotADirectoryError):
            return set()
        if kind == "file":
            return {"a file"}
        names = self.fs.ls(self.root, detail=False)
        return {name.rstrip("/").rsplit("/", 1)[-1] for name in names} - {""}

    def _clear(self) -> None:
        if not self._entries():
            return
        if exists(self.fs, f"{self.root}/{MANIFEST}"):
            # Without this file the rest is no data set any more.
            self.fs.rm_file(f"{self.root}/{MANIFEST}")
        self.fs.rm(self.root, recursive=True)

    def _upload(self, building: Path, progress: Progress, keep_written: bool) -> None:
        files = _files(building)
        written: list[str] = []
        try:
            for number, file in enumerate(files):
                progress("upload", number, len(files))
                remote = f"{self.root}/{file}"
                written.append(remote)
                self.fs.put_file(str(building / file), remote)
            progress("upload", len(files), len(files))
        except BaseException:
            if not keep_written:
                self._remove(written)
            raise

    def _remove(self, written: list[str]) -> None:
        for path in written:
            # Not there, or not reached: without dataset.json nobody takes the rest for whole.
            with suppress(Exception):
                self.fs.rm_file(path)


def _files(building: Path) -> list[str]:
    """What to publish, the file that makes it valid last."""
    return sorted(
        (path.relative_to(building).as_posix() for path in building.rglob("*.*")),
        key=lambda path: (path == MANIFEST, path),
    )
