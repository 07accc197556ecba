from __future__ import annotations

import hashlib
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from felrec_dist.data import download as module
from felrec_dist.data.download import PUBLIC_DATASETS, PublicDataset, download
from felrec_dist.errors import DownloadError

# Longer than one chunk, and not a whole number of chunks.
BODY = bytes(range(256)) * 4096 * 2 + b"the end"
SHA256 = "sha256:" + hashlib.sha256(BODY).hexdigest()
NAME = "ml-100k"


class Publisher(BaseHTTPRequestHandler):
    """One behaviour a path."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        behaviour = urlsplit(self.path).path.strip("/").partition("/")[0]
        if behaviour == "missing":
            self.send_error(404)
            return
        if behaviour == "page":
            self.answer(b"<html>please log in</html>", content_type="text/html")
            return
        if behaviour == "unannounced":
            self.answer(BODY, announce=None)
            return
        if behaviour == "chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            # The length of the next chunk, then silence: the connection closes inside it.
            self.wfile.write(b"5\r\nhello\r\n1000\r\nabc")
            return
        if behaviour == "moved":
            self.send_response(302)
            self.send_header("Location", "/ok/file.zip")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if behaviour == "silent":
            self.server.released.wait(10)  # type: ignore[attr-defined]
            return
        if behaviour == "stalled":
            self.answer(BODY[:1000], announce=len(BODY))
            self.server.released.wait(10)  # type: ignore[attr-defined]
            return
        if behaviour == "truncated":
            self.answer(BODY[:-1], announce=len(BODY))
            return
        if behaviour == "changed":
            self.answer(BODY[:-1] + b"!")
            return
        assert behaviour == "ok", behaviour
        self.answer(BODY)

    def answer(
        self,
        body: bytes,
        *,
        announce: int | None = -1,
        content_type: str = "application/octet-stream",
    ) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        if announce is not None:
            self.send_header("Content-Length", str(len(body) if announce == -1 else announce))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Publisher)
        self.requests: list[str] = []
        self.released = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        # Clients that hang up are what these tests are about.
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join(10)
        assert not thread.is_alive()


def publish(
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    behaviour: str,
    *,
    size_bytes: int | None = len(BODY),
    digest: str | None = SHA256,
) -> PublicDataset:
    dataset = PublicDataset(
        url=f"http://127.0.0.1:{server.server_address[1]}/{behaviour}/file.zip",
        page="https://publisher.example/",
        size_bytes=size_bytes,
        digest=digest,
    )
    monkeypatch.setitem(PUBLIC_DATASETS, NAME, dataset)
    return dataset


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_table_names_real_files_over_https() -> None:
    assert list(PUBLIC_DATASETS) == [
        "ml-100k",
        "ml-1m",
        "ml-10m",
        "ml-20m",
        "ml-25m",
        "ml-32m",
        "twitch-100k",
        "reddit",
        "wikipedia",
    ]
    for name, dataset in PUBLIC_DATASETS.items():
        for url in (dataset.url, dataset.page):
            assert urlsplit(url).scheme == "https", name
            assert urlsplit(url).netloc, name
        assert re.fullmatch(r"[\w-]+\.(zip|csv)", dataset.file_name), name
        if dataset.digest is not None:
            algorithm, _, digest = dataset.digest.partition(":")
            length = {"md5": 32, "sha256": 64}[algorithm]
            assert re.fullmatch(rf"[0-9a-f]{{{length}}}", digest), name
            assert dataset.size_bytes is not None, name
        assert dataset.size_bytes is None or dataset.size_bytes > 1_000_000, name
    assert len({dataset.file_name for dataset in PUBLIC_DATASETS.values()}) == len(PUBLIC_DATASETS)
    assert len({dataset.url for dataset in PUBLIC_DATASETS.values()}) == len(PUBLIC_DATASETS)


@pytest.mark.parametrize("digest", [SHA256, "md5:" + hashlib.md5(BODY).hexdigest()])
@pytest.mark.parametrize("behaviour", ["ok", "moved", "unannounced"])
def test_a_good_file_is_fetched_once(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    behaviour: str,
    digest: str,
) -> None:
    publish(monkeypatch, server, behaviour, digest=digest)
    folder = tmp_path / "not" / "there" / "yet"
    calls: list[tuple[int, int | None]] = []
    path = download(NAME, folder, progress=lambda done, total: calls.append((done, total)))
    assert path == folder / "file.zip"
    assert path.read_bytes() == BODY
    assert names(folder) == ["file.zip"]
    assert calls[-1] == (len(BODY), len(BODY))
    assert len(calls) > 1
    assert calls == sorted(calls)

    requests = len(server.requests)
    calls.clear()
    assert download(NAME, folder, progress=lambda done, total: calls.append((done, total))) == path
    assert len(server.requests) == requests
    assert calls == []


@pytest.mark.parametrize(
    ("behaviour", "digest", "match"),
    [
        ("missing", SHA256, r"refuses the file(?s:.)*HTTP status 404"),
        ("page", SHA256, r"web page in place of the file(?s:.)*login page"),
        ("truncated", SHA256, r"ended early(?s:.)*got: 2,097,158 bytes(?s:.)*2,097,159 bytes"),
        ("truncated", None, r"ended early"),
        ("changed", SHA256, r"not what was published(?s:.)*got: sha256:(?s:.)*expected: sha256:"),
        ("changed", "md5:" + "0" * 32, r"not what was published(?s:.)*got: md5:"),
        ("chunked", SHA256, r"connection failed(?s:.)*IncompleteRead"),
        ("silent", SHA256, r"does not answer(?s:.)*silence for 0\.2 s"),
        ("stalled", SHA256, r"does not answer(?s:.)*silence for 0\.2 s"),
    ],
)
def test_a_bad_answer_leaves_nothing_behind(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    behaviour: str,
    digest: str | None,
    match: str,
) -> None:
    dataset = publish(monkeypatch, server, behaviour, digest=digest)
    started_s = time.monotonic()
    with pytest.raises(DownloadError, match=match) as caught:
        download(NAME, tmp_path, timeout_s=0.2)
    assert time.monotonic() - started_s < 5
    assert names(tmp_path) == []
    assert caught.value.where.startswith(dataset.url)
    assert f"fetch {dataset.url} by hand and put it at {tmp_path / 'file.zip'}" in (
        caught.value.remedy
    )


def test_a_server_that_announces_another_length_is_left_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(monkeypatch, server, "ok", size_bytes=len(BODY) + 1)
    calls: list[int] = []
    with pytest.raises(DownloadError, match=r"another file(?s:.)*2,097,159(?s:.)*2,097,160"):
        download(NAME, tmp_path, progress=lambda done, total: calls.append(done))
    assert calls == []
    assert names(tmp_path) == []


def test_a_file_of_unknown_length_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(monkeypatch, server, "unannounced", size_bytes=None, digest=None)
    with pytest.raises(DownloadError, match="Nobody says how long the file is"):
        download(NAME, tmp_path)
    assert names(tmp_path) == []


def test_no_network(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    publish(monkeypatch, server, "ok")

    def no_resolver(*args: object, **kwargs: object) -> object:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_resolver)
    with pytest.raises(DownloadError, match=r"no network here(?s:.)*by hand and put it at"):
        download(NAME, tmp_path)
    assert names(tmp_path) == []


def test_connection_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: Server
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, never listening
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file.zip"
        monkeypatch.setitem(PUBLIC_DATASETS, NAME, PublicDataset(url=url, page=url))
        with pytest.raises(DownloadError, match=r"No network to the server.*refused"):
            download(NAME, tmp_path, timeout_s=5)
    assert names(tmp_path) == []


def test_a_download_that_is_interrupted_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(monkeypatch, server, "ok")
    seen: list[list[str]] = []

    def interrupt(received_bytes: int, total_bytes: int | None) -> None:
        seen.append(names(tmp_path))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(NAME, tmp_path, progress=interrupt)
    # While it runs, and so after a kill that lets nothing clean up, only the part is there.
    assert len(seen) == 1
    assert re.fullmatch(r"file\.zip\.[0-9a-f]{8}\.part", "|".join(seen[0]))
    assert names(tmp_path) == []


def test_a_folder_that_is_a_file(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(monkeypatch, server, "ok")
    (tmp_path / "data").write_text("not a folder")
    with pytest.raises(DownloadError, match=r"cannot be written(?s:.)*data"):
        download(NAME, tmp_path / "data")


def test_a_file_without_digest_is_recorded_and_watched(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish(monkeypatch, server, "ok", size_bytes=None, digest=None)
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        path = download(NAME, tmp_path)
    assert "size checked only" in caplog.text
    assert names(tmp_path) == ["file.zip", "file.zip.sha256"]
    digest = SHA256.removeprefix("sha256:")
    assert (tmp_path / "file.zip.sha256").read_text() == f"{digest}  file.zip\n"

    caplog.clear()
    assert download(NAME, tmp_path) == path
    assert caplog.text == ""
    assert len(server.requests) == 1

    path.write_bytes(BODY[:-1] + b"!")
    with pytest.raises(DownloadError, match="has changed since it was fetched"):
        download(NAME, tmp_path)
    assert len(server.requests) == 1


def test_a_file_put_there_by_hand(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "file.zip"
    path.write_bytes(BODY)
    publish(monkeypatch, server, "ok")
    assert download(NAME, tmp_path) == path
    assert names(tmp_path) == ["file.zip"]

    publish(monkeypatch, server, "ok", size_bytes=None, digest=None)
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        assert download(NAME, tmp_path) == path
    assert "taken as it is" in caplog.text
    assert names(tmp_path) == ["file.zip", "file.zip.sha256"]
    assert server.requests == []


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (BODY[:-1], r"not the published one(?s:.)*2,097,158 bytes"),
        (BODY[:-1] + b"!", r"not what was published(?s:.)*move it away"),
    ],
)
def test_a_wrong_file_that_is_there_is_not_overwritten(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, match: str
) -> None:
    publish(monkeypatch, server, "ok")
    path = tmp_path / "file.zip"
    path.write_bytes(content)
    with pytest.raises(DownloadError, match=match):
        download(NAME, tmp_path)
    assert path.read_bytes() == content
    assert server.requests == []


def test_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"'ml-2m'(?s:.)*one of ml-100k, ml-1m"):
        download("ml-2m", tmp_path)
