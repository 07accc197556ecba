"""Nodes of one machine with a network between them that has a latency and a bandwidth.

Each node is a network namespace with one device, a TUN device; a relay in this process reads every
packet, holds it back as long as it would have been under way, and hands it to the node that it is
for. It needs Linux, the right to make namespaces (root), ``ip`` and ``/dev/net/tun``; nothing
outside of the namespaces is touched. The kernel's own ``tc netem`` is a module that many lack.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

DEVICE = "felrec0"
# Large packets, as offloading network cards pass on: the relay has its work with each.
_MTU = 60_000
_SUBNET = bytes([10, 231, 0])
_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_HEADER = 0x0001 | 0x1000
_CLONE_NEWNET = 0x40000000
# What a sender may have under way before its packets are dropped, as by a switch.
_LONGEST_QUEUE_S = 0.2
_STOP_TIMEOUT_S = 5.0


@dataclass
class Link:
    """How far apart nodes are; it may change while it is used.

    Attributes:
        latency_s: of a packet, one way.
        bits_per_s: that a node may send; None for no limit.
    """

    latency_s: float = 0.0
    bits_per_s: float | None = None


@dataclass(frozen=True)
class NetworkNode:
    """A network namespace.

    Attributes:
        name: of the namespace.
        address: of its device.
    """

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """``words``, to be run in it."""
        return ["ip", "netns", "exec", self.name, *words]


def missing() -> str:
    """What such a network lacks here; empty if nothing."""
    if os.geteuid() != 0:
        return "the right to make network namespaces"
    if shutil.which("ip") is None:
        return "the command ip (apt-get install iproute2)"
    name = f"felrec-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode:
        return "the right to make network namespaces"
    try:
        os.close(_open_device(name))
    except OSError as error:
        return f"TUN devices ({error})"
    finally:
        _run("ip", "netns", "del", name)
    return ""


@contextmanager
def network(num_nodes: int, link: Link) -> Iterator[list[NetworkNode]]:
    """Yields nodes that reach one another through ``link``, and removes them at the end.

    Raises:
        OSError, CalledProcessError: the system does not allow it; ``missing`` says what.
    """
    nodes = [
        NetworkNode(f"felrec-{os.getpid()}-{i}", f"10.231.0.{i + 1}") for i in range(num_nodes)
    ]
    with ExitStack() as stack:
        devices = []
        for node in nodes:
            _run("ip", "netns", "add", node.name)
            stack.callback(_run, "ip", "netns", "del", node.name)
            devices.append(_open_device(node.name))
            stack.callback(os.close, devices[-1])
            _run(*node.command("ip", "link", "set", "lo", "up"))
            _run(*node.command("ip", "addr", "add", f"{node.address}/24", "dev", DEVICE))
            _run(*node.command("ip", "link", "set", DEVICE, "mtu", str(_MTU), "up"))
            # Who asks for the way to the internet learns its own address so; no packet leaves.
            _run(*node.command("ip", "route", "add", "default", "dev", DEVICE))
        stack.enter_context(_relaying(devices, link))
        yield nodes


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def _open_device(namespace: str) -> int:
    """A TUN device in a namespace; its packets come from and go to the file descriptor."""
    result: list[int | OSError] = []

    def open_there() -> None:
        # A namespace is one of the thread, which ends with it.
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            with open(f"/var/run/netns/{namespace}") as file:
                if libc.setns(file.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            request = struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN_NO_HEADER)
            try:
                fcntl.ioctl(device, _TUNSETIFF, request)
            except OSError:
                os.close(device)
                raise
            result.append(device)
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=open_there)
    thread.start()
    thread.join()
    [device] = result
    if isinstance(device, OSError):
        raise device
    return device


@contextmanager
def _relaying(devices: Sequence[int], link: Link) -> Iterator[None]:
    is_over = threading.Event()
    thread = threading.Thread(target=_relay, args=(devices, link, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(_STOP_TIMEOUT_S)


def _relay(devices: Sequence[int], link: Link, is_over: threading.Event) -> None:
    """Moves packets until it is over; each has its time of arrival."""
    numbers = itertools.count()
    under_way: list[tuple[float, int, int, bytes]] = []
    free_at = dict.fromkeys(devices, 0.0)
    while not is_over.is_set():
        wait_s = under_way[0][0] - time.monotonic() if under_way else 0.1
        ready, _, _ = select.select(devices, [], [], min(max(wait_s, 0.0), 0.1))
        for device in ready:
            with suppress(BlockingIOError):
                packet = os.read(device, _MTU + 64)
                now = time.monotonic()
                began = max(now, free_at[device])
                to = packet[19] - 1 if packet[16:19] == _SUBNET and packet[0] >> 4 == 4 else -1
                if not 0 <= to < len(devices) or began - now > _LONGEST_QUEUE_S:
                    continue
                sent_s = 8 * len(packet) / link.bits_per_s if link.bits_per_s else 0.0
                free_at[device] = began + sent_s
                arrives = began + sent_s + link.latency_s
                heapq.heappush(under_way, (arrives, next(numbers), devices[to], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            *_, device, packet = heapq.heappop(under_way)
            with suppress(OSError):  # its queue is full, or its node is gone: the packet is lost
                os.write(device, packet)
