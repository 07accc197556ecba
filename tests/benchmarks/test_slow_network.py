"""Nodes with a network between them: packets arrive whole, and no sooner than the link allows."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.nodes import round_trip
from benchmarks.slow_network import Link, missing, network

NUM_BYTES, BITS_PER_S = 300_000, 8e6
RECEIVE = (
    "import hashlib, socket, time; s = socket.create_server(('', 5556)); print('up', flush=True)\n"
    "c, _ = s.accept(); began = time.monotonic(); got = b''\n"
    "while piece := c.recv(1 << 20): got += piece\n"
    "print(hashlib.sha256(got).hexdigest(), len(got), time.monotonic() - began)"
)
SEND = (
    "import hashlib, random, socket, sys; data = random.Random(0).randbytes(int(sys.argv[2]))\n"
    "socket.create_connection((sys.argv[1], 5556), 10).sendall(data)\n"
    "print(hashlib.sha256(data).hexdigest())"
)


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    if lacking := missing():
        pytest.skip(f"needs {lacking}")


def test_a_packet_is_under_way_for_the_latency_each_way() -> None:
    link = Link(latency_s=0.02)
    with network(3, link) as nodes:
        assert round_trip(nodes[2], nodes[0]) >= 0.04
        # It may change while it is used.
        link.latency_s = 0.0
        assert round_trip(nodes[0], nodes[1]) > 0.0
        names = [node.name for node in nodes]
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert not any(name in left.stdout for name in names)


def test_bytes_arrive_whole_and_no_faster_than_the_link() -> None:
    with network(2, Link(0.001, BITS_PER_S)) as (here, there):
        with subprocess.Popen(
            there.command(sys.executable, "-c", RECEIVE), stdout=subprocess.PIPE, text=True
        ) as receiver:
            assert receiver.stdout is not None
            receiver.stdout.readline()
            words = (sys.executable, "-c", SEND, there.address, str(NUM_BYTES))
            sent = subprocess.check_output(here.command(*words), text=True, timeout=60)
            digest, size, seconds = receiver.stdout.read().split()
    assert (digest, int(size)) == (sent.strip(), NUM_BYTES)
    # All but what was under way when the receiver began to count.
    assert float(seconds) >= 0.8 * 8 * NUM_BYTES / BITS_PER_S
