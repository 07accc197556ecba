"""Shards as Ray actors. With ``ray_metrics``, the only module of the package that imports Ray.

The driver creates the actors and hands the handles to the workers; each worker makes its own
``RayTransport`` of them. Another driver finds named ones with ``find_shard_actors``. An actor is
never restarted by Ray: it would come back empty and answer as if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import ray
from ray.exceptions import (
    ActorAlreadyExistsError,
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RaySystemError,
    RayTaskError,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cache_server.answer import ClientAnswer
from cache_server.errors import CacheError, CacheTimeoutError, ShardLostError
from cache_server.local_socket import (
    SocketCall,
    SocketClient,
    SocketServer,
    wait_for_answers,
)
from cache_server.messages import (
    Fence,
    FetchedRows,
    FetchRequest,
    ShardDigests,
    ShardStats,
    TableSpec,
    WriteBatch,
)
from cache_server.ray_metrics import ShardMetrics
from cache_server.service import ShardService
from cache_server.shard import DEFAULT_BLOCK_ROWS, CacheShard
from cache_server.shared_memory import (
    BufferPool,
    MappedBuffers,
    PrivateBuffer,
    SharedBuffer,
    can_share,
)
from cache_server.shared_messages import (
    SharedFetchRequest,
    SharedWrite,
    SharedWriteBatch,
    from_fields,
    share,
    to_fields,
)
from cache_server.snapshot import SnapshotPart
from cache_server.spill import Spill
from cache_server.transport import Pending, Reply

# A fetch that waits for the fence holds its thread. Writes have threads of their own, or the
# fetches would wait for ever; the fence is asked for when something hangs, so it must not queue
# behind anything.
_WRITE_THREADS = 2
_CONTROL_THREADS = 2
_FENCE_THREADS = 1

# What goes through shared memory where it can, and the method that takes it.
_SHARED = {"fetch": "fetch_shared", "write": "write_shared"}

# Who waits for sockets and for Ray looks at Ray this often. An error is noticed so much later; an
# answer is not late, because those of the sockets are waited for as well.
_LOOK_AT_RAY_S = 0.02

# An actor that was just ended keeps its name until Ray has noticed.
_NAME_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ShardHandles:
    """The shards of one cache, for any worker of the Ray cluster; picklable.

    Args:
        actors: the actor handle of each shard, in order.
        tables: what they hold.
        node_ids: the node of Ray that each shard is on; it never moves.
        sockets: the name of the local socket that each shard listens on, if it does.
    """

    actors: tuple[Any, ...]
    tables: Mapping[str, TableSpec]
    node_ids: tuple[str, ...] = ()
    sockets: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class CacheDescription:
    """What a shard knows of the cache that it is a part of.

    Args:
        num_shards: the number of shards.
        tables: what they hold.
        node_id: the node of Ray that the shard is on.
        socket: the name of the local socket that it listens on, if it does.
    """

    num_shards: int
    tables: Mapping[str, TableSpec]
    node_id: str
    socket: str | None


class ShardActor:
    """``ShardService`` in a process of its own; only assigns threads to methods."""

    def __init__(
        self,
        tables: Mapping[str, TableSpec],
        shard: int,
        num_shards: int,
        block_rows: int,
        spill: Spill | None,
        label: str,
    ) -> None:
        self._name = f"cache shard {shard} of {num_shards}"
        self._buffers = MappedBuffers()
        self._service = ShardService(
            CacheShard(
                tables, shard=shard, num_shards=num_shards, block_rows=block_rows, spill=spill
            ),
            can_wait=True,
        )
        socket = None
        if can_share():
            # Else every call goes through Ray.
            with suppress(OSError):
                socket = SocketServer(self._answer_directly).name
        self._metrics = ShardMetrics(self._service, label, shard)
        node_id = ray.get_runtime_context().get_node_id()
        self._description = CacheDescription(num_shards, tables, node_id, socket)

    def __repr__(self) -> str:
        return self._name

    @ray.method(concurrency_group="fence")
    def fence(self) -> Fence:
        return self._service.fence()

    @ray.method(concurrency_group="fence")
    def describe(self) -> CacheDescription:
        return self._description

    @ray.method(concurrency_group="fetch")
    def fetch(self, request: FetchRequest, wait_s: float) -> dict[str, FetchedRows]:
        return self._service.fetch(request, wait_s)

    @ray.method(concurrency_group="fetch")
    def fetch_shared(self, request: SharedFetchRequest, wait_s: float) -> bool:
        """``fetch`` into an answer of a client's; whether it could be mapped."""
        array = self._buffers.array(request.buffer)
        if array is None:
            return False
        self._service.fetch(request.to_plain(self._description.tables, array), wait_s)
        return True

    @ray.method(concurrency_group="write")
    def write(self, batch: WriteBatch, wait_s: float) -> None:
        self._service.write(batch, wait_s)

    @ray.method(concurrency_group="write")
    def write_shared(self, batch: SharedWriteBatch, wait_s: float) -> bool:
        """``write`` from a client's buffer; whether it could be mapped."""
        array = self._buffers.array(batch.buffer)
        if array is None:
            return False
        self._service.write(batch.to_plain(self._description.tables, array), wait_s)
        return True

    def _answer_directly(self, fields: Any) -> bool:
        """``fetch_shared`` or ``write_shared`` of a client on this node."""
        message, wait_s = from_fields(fields)
        if isinstance(message, SharedFetchRequest):
            return self.fetch_shared(message, wait_s)
        return self.write_shared(message, wait_s)

    @ray.method(concurrency_group="control")
    def clear(self, generation: int, step: int, wait_s: float) -> None:
        self._service.clear(generation, step, wait_s)

    @ray.method(concurrency_group="control")
    def digest(self, wait_s: float) -> dict[str, int]:
        return self._service.digest(wait_s)

    @ray.method(concurrency_group="control")
    def bucket_digests(self, wait_s: float) -> ShardDigests:
        return self._service.bucket_digests(wait_s)

    @ray.method(concurrency_group="control")
    def stats(self, wait_s: float) -> ShardStats:
        return self._service.stats(wait_s)

    @ray.method(concurrency_group="control")
    def snapshot(
        self, prefix: str, generation: int, step: int | None, since: int | None, wait_s: float
    ) -> list[SnapshotPart]:
        return self._service.snapshot(prefix, generation, step, since, wait_s)

    @ray.method(concurrency_group="control")
    def restore(
        self,
        prefix: str,
        parts: Sequence[SnapshotPart],
        wait_s: float,
    ) -> dict[str, int]:
        return self._service.restore(prefix, parts, wait_s)

    @ray.method(concurrency_group="control")
    def end_restore(self, generation: int, step: int, wait_s: float) -> None:
        self._service.end_restore(generation, step, wait_s)


