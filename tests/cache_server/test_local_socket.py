"""Calls over a local socket: what comes back, who waits for whom, how a broken one is noticed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cache_server.errors import (
    CacheError,
    CacheTimeoutError,
    FelrecError,
    ShardLostError,
    SnapshotError,
)
from cache_server.local_socket import (
    SocketAnswer,
    SocketCall,
    SocketClient,
    SocketServer,
    wait_for_answers,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="such sockets are of Linux")

LIMIT_S = 20.0


class Script:
    """What a server does: ``wait`` waits for ``go_on``, a dictionary is an error, all else is kept
    and answered with whether it is true.
    """

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.seen: list[Any] = []

    def __call__(self, fields: Any) -> bool:
        if fields == "wait":
            return self.go_on.wait(LIMIT_S)
        if isinstance(fields, dict):
            raise MemoryError("none left")
        self.seen.append(fields)
        return bool(fields)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def server(script: Script) -> Iterator[SocketServer]:
    server = SocketServer(script)
    yield server
    script.go_on.set()
    server.close()
    wait_until(lambda: not server_threads())


@pytest.fixture
def client(server: SocketServer) -> SocketClient:
    return SocketClient(server.name)


def begin(client: SocketClient, fields: Any) -> SocketCall:
    call = client.call(fields)
    assert call is not None
    return call


def answer_of(call: SocketCall) -> SocketAnswer | None:
    assert wait_for_answers([call], LIMIT_S) == [call]
    return call.take()


def server_threads() -> list[threading.Thread]:
    names = ("accepts clients", "serves a client")
    return [thread for thread in threading.enumerate() if thread.name in names]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    "fields",
    [
        0,
        -(2**63),
        2**63 - 1,
        [1.5, None, [[]]],
        "",
        'user \U0001f600 \x00 \n " \\ \ud83d \udc00',
        "x" * (2**16 - 2),
    ],
)
def test_a_call_is_what_was_sent_and_the_answer_comes_back(
    fields: Any, client: SocketClient, script: Script
) -> None:
    assert answer_of(begin(client, fields)) == SocketAnswer(bool(fields))
    assert script.seen == [fields]
    assert type(script.seen[0]) is type(fields)


@pytest.mark.parametrize("kind", [CacheError, CacheTimeoutError, ShardLostError, SnapshotError])
@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"where": "shard 1", "got": 7, "expected": "\U0001f600" * 9000, "remedy": 'Do "this".'},
        {"got": "\n" * 9000, "expected": "\x00\ud800" * 9000, "where": '"\\' * 9000},
    ],
)
def test_an_error_comes_back_as_it_was_raised(kind: type[FelrecError], facts: Any) -> None:
    raised = kind("It failed.", **facts)

    def fail(fields: object) -> bool:
        raise raised

    server = SocketServer(fail)
    answer = answer_of(begin(SocketClient(server.name), 1))
    server.close()
    assert answer is not None
    assert type(answer.error) is kind
    # As Ray would have sent it.
    expected = pickle.loads(pickle.dumps(raised))
    assert str(answer.error) == str(expected)
    assert answer.error.__reduce__() == expected.__reduce__()


def test_an_error_of_another_kind_says_what_and_where(client: SocketClient) -> None:
    answer = answer_of(begin(client, {}))
    assert answer is not None
    assert type(answer.error) is CacheError
    with pytest.raises(
        CacheError,
        match=rf"shard failed(?s:.*){__name__.rpartition('.')[2]}.py, line \d+"
        r"(?s:.*)MemoryError: none left",
    ):
        raise answer.error
    assert answer_of(begin(client, 1)) == SocketAnswer(True), "the connection goes on"


@pytest.mark.parametrize(
    "garbage", [b"\xff\xfe", b"{", b"[" * 2**16, b"9" * 5000, b"2" + b" " * 2**16, b"x" * 100_000]
)
def test_garbage_is_refused_and_others_are_served(
    garbage: bytes, server: SocketServer, client: SocketClient, script: Script
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(LIMIT_S)
        stranger.connect(f"\0{server.name}")
        stranger.send(garbage)
        assert b"cannot be read" in stranger.recv(2**16)
        assert answer_of(begin(client, 1)) == SocketAnswer(True)
        stranger.send(b"2")
        assert stranger.recv(2**16) == b'{"value": true}'
    assert script.seen == [1, 2]


@pytest.mark.parametrize(
    "answer", [b"", b"{", b"7", b"{}", b'{"error": 7}', b'{"error": {"kind": "OSError"}}']
)
def test_an_answer_of_another_kind_is_none(
    answer: bytes, server: SocketServer, client: SocketClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *_, **__: answer.decode())
        assert answer_of(begin(client, "echoed by the patch")) is None
    assert answer_of(begin(client, 1)) == SocketAnswer(True)


def test_what_is_too_long_is_not_sent(client: SocketClient, script: Script) -> None:
    assert client.call("x" * (2**16 - 1)) is None
    assert answer_of(begin(client, 1)) == SocketAnswer(True)
    assert script.seen == [1]


def test_calls_wait_for_nobody_else(client: SocketClient, script: Script) -> None:
    waiting = [begin(client, "wait") for _ in range(3)]
    assert wait_for_answers(waiting, 0.05) == []
    quick = begin(client, 1)
    assert wait_for_answers([*waiting, quick], LIMIT_S) == [quick]
    assert quick.take() == SocketAnswer(True)
    script.go_on.set()
    for call in waiting:
        assert answer_of(call) == SocketAnswer(True)


def test_as_many_connections_as_calls_were_under_way(
    client: SocketClient, server: SocketServer
) -> None:
    for _ in range(20):
        first, second = begin(client, 1), begin(client, 0)
        assert answer_of(first) == SocketAnswer(True)
        assert answer_of(second) == SocketAnswer(False)
    assert len(server._connections) == 2
    del first, second
    client._free.clear()
    wait_until(lambda: not server._connections)


def test_a_given_up_call_answers_no_other(
    client: SocketClient, server: SocketServer, script: Script
) -> None:
    given_up = begin(client, "wait")
    assert wait_for_answers([given_up], 0.05) == []
    del given_up
    script.go_on.set()
    for _ in range(3):
        assert answer_of(begin(client, 0)) == SocketAnswer(False)
    wait_until(lambda: len(server._connections) == 1)


def test_threads_share_a_client(client: SocketClient, script: Script) -> None:
    def work(seed: int) -> None:
        for number in range(200):
            calls = [begin(client, value) for value in (seed, 0, [number])[: 1 + number % 3]]
            values = [answer_of(call) for call in calls]
            expected = [SocketAnswer(value) for value in (True, False, True)]
            assert values == expected[: len(values)]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(1, 5)))
    assert sum(fields == 0 for fields in script.seen) == 4 * 133


def test_closing_ends_connections_threads_and_name(script: Script) -> None:
    before = sockets()
    server = SocketServer(script)
    client = SocketClient(server.name)
    waiting = begin(client, "wait")
    assert answer_of(begin(client, 1)) == SocketAnswer(True)
    wait_until(lambda: len(server_threads()) == 3)
    assert server.name in Path("/proc/net/unix").read_text()
    assert not any(os.get_inheritable(fd) for fd in sockets() - before)
    server.close()
    assert answer_of(waiting) is None
    script.go_on.set()
    wait_until(lambda: not server_threads())
    assert client.call(1) is None
    assert client.call(1) is None, "with a new connection too"
    del client, waiting
    assert server.name not in Path("/proc/net/unix").read_text()


def sockets() -> set[int]:
    """The file descriptors of this process that are sockets."""
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(fd)
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(int(fd.name))
    return found


def test_a_client_lets_go_of_everything(server: SocketServer, script: Script) -> None:
    before = sockets()
    client = SocketClient(server.name)
    calls = [begin(client, fields) for fields in (1, "wait", 1)]
    assert answer_of(calls[0]) == SocketAnswer(True)
    # Three connections, at both ends.
    wait_until(lambda: len(sockets() - before) == 6)
    script.go_on.set()
    del calls, client
    wait_until(lambda: sockets() == before)


def test_other_users_are_refused_by_both_ends(
    server: SocketServer, client: SocketClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = os.geteuid() + 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: another)
        assert client.call(1) is None
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(LIMIT_S)
            stranger.connect(f"\0{server.name}")
            assert stranger.recv(100) == b""
    assert answer_of(begin(client, 1)) == SocketAnswer(True)


def test_where_nobody_listens_there_is_no_call() -> None:
    assert SocketClient("felrec-shard-none").call(1) is None


def test_a_server_that_accepts_nobody_is_not_waited_for() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("\0felrec-shard-test")
        listener.listen(1)
        client = SocketClient("felrec-shard-test")
        calls = [client.call(1) for _ in range(5)]
        assert calls[0] is not None
        assert calls[-1] is None, "no room for another one that waits"
        assert wait_for_answers([calls[0]], 0.05) == []


def test_without_a_thread_or_a_descriptor_the_server_lives_on(
    client: SocketClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        call = client.call(1)
        assert call is None or answer_of(call) is None
    accept, failures = socket.socket.accept, iter([OSError("too many open files")] * 2)

    def no_descriptor(self: socket.socket) -> Any:
        for failure in failures:
            raise failure
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", no_descriptor)
    for call in [begin(client, 1) for _ in range(3)]:
        assert answer_of(call) == SocketAnswer(True)
    assert list(failures) == []


_OTHER_PROCESS = """
import sys, time
from cache_server.local_socket import SocketServer
server = SocketServer(lambda fields: not time.sleep(fields))
print(server.name, flush=True)
sys.stdin.read()
"""


@contextmanager
def other_process() -> Iterator[tuple[SocketClient, int]]:
    """A client of a server that sleeps for as long as it is told, and the server's process."""
    command = [sys.executable, "-c", _OTHER_PROCESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            name = process.stdout.readline().decode().strip()
            yield SocketClient(name), process.pid
        finally:
            process.kill()


def test_a_killed_process_is_noticed_by_every_call() -> None:
    with other_process() as (client, pid):
        idle, waiting = begin(client, 0), begin(client, 60)
        assert answer_of(idle) == SocketAnswer(True)
        assert wait_for_answers([waiting], 0.05) == []
        os.kill(pid, signal.SIGKILL)
        assert answer_of(waiting) is None
        # Over a connection that was there, which may end a moment later, and over none.
        for _ in range(3):
            call = client.call(0)
            assert call is None or answer_of(call) is None


def test_a_stopped_process_is_waited_for_with_a_limit() -> None:
    with other_process() as (client, pid):
        assert answer_of(begin(client, 0)) == SocketAnswer(True)
        stop(pid)
        # Over a connection that is there, and over new ones.
        calls = [begin(client, 0) for _ in range(3)]
        assert wait_for_answers(calls, 0.2) == []
        os.kill(pid, signal.SIGCONT)
        for call in calls:
            assert answer_of(call) == SocketAnswer(True)


def stop(pid: int) -> None:
    """Stops a process, and waits until every thread of it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(
        lambda: all(
            stat.read_text().rpartition(")")[2].split()[0] == "T"
            for stat in Path(f"/proc/{pid}/task").glob("*/stat")
        )
    )
