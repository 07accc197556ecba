"""Fetch a public data set from its publisher, and believe only what can be checked.

A file under its final name is complete and checked: bytes go to ``<file>.<random>.part``, and only
a file of the right size and digest is renamed. Zip files stay as they are; ``felrec prepare`` reads
them.

Where the figures in ``PUBLIC_DATASETS`` come from:

- ml-100k, ml-1m, ml-20m, ml-25m: size and SHA-256 as TensorFlow Datasets records them
  (tensorflow/datasets, ``url_checksums/movielens.txt``).
- ml-10m: SHA-256 as OmniRec's MovieLens loader records it; size as several users report it.
- ml-32m: the MD5 that GroupLens publishes beside the file (``ml-32m.zip.md5``); size as several
  users report it.
- wikipedia: size and SHA-256 as one public course on temporal graphs records them; the publisher
  gives none.
- reddit, twitch-100k: nobody publishes a digest or an exact size. What arrived is checked against
  the length the server announced, and its SHA-256 is written beside it, so that a later change is
  noticed.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import socket
import ssl
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from felrec_dist.errors import DownloadError

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]
"""Called with the bytes received so far and the bytes in all (None where nobody says)."""

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class PublicDataset:
    """One file of one publisher.

    Attributes:
        url: of the file itself.
        page: what a person reads before using the data: origin, licence, citation.
        size_bytes: exact, or None where it is not known.
        digest: ``algorithm:hex``, or None where it is not known.
    """

    url: str
    page: str
    size_bytes: int | None = None
    digest: str | None = None

    @property
    def file_name(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name


def _movielens(version: str, size_bytes: int, digest: str) -> PublicDataset:
    return PublicDataset(
        url=f"https://files.grouplens.org/datasets/movielens/ml-{version}.zip",
        page=f"https://grouplens.org/datasets/movielens/{version}/",
        size_bytes=size_bytes,
        digest=digest,
    )


PUBLIC_DATASETS: dict[str, PublicDataset] = {
    "ml-100k": _movielens(
        "100k",
        4_924_029,
        "sha256:50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    ),
    "ml-1m": _movielens(
        "1m",
        5_917_549,
        "sha256:a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    ),
    "ml-10m": _movielens(
        "10m",
        65_566_137,
        "sha256:813c411ccb6122564edfe752e7f80c4dcc5aa25fa94c93622f6877a7ba252862",
    ),
    "ml-20m": _movielens(
        "20m",
        198_702_078,
        "sha256:96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
    ),
    "ml-25m": _movielens(
        "25m",
        261_978_986,
        "sha256:8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
    ),
    "ml-32m": _movielens("32m", 238_950_008, "md5:d472be332d4daa821edc399621853b57"),
    "twitch-100k": PublicDataset(
        url="https://datarepo.eng.ucsd.edu/mcauley_group/gdrive/twitch/100k_a.csv",
        page="https://cseweb.ucsd.edu/~jmcauley/datasets.html#twitch",
    ),
    "reddit": PublicDataset(
        url="https://snap.stanford.edu/jodie/reddit.csv",
        page="https://snap.stanford.edu/jodie/",
    ),
    "wikipedia": PublicDataset(
        url="https://snap.stanford.edu/jodie/wikipedia.csv",
        page="https://snap.stanford.edu/jodie/",
        size_bytes=559_937_473,
        digest="sha256:a6b73e09c0d1e5b9db11e7e7aa416f2e87838a745273e0446a79952cf4cfae09",
    ),
}


def download(
    name: str,
    folder: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    timeout_s: float = 60.0,
) -> Path:
    """Fetch a public data set into ``folder``, unless it is there already, and return its path.

    Args:
        name: a key of ``PUBLIC_DATASETS``.
        folder: made where it is missing.
        progress: called after each chunk; not called when nothing has to be fetched.
        timeout_s: how long the server may stay silent, at the start and between two chunks.

    Raises:
        DownloadError: the name is unknown, the server cannot be reached or answers with an error,
            what came is not what was published, or the file cannot be written.
    """
    dataset = PUBLIC_DATASETS.get(name)
    if dataset is None:
        raise DownloadError(
            "There is no public data set of this name",
            got=repr(name),
            expected=f"one of {', '.join(PUBLIC_DATASETS)}",
            remedy="choose one of these, or prepare files of your own",
        )
    target = Path(folder) / dataset.file_name
    if target.exists():
        _check_present(dataset, target)
        return target

    # A name of its own for every call: two processes that fetch into one folder do not mix bytes.
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _answer(dataset, target, timeout_s) as response:
            _fetch(dataset, response, target, part, progress, timeout_s)
        os.replace(part, target)
        _sync(target.parent)
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            "The downloaded file cannot be written",
            where=str(target),
            got=str(error),
            expected="a writable folder with enough space",
            remedy="make space, or name another folder",
        ) from error
    finally:
        if part.exists():
            part.unlink()
    return target


def _fetch(
    dataset: PublicDataset,
    response: http.client.HTTPResponse,
    target: Path,
    part: Path,
    progress: Progress | None,
    timeout_s: float,
) -> None:
    """Stream the answer to ``part`` and check it; on return it only lacks its final name."""
    announced_bytes = _announced_bytes(dataset, response, target)
    sha256 = hashlib.sha256()
    published = _hash(dataset)
    received_bytes = 0
    with part.open("xb") as file:
        for chunk in _chunks(dataset, response, target, timeout_s):
            file.write(chunk)
            sha256.update(chunk)
            published.update(chunk)
            received_bytes += len(chunk)
            if progress is not None:
                progress(received_bytes, announced_bytes)
        file.flush()
        os.fsync(file.fileno())

    if announced_bytes is not None and received_bytes != announced_bytes:
        raise DownloadError(
            "The download ended early",
            where=f"{dataset.url} after {received_bytes:,} bytes",
            got=f"{received_bytes:,} bytes",
            expected=f"{announced_bytes:,} bytes",
            remedy=f"run again; {_by_hand(dataset, target)}",
        )
    if dataset.digest is not None:
        _compare(
            dataset, published.hexdigest(), where=dataset.url, remedy=_by_hand(dataset, target)
        )
    else:
        # Written before the file gets its name, so that whoever sees the file can check it.
        _write_record(target, sha256.hexdigest())
        logger.warning(
            "%s: the publisher gives no digest: size checked only. SHA-256 %s is kept in %s",
            target.name,
            sha256.hexdigest(),
            _record(target).name,
        )


@contextmanager
def _answer(
    dataset: PublicDataset, target: Path, timeout_s: float
) -> Iterator[http.client.HTTPResponse]:
    """The server's answer, its headers read and its status good."""
    # Some servers turn Python's own agent away.
    request = urllib.request.Request(dataset.url, headers={"User-Agent": "felrec-dist"})
    try:
        response = urllib.request.build_opener().open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        raise DownloadError(
            "The server refuses the file",
            where=dataset.url,
            got=f"HTTP status {error.code} ({error.reason})",
            expected="HTTP status 200",
            remedy=f"see {dataset.page} whether it has moved; {_by_hand(dataset, target)}",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(dataset, target, error, timeout_s) from error
    with response:
        yield response


def _chunks(
    dataset: PublicDataset, response: http.client.HTTPResponse, target: Path, timeout_s: float
) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(dataset, target, error, timeout_s) from error
        if not chunk:
            return
        yield chunk


def _unreachable(
    dataset: PublicDataset, target: Path, error: Exception, timeout_s: float
) -> DownloadError:
    """The error that tells a machine without network from a server that is slow or down."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, socket.gaierror):
        what, got = "There is no network here, or the server has no address", str(cause)
    elif isinstance(cause, TimeoutError):
        what, got = "The server does not answer", f"silence for {timeout_s:g} s"
    elif isinstance(cause, ssl.SSLError):
        what, got = "The server cannot prove who it is", str(cause)
    elif isinstance(cause, ConnectionRefusedError):
        what, got = "No network to the server: the connection was refused", str(cause)
    else:
        what, got = "The connection failed", f"{type(cause).__name__}: {cause}"
    return DownloadError(
        what,
        where=dataset.url,
        got=got,
        expected="the file",
        remedy=f"run again with a network; {_by_hand(dataset, target)}",
    )


def _announced_bytes(
    dataset: PublicDataset, response: http.client.HTTPResponse, target: Path
) -> int | None:
    """The length to expect; refuses an answer that can be told to be wrong from its headers."""
    content_type = response.headers.get_content_type()
    if content_type == "text/html":
        raise DownloadError(
            "The server sends a web page in place of the file",
            where=dataset.url,
            got=f"content of type {content_type}",
            expected=dataset.file_name,
            remedy=f"a login page of the network may be in the way; {_by_hand(dataset, target)}",
        )
    header = response.headers.get("Content-Length")
    announced_bytes = int(header) if header is not None and header.isdecimal() else None
    if announced_bytes is None and dataset.size_bytes is None:
        raise DownloadError(
            "Nobody says how long the file is, so a part of it could pass for the whole",
            where=dataset.url,
            got="no Content-Length",
            expected="a Content-Length header",
            remedy=_by_hand(dataset, target),
        )
    if None not in (announced_bytes, dataset.size_bytes) and announced_bytes != dataset.size_bytes:
        raise DownloadError(
            "The server has another file than the one that was published",
            where=dataset.url,
            got=f"{announced_bytes:,} bytes",
            expected=f"{dataset.size_bytes:,} bytes",
            remedy=f"see {dataset.page} whether there is a new version",
        )
    return announced_bytes if announced_bytes is not None else dataset.size_bytes


def _check_present(dataset: PublicDataset, target: Path) -> None:
    """Check a file that is there already. One that is wrong is never overwritten."""
    remedy = f"move it away and run again; {_by_hand(dataset, target)}"
    size_bytes = target.stat().st_size
    if dataset.size_bytes is not None and size_bytes != dataset.size_bytes:
        raise DownloadError(
            "The file that is there is not the published one",
            where=str(target),
            got=f"{size_bytes:,} bytes",
            expected=f"{dataset.size_bytes:,} bytes",
            remedy=remedy,
        )
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: _hash(dataset)).hexdigest()
    if dataset.digest is not None:
        _compare(dataset, digest, where=str(target), remedy=remedy)
        return
    record = _record(target)
    if not record.exists():
        # Put there by hand: a fetched file gets its record before its name.
        _write_record(target, digest)
        logger.warning(
            "%s: not fetched by this program and the publisher gives no digest: taken as it is",
            target.name,
        )
        return
    recorded = (record.read_text(encoding="ascii").split() or [""])[0]
    if recorded != digest:
        raise DownloadError(
            "The file has changed since it was fetched",
            where=str(target),
            got=f"sha256:{digest}",
            expected=f"sha256:{recorded} ({record.name})",
            remedy=remedy,
        )


def _compare(dataset: PublicDataset, digest: str, *, where: str, remedy: str) -> None:
    got = f"{_algorithm(dataset)}:{digest}"
    if got != dataset.digest:
        raise DownloadError(
            "The content is not what was published",
            where=where,
            got=got,
            expected=dataset.digest,
            remedy=remedy,
        )


def _by_hand(dataset: PublicDataset, target: Path) -> str:
    return f"or fetch {dataset.url} by hand and put it at {target.absolute()}"


def _algorithm(dataset: PublicDataset) -> str:
    return "sha256" if dataset.digest is None else dataset.digest.partition(":")[0]


def _hash(dataset: PublicDataset) -> hashlib._Hash:
    # MD5 is refused on hardened systems unless it is said to guard nothing.
    return hashlib.new(_algorithm(dataset), usedforsecurity=False)


def _record(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _write_record(target: Path, sha256: str) -> None:
    # The format of sha256sum, so that `sha256sum -c` reads it.
    _record(target).write_text(f"{sha256}  {target.name}\n", encoding="ascii")


def _sync(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