def create_shard_actors(
    tables: Mapping[str, TableSpec],
    num_shards: int,
    *,
    num_cpus: float = 0,
    fetch_threads: int = 64,
    block_rows: int = DEFAULT_BLOCK_ROWS,
    spill: Spill | None = None,
    placement_group: Any = None,
    label: str = "",
    name: str | None = None,
    namespace: str | None = None,
    timeout_s: float = 60.0,
) -> ShardHandles:
    """Starts the shards and waits until each of them answers.

    Args:
        tables: what each table holds, by name.
        num_shards: one or two a node are best: every shard adds a call to every fetch.
        num_cpus: what each shard reserves, of its bundle where it has one.
        fetch_threads: at least the number of clients times the fetches each has in flight; waiting
            fetches hold a thread.
        block_rows: rows in a block of a table, a power of two.
        spill: of each shard, on its own node; None keeps all rows in memory.
        placement_group: has a bundle for each shard, in order, and stays the caller's; None lets
            Ray place each shard.
        label: what Ray's metrics of the shards are marked with, as ``run``.
        name: names the actors ``<name>-0``, ``<name>-1``, ... for ``find_shard_actors``; None
            leaves them without.
        namespace: the Ray namespace of the names.
        timeout_s: the limit for all of them to start.

    Raises:
        CacheError: the name is taken by a cache that is alive.
        CacheTimeoutError: not all shards started in time; those that did are ended again.
        ShardLostError: a shard's process died while starting.
    """
    deadline = time.monotonic() + timeout_s
    # Ray takes groups of threads only with the class, not among the options of an actor.
    remote_class = ray.remote(
        concurrency_groups={
            "fetch": fetch_threads,
            "write": _WRITE_THREADS,
            "control": _CONTROL_THREADS,
            "fence": _FENCE_THREADS,
        }
    )(ShardActor)
    actors: list[Any] = []
    try:
        for shard in range(num_shards):
            options: dict[str, Any] = {
                "num_cpus": num_cpus,
                "max_restarts": 0,
                "max_task_retries": 0,
            }
            if name is not None:
                options |= {"name": _actor_name(name, shard), "namespace": namespace}
            if placement_group is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    placement_group, shard
                )
            actor_class = remote_class.options(**options)
            actors.append(
                _start(actor_class, dict(tables), shard, num_shards, block_rows, spill, label)
            )
        described = _wait_until_started(actors, num_cpus, deadline, timeout_s)
    except Exception as error:
        destroy_shard_actors(ShardHandles(tuple(actors), tables))
        if isinstance(error, ActorAlreadyExistsError):
            raise CacheError(
                "A cache of this name is alive already.",
                where=f"namespace {namespace} of the Ray cluster",
                got=name,
                expected="a name that no other cache has",
                remedy="Stop the other one, or wait until it ended, or take another name.",
            ) from error
        raise
    return _handles(actors, described)


