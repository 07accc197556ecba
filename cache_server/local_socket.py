"""A direct way to a process of the same node, for small messages: a Unix-domain socket. No Ray.

The socket lies in Linux's abstract namespace, so no file is left behind however a process ends.
Each connection carries one call at a time, and the kernel keeps messages apart (``SEQPACKET``), so
no length is read off the wire. Messages are JSON: nothing that was received is unpickled.

It is a faster way and never the only one: where it cannot be had, or breaks, it says only that, and
the call goes the other way.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import struct
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from cache_server.errors import (
    CacheError,
    CacheTimeoutError,
    FelrecError,
    ShardLostError,
    SnapshotError,
)

_NAME_PREFIX: Final = "felrec-shard-"
_BACKLOG = 1024

# Far more than a fetch of many tables needs, and less than what a socket takes at once.
_LONGEST_MESSAGE = 2**16

_LONGEST_POLL_MS = 2**31 - 1

# Until a process without a free file descriptor looks for one again.
_ACCEPT_AGAIN_S = 0.1

# Of SO_PEERCRED: process, user, group.
_PEER = struct.Struct("iII")

_ERRORS = {
    kind.__name__: kind for kind in (CacheError, CacheTimeoutError, ShardLostError, SnapshotError)
}


@dataclass(frozen=True)
class SocketAnswer:
    """How a call ended.

    Args:
        value: what was answered.
        error: what was raised instead.
    """

    value: bool = False
    error: Exception | None = None


class SocketServer:
    """Answers calls, each connection in a thread of its own: a call may wait as long as it likes.

    Args:
        answer: takes what was sent, as JSON has it, and returns the answer; what it raises is sent
            back. Several threads call it.

    Attributes:
        name: random; where the other processes of this user find it.

    Raises:
        OSError: the system has no such sockets.
    """

    def __init__(self, answer: Callable[[Any], bool]) -> None:
        self.name = _NAME_PREFIX + secrets.token_hex(16)
        self._answer = answer
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._is_closed = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(_path(self.name))
        self._listener.listen(_BACKLOG)
        threading.Thread(target=self._accept_all, name="accepts clients", daemon=True).start()

    def close(self) -> None:
        """Ends all connections, and with them their threads: at once, or after the answer that one
        is at.
        """
        with self._lock:
            self._is_closed = True
            for connection in self._connections:
                _shut_down(connection)
        _shut_down(self._listener)

    def _accept_all(self) -> None:
        with self._listener:
            while not self._is_closed:
                try:
                    connection, _ = self._listener.accept()
                except OSError:
                    time.sleep(_ACCEPT_AGAIN_S)
                else:
                    self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        with self._lock:
            if self._is_closed or _user_of(connection) != os.geteuid():
                connection.close()
                return
            self._connections.add(connection)
        try:
            threading.Thread(
                target=self._serve, args=(connection,), name="serves a client", daemon=True
            ).start()
        except RuntimeError:
            # The system has no thread to give; the client finds the other way.
            self._end(connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            # One byte more tells a message that is too long from one that just fits.
            while message := connection.recv(_LONGEST_MESSAGE + 1):
                _send(connection, self._reply(message))
        except OSError:
            # The client has ended, or gave the call up.
            pass
        finally:
            self._end(connection)

    def _end(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)
            connection.close()

    def _reply(self, message: bytes) -> dict[str, Any]:
        try:
            return {"value": self._answer(_decoded(message))}
        except Exception as error:
            return {"error": _error_to_fields(error)}


class SocketClient:
    """Calls one process; for any thread. It has as many connections as calls were ever under way
    at once; they end with its last reference.

    Args:
        name: of the ``SocketServer``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # Its methods are atomic.
        self._free: deque[_Connection] = deque()

    def call(self, fields: Any) -> SocketCall | None:
        """Sends what JSON can hold; returns without waiting. None if this way cannot be had now."""
        try:
            try:
                connection = self._free.pop()
            except IndexError:
                connection = _Connection(self._name)
            _send(connection.socket, fields)
        except OSError:
            return None
        return SocketCall(self, connection)


