"""``broken://``: a storage in memory that fails when, where and how a test says."""

from __future__ import annotations

import errno
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

Operation = Literal["look", "make", "remove", "read", "open", "write"]


def full() -> Exception:
    return OSError(errno.ENOSPC, "No space left on device")


def read_only() -> Exception:
    return OSError(errno.EROFS, "Read-only file system")


def forbidden() -> Exception:
    return PermissionError(errno.EACCES, "Permission denied")


def unreachable() -> Exception:
    return ConnectionError("the endpoint does not answer")


class EndpointConnectionError(Exception):
    """As that of botocore, which is no OSError."""


def strange() -> Exception:
    return EndpointConnectionError("could not connect to the endpoint")


def slow() -> Exception:
    time.sleep(0.05)
    return TimeoutError("the storage took too long")


@dataclass
class Fault:
    """What goes wrong.

    Attributes:
        operations: that fail.
        path: pattern of the paths where they do.
        error: makes what is raised; of a write, after half of it arrived. None: half arrives, and
            nobody says so.
        skip: so many times it goes well before.
        is_last: from then on nothing works any more, anywhere.
        num_met: how often it struck.
    """

    operations: tuple[Operation, ...]
    path: str
    error: Callable[[], Exception] | None
    skip: int = 0
    is_last: bool = False
    num_met: int = 0

    def strikes(self, operation: Operation, path: str) -> bool:
        if not (self.is_last and self.num_met):
            if operation not in self.operations or not re.search(self.path, path):
                return False
            self.skip -= 1
            if self.skip >= 0:
                return False
        self.num_met += 1
        return True


class BrokenFileSystem(MemoryFileSystem):
    """All files of the process, and the one fault that they have now."""

    protocol = "broken"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fault: ClassVar[Fault | None] = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("broken://")))

    def _meet(self, operation: Operation, path: str) -> None:
        if self.fault is not None and self.fault.strikes(operation, path):
            assert self.fault.error is not None
            raise self.fault.error()

    def info(self, path: str, **options: Any) -> Any:
        self._meet("look", path)
        return super().info(path, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._meet("look", path)
        return super().ls(path, detail, **options)

    def find(self, path: str, *args: Any, **options: Any) -> Any:
        self._meet("look", path)
        return super().find(path, *args, **options)

    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:
        self._meet("make", path)
        super().mkdir(path, create_parents, **options)

    def rm_file(self, path: str) -> None:
        self._meet("remove", path)
        super().rm_file(path)

    def cat_file(self, path: str, *args: Any, **options: Any) -> bytes:
        self._meet("read", path)
        return bytes(super().cat_file(path, *args, **options))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        with self.open(path, "wb") as file:
            file.write(value)

    def _open(self, path: str, mode: str = "rb", *args: Any, **options: Any) -> Any:
        self._meet("read" if mode == "rb" else "open", path)
        file = super()._open(path, mode, *args, **options)
        if mode != "rb":

            def write(data: Any) -> int:
                content = bytes(data)
                if self.fault is None or not self.fault.strikes("write", path):
                    return MemoryFile.write(file, content)
                MemoryFile.write(file, content[: len(content) // 2])
                if self.fault.error is not None:
                    raise self.fault.error()
                return len(content)

            file.write = write
        return file

    @classmethod
    def fill(cls, url: str, folder: Path) -> None:
        """Puts a copy of a local folder there."""
        root = cls._strip_protocol(url)
        for path in folder.rglob("*"):
            if path.is_file():
                name = f"{root}/{path.relative_to(folder).as_posix()}"
                cls.store[name] = MemoryFile(None, name, path.read_bytes())

    @classmethod
    def reset(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.fault = None

    @classmethod
    def digests(cls) -> dict[str, str]:
        """SHA-256 of each file."""
        return {
            f"broken:/{path}": hashlib.sha256(file.getvalue()).hexdigest()
            for path, file in cls.store.items()
        }


fsspec.register_implementation("broken", BrokenFileSystem, clobber=True)