def _handles(actors: Sequence[Any], described: Sequence[CacheDescription]) -> ShardHandles:
    return ShardHandles(
        tuple(actors),
        described[0].tables,
        tuple(description.node_id for description in described),
        tuple(description.socket for description in described),
    )


def _start(actor_class: Any, *args: object) -> Any:
    """Starts an actor, once its name is free."""
    deadline = time.monotonic() + _NAME_TIMEOUT_S
    while True:
        try:
            return actor_class.remote(*args)
        except ActorAlreadyExistsError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)


def find_shard_actors(
    name: str, *, namespace: str | None = None, timeout_s: float = 10.0
) -> ShardHandles:
    """The shards that another process of the Ray cluster created under a name. They end with that
    process, whoever else holds their handles.

    Args:
        name, namespace: of ``create_shard_actors``.
        timeout_s: the limit for all of them to answer.

    Raises:
        CacheError: no cache of this name is alive.
        ShardLostError: one of its shards is dead.
        CacheTimeoutError: a shard does not answer.
    """
    deadline = time.monotonic() + timeout_s
    try:
        first = ray.get_actor(_actor_name(name, 0), namespace)
    except ValueError as error:
        raise CacheError(
            "No cache of this name is alive.",
            where=f"namespace {namespace} of the Ray cluster",
            got=f"no actor {_actor_name(name, 0)}",
            remedy="Look whether its run is still going on, and on this cluster.",
        ) from error
    description: CacheDescription = _answers("describe", [first], name, deadline)[0]
    actors = [first]
    for shard in range(1, description.num_shards):
        try:
            actors.append(ray.get_actor(_actor_name(name, shard), namespace))
        except ValueError as error:
            raise _lost_shard(name, shard, error) from error
    described = _answers("describe", actors, name, deadline)
    return _handles(actors, described)


def is_alive(name: str, namespace: str | None = None) -> bool:
    """Whether a cache of this name has a shard that is alive."""
    try:
        ray.get_actor(_actor_name(name, 0), namespace)
    except ValueError:
        return False
    return True


def destroy_shard_actors(handles: ShardHandles) -> None:
    """Ends the shards, and with them the rows they hold."""
    for actor in handles.actors:
        # One that Ray gave up before it ran is gone, and cannot be killed.
        with suppress(RaySystemError):
            ray.kill(actor)