class SocketCall:
    """A call under way. Its connection serves another one only after the answer was taken; of a
    call that is given up, with the last reference, it is closed.
    """

    def __init__(self, client: SocketClient, connection: _Connection) -> None:
        self._client = client
        self._connection = connection

    def fileno(self) -> int:
        """The file descriptor that the answer comes to."""
        return self._connection.socket.fileno()

    def take(self) -> SocketAnswer | None:
        """The answer, once ``wait_for_answers`` says that it is there; for one time. None if the
        connection broke: the process has ended, or did not take the call. It ends no connection
        while it is at a call of it.
        """
        try:
            message = self._connection.socket.recv(_LONGEST_MESSAGE + 1)
        except OSError:
            message = b""
        if not message:
            return None
        try:
            answer = _answer_from_fields(_decoded(message))
        except (CacheError, KeyError, TypeError):
            # Another felrec-dist, perhaps.
            return None
        self._client._free.append(self._connection)
        return answer


def wait_for_answers(calls: Iterable[SocketCall], timeout_s: float) -> list[SocketCall]:
    """The calls whose answer is there or whose connection broke; waits for the first of them, for
    at most 24 days.
    """
    poll = select.poll()
    by_fd = {call.fileno(): call for call in calls}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    return [by_fd[fd] for fd, _ in poll.poll(min(1000 * timeout_s, _LONGEST_POLL_MS))]


class _Connection:
    """A connection to a process of this user.

    Raises:
        OSError: none listens under this name here.
    """

    def __init__(self, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        weakref.finalize(self, self.socket.close)
        # It is made at once or not at all; then it takes and gives whole messages.
        self.socket.setblocking(False)
        self.socket.connect(_path(name))
        if _user_of(self.socket) != os.geteuid():
            raise PermissionError("the socket is that of another user")


def _path(name: str) -> str:
    return f"\0{name}"


def _user_of(connection: socket.socket) -> int:
    """Who is at the other end."""
    option = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, uid, _ = _PEER.unpack(option)
    return int(uid)


def _shut_down(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        # The other end was faster.
        pass


def _send(connection: socket.socket, fields: Any) -> None:
    # Text may hold anything, also halves of a surrogate pair.
    message = json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")
    if len(message) > _LONGEST_MESSAGE:
        raise OSError(f"a message of {len(message)} bytes is too long")
    connection.send(message, socket.MSG_NOSIGNAL)


def _decoded(message: bytes) -> Any:
    try:
        if len(message) > _LONGEST_MESSAGE:
            raise ValueError(f"more than {_LONGEST_MESSAGE} bytes")
        return json.loads(message.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise CacheError(
            "A message on a local socket cannot be read.",
            got=error,
            expected=f"JSON of at most {_LONGEST_MESSAGE} bytes",
            remedy="Use the same felrec-dist in the client and in the shards.",
        ) from error


def _error_to_fields(error: Exception) -> dict[str, Any]:
    if not isinstance(error, FelrecError):
        place = traceback.extract_tb(error.__traceback__)[-1]
        error = CacheError(
            "A shard failed.",
            where=f"{place.filename}, line {place.lineno}",
            got=f"{type(error).__name__}: {error}",
        )
    return {
        "kind": type(error).__name__,
        "what": error.what,
        "facts": {
            "where": error.where,
            "got": error.got,
            "expected": error.expected,
            "remedy": error.remedy,
        },
    }


def _answer_from_fields(fields: Any) -> SocketAnswer:
    if "error" not in fields:
        return SocketAnswer(fields["value"])
    error = fields["error"]
    kind = _ERRORS.get(error["kind"], CacheError)
    return SocketAnswer(error=kind(error["what"], **error["facts"]))