class RayTransport:
    """Calls shard actors, from any worker or driver of their cluster; several threads may.

    Between it and a shard on the same node, rows go through shared memory, and what is said about
    them through a local socket; else Ray sends them. Everything else goes through Ray.

    Args:
        handles: of ``create_shard_actors``.
        shared_memory: True tries both with every shard, False with none; None with those on this
            node. Where a shard cannot map the memory, rows are sent after all.
    """

    def __init__(self, handles: ShardHandles, *, shared_memory: bool | None = None) -> None:
        self._actors = handles.actors
        self._tables = handles.tables
        shards = _shards_on_this_node(handles) if shared_memory is None else range(self.num_shards)
        is_possible = shared_memory is not False and can_share()
        self._pools = {shard: BufferPool(SharedBuffer) for shard in shards if is_possible}
        self._shared_answers = BufferPool(SharedBuffer)
        self._private_answers = BufferPool(PrivateBuffer)
        self._sockets = {
            shard: SocketClient(name)
            for shard, name in enumerate(handles.sockets)
            if shard in self._pools and name is not None
        }

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        """What the shards hold, by name of the table."""
        return self._tables

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return len(self._actors)

    def new_answer(self, num_keys: Mapping[str, int]) -> ClientAnswer:
        """Memory for the answer to a fetch, shared if any shard can map it."""
        if self._pools:
            # Else the system has no memory of this kind left to give.
            with suppress(OSError):
                return ClientAnswer(self._shared_answers, self._tables, num_keys)
        return ClientAnswer(self._private_answers, self._tables, num_keys)

    def submit(self, shard: int, method: str, *args: Any) -> Pending:
        """Sends the call."""
        return Pending(shard, self._send(shard, method, *args))

    def wait(self, pendings: Sequence[Pending], timeout_s: float) -> list[Reply]:
        """The replies in the order of ``pendings``; returns early when one of them is an error."""
        deadline = time.monotonic() + timeout_s
        calls = [cast(_Call, pending.token) for pending in pendings]
        waiting = [call for call in calls if call.reply is None]
        # An answer that is an error must not wait for answers that may never come, so they are
        # taken as they arrive.
        while waiting and not any(call.reply and call.reply.error for call in calls):
            ready = _wait_for_any(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for call in ready:
                if self._take_answer(call, deadline):
                    waiting.remove(call)
        missing = TimeoutError()
        return [call.reply or Reply(call.shard, error=missing) for call in calls]

    def close(self) -> None:
        """Forgets the handles; the actors belong to whoever created them."""
        self._actors = ()
        self._pools = {}
        self._sockets = {}

    def _send(self, shard: int, method: str, *args: Any) -> _Call:
        call = _Call(shard, method, args)
        self._begin(call)
        return call

    def _begin(self, call: _Call) -> None:
        """Sends a call, or sends it anew."""
        method, args = call.method, call.args
        call.direct = call.write = None
        message = self._share(call)
        call.is_shared = message is not None
        if message is not None:
            if self._send_directly(call, message):
                return
            method, args = _SHARED[method], (message, *args[1:])
        elif method == "fetch":
            args = (replace(args[0], into=None), *args[1:])
        try:
            call.ref = getattr(self._actors[call.shard], method).remote(*args)
        except RayActorError as error:
            # Ray raises at once for an actor that it already knows to be dead.
            call.reply = Reply(call.shard, error=_lost(error))

    def _send_directly(self, call: _Call, message: SharedFetchRequest | SharedWriteBatch) -> bool:
        """Whether the call went through a local socket."""
        client = self._sockets.get(call.shard)
        if client is not None:
            wait_s = call.args[1]
            call.direct = client.call(to_fields(message, wait_s))
        return call.direct is not None

    def _share(self, call: _Call) -> SharedFetchRequest | SharedWriteBatch | None:
        """The call's message in shared memory; None where it is to be sent."""
        pool = self._pools.get(call.shard)
        if pool is None:
            return None
        if call.method == "fetch":
            return SharedFetchRequest.of(call.args[0])
        if call.method == "write":
            # Else the system has no memory of this kind left to give.
            with suppress(OSError):
                call.write = share(pool, self._tables, call.args[0])
        return None if call.write is None else call.write.message

    def _take_answer(self, call: _Call, deadline: float) -> bool:
        """Sets the reply of a call that has its answer; or sends the call anew. Whether there is
        nothing more to wait for.
        """
        if call.direct is None:
            reply = _reply(call.shard, call.ref, deadline)
        elif (answer := call.direct.take()) is not None:
            reply = Reply(call.shard, answer.value, answer.error)
        else:
            # As a rule the shard died: Ray knows, and knows why.
            self._sockets.pop(call.shard, None)
            self._begin(call)
            return call.reply is not None
        if reply.is_missing:
            return True
        if reply.error is None and call.is_shared and not reply.value:
            # One node of Ray need not be one system: two containers may make one.
            self._pools.pop(call.shard, None)
            self._begin(call)
            return call.reply is not None
        call.reply = reply if reply.error else self._answer_of(call, reply)
        # A buffer of a write whose answer was not taken is not used again.
        call.write = None
        return True

    def _answer_of(self, call: _Call, reply: Reply) -> Reply:
        if call.method == "fetch" and (part := call.args[0].into) is not None:
            if not call.is_shared:
                part.put(reply.value)
            return Reply(call.shard, {})
        if call.write is not None:
            call.write.take_answer()
        return reply


@dataclass(eq=False)
class _Call:
    """A call under way.

    Attributes:
        direct: where it went through a local socket,
        ref: else Ray's handle.
        reply: how it ended.
        is_shared: whether its arrays lie in shared memory,
        write: a write's in this.
    """

    shard: int
    method: str
    args: tuple[Any, ...]
    direct: SocketCall | None = None
    ref: Any = None
    reply: Reply | None = None
    is_shared: bool = False
    write: SharedWrite | None = None


def _wait_for_any(calls: Sequence[_Call], timeout_s: float) -> list[_Call]:
    """The calls that have an answer; waits for the first of them."""
    deadline = time.monotonic() + timeout_s
    direct = {call.direct: call for call in calls if call.direct is not None}
    by_ref = {call.ref: call for call in calls if call.direct is None}
    ready: list[_Call] = []
    while True:
        remaining_s = max(0.0, deadline - time.monotonic())
        if direct:
            limit_s = min(remaining_s, _LOOK_AT_RAY_S) if by_ref else remaining_s
            ready += [direct[answered] for answered in wait_for_answers(direct, limit_s)]
        if by_ref:
            refs, _ = ray.wait(list(by_ref), timeout=0 if direct else remaining_s)
            ready += [by_ref[ref] for ref in refs]
        if ready or not remaining_s:
            return ready


def _shards_on_this_node(handles: ShardHandles) -> Sequence[int]:
    node_id = ray.get_runtime_context().get_node_id()
    return [shard for shard, other in enumerate(handles.node_ids) if other == node_id]


def _reply(shard: int, ref: Any, deadline: float) -> Reply:
    try:
        # The value may still have to travel from another node.
        return Reply(shard, ray.get(ref, timeout=max(1.0, deadline - time.monotonic())))
    except (RayActorError, OutOfMemoryError) as error:
        # Ray's memory monitor kills a process, and says so with an error of its own.
        return Reply(shard, error=_lost(error))
    except RayTaskError as error:
        # Ray wraps what the shard raised; the caller sees the same error as in process.
        cause = error.cause
        return Reply(shard, error=cause if isinstance(cause, Exception) else error)
    except GetTimeoutError:
        return Reply(shard, error=TimeoutError())
    except ray.exceptions.ObjectLostError as error:
        # The answer died with the node that held it.
        return Reply(shard, error=_lost(error))


def _lost(error: Exception) -> ConnectionError:
    lost = ConnectionError(str(error))
    lost.__cause__ = error
    return lost


def _wait_until_started(
    actors: Sequence[Any], num_cpus: float, deadline: float, timeout_s: float
) -> list[CacheDescription]:
    """Returns what each of them says."""
    transport = RayTransport(ShardHandles(tuple(actors), {}))
    pendings = [transport.submit(shard, "describe") for shard in range(transport.num_shards)]
    replies = transport.wait(pendings, max(0.0, deadline - time.monotonic()))
    for reply in replies:
        if isinstance(reply.error, ConnectionError):
            raise ShardLostError(
                "A cache shard died while it was started.",
                where=f"shard {reply.shard} of {transport.num_shards}",
                got=reply.error,
                remedy="Look at the actor's log; most often its node has too little memory.",
            ) from reply.error
    missing = [reply.shard for reply in replies if reply.error is not None]
    if missing:
        raise CacheTimeoutError(
            "Cache shards did not start.",
            where=f"shards {missing} of {transport.num_shards}",
            got=f"no answer after {timeout_s} s",
            expected=f"nodes with {num_cpus:g} CPU free for each shard",
            remedy="Add nodes, reserve less, or raise the time-out.",
        )
    return [reply.value for reply in replies]


def _actor_name(name: str, shard: int) -> str:
    return f"{name}-{shard}"


def _answers(method: str, actors: Sequence[Any], name: str, deadline: float) -> list[Any]:
    """What each of the shards answers; they are said to be those of the cache ``name``."""
    transport = RayTransport(ShardHandles(tuple(actors), {}))
    pendings = [transport.submit(shard, method) for shard in range(len(actors))]
    replies = transport.wait(pendings, max(0.0, deadline - time.monotonic()))
    for reply in replies:
        if isinstance(reply.error, ConnectionError):
            raise _lost_shard(name, reply.shard, reply.error) from reply.error
    missing = [reply.shard for reply in replies if reply.error is not None]
    if missing:
        raise CacheTimeoutError(
            "The shards of a cache do not answer.",
            where=f"cache {name}, shards {missing}",
            got=f"no answer to {method} in time",
            remedy="Look at the load of their nodes, or ask again when they have started.",
        )
    return [reply.value for reply in replies]


def _lost_shard(name: str, shard: int, error: Exception) -> ShardLostError:
    return ShardLostError(
        "A shard of a cache is dead.",
        where=f"cache {name}, shard {shard}",
        got=error,
        remedy="Its run cannot go on: resume it from the last checkpoint.",
    )
