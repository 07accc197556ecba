"""Two workers and two shards on nodes with a network between them, against the same without limits.

::

    felrec benchmark nodes

Ray's head with the driver, and two nodes with a worker and a shard each, in network namespaces of
this machine (``benchmarks/slow_network.py``): half of the rows that a worker fetches, and all that
the workers exchange, go over the network.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.cache import setting
from benchmarks.measure import Figure, Ratio, Report
from benchmarks.slow_network import DEVICE, Link, NetworkNode, missing, network
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource
from felrec_dist.data.synthetic import SyntheticConfig, synthesize
from felrec_dist.errors import TrainingError

NUM_RUNS = 3
LIMITED = Link(latency_s=0.002, bits_per_s=1e9)
TRAIN, RTT = "training, 2 workers, 2 shards", "there and back"
WITHOUT, WITH = "no limit", "2 ms one way, 1 Gbit/s"

_ROOT = Path(__file__).resolve().parents[1]
_PORT = 6379
_STARTED = "Ray runtime started"
_START_TIMEOUT_S = 300.0
_TRAIN_TIMEOUT_S = 900.0


def run(quick: bool) -> list[Report]:
    """Events/s with and without limits; nothing where there can be no such network, which is said,
    nor in quick mode.
    """
    if quick:
        return []
    if lacking := missing():
        return [Report("nodes", {"skipped, it needs": lacking}, [])]
    return [measure(num_events=40_000)]


def measure(num_events: int) -> Report:
    """Trains runs of an epoch with each link, on the same nodes."""
    link = Link()
    with tempfile.TemporaryDirectory(prefix="felrec-benchmark-") as name:
        folder = Path(name)
        raw = synthesize(folder / "raw.parquet", SyntheticConfig(num_events=num_events))
        source = RawSource.parquet(
            str(raw), user="user", item="item", timestamp="timestamp", timestamp_unit="ms"
        )
        dataset = prepare(source, str(folder / "data"), name="synthetic")
        with network(3, link) as nodes, cluster(nodes, folder):
            speeds: dict[str, list[float]] = {WITHOUT: [], WITH: []}
            seconds: dict[str, float] = {}
            # In turn: other work on the machine comes and goes.
            for turn in range(NUM_RUNS):
                for side, wanted in ((WITHOUT, Link()), (WITH, LIMITED)):
                    link.latency_s, link.bits_per_s = wanted.latency_s, wanted.bits_per_s
                    seconds[side] = round_trip(nodes[1], nodes[2])
                    run_folder = folder / f"run-{turn}-{side[0]}"
                    train(nodes[0], dataset.url, run_folder)
                    speeds[side] += events_per_s(run_folder)
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    return Report(
        "nodes",
        {**setting(), "events": f"{num_events:,}", "B": 1024, "N": 16, "D": 128},
        [
            *(Figure(TRAIN, side, speed, "events/s") for side, speed in medians.items()),
            *(Figure(RTT, side, 1e3 * value, "ms") for side, value in seconds.items()),
        ],
        [Ratio(TRAIN, WITHOUT, medians[WITH] / medians[WITHOUT], "times as fast")],
    )


@contextmanager
def cluster(nodes: Sequence[NetworkNode], folder: Path) -> Iterator[None]:
    """Ray on all nodes, a worker and a shard having a place on all but the first, the head."""
    head = f"{nodes[0].address}:{_PORT}"
    processes = []
    try:
        for number, node in enumerate(nodes):
            if number == 0:
                words = ["--head", f"--port={_PORT}", "--num-cpus=0", "--include-dashboard=false"]
            else:
                words = [f"--address={head}", "--num-cpus=2"]
            words += [f"--node-ip-address={node.address}", "--object-store-memory=200000000"]
            processes.append(_start(node, folder, "ray", "start", "--block", *words))
            deadline = time.monotonic() + _START_TIMEOUT_S
            while _STARTED not in (folder / f"{node.name}.log").read_text():
                if time.monotonic() > deadline or processes[-1].poll() is not None:
                    raise TrainingError(
                        "Ray did not start on a node.",
                        where=node.name,
                        got=(folder / f"{node.name}.log").read_text()[-2000:],
                        expected=f"a node within {_START_TIMEOUT_S:g} s",
                        remedy="look at the load of this machine",
                    )
                time.sleep(1.0)
        yield
    finally:
        for process in reversed(processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(20)


def train(node: NetworkNode, dataset_url: str, folder: Path) -> None:
    """One epoch, from the head."""
    model = {"history_length": 16, "width": 128, "feedforward_width": 256, "num_layers": 1}
    settings = {
        "data.url": dataset_url,
        "run.url": str(folder),
        "run.log_every_steps": 5,
        **{f"model.encoder.{name}": value for name, value in model.items()},
        "cache.num_shards": 2,
        "cache.hot_rows": 0,
        "training.schedule.epochs": 1,
        "training.schedule.warmup_epochs": 0,
        "cluster.num_workers": 2,
        "cluster.cpus_per_shard": 1.0,
    }
    words = [f"{name}={value}" for name, value in settings.items()]
    command = ["-m", "launch", "train", str(_ROOT / "configs" / "parquet_q.yaml"), *words]
    done = subprocess.run(
        _inside(node, folder.parent, sys.executable, *command),
        env={**_environment(), "RAY_ADDRESS": f"{node.address}:{_PORT}"},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=_TRAIN_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise TrainingError(
            "A run over the network failed.",
            where=node.name,
            got=(done.stdout + done.stderr)[-2000:],
            remedy="look at what it says",
        )


def events_per_s(folder: Path) -> list[float]:
    """Of a run's steps, without the first ones, which compile."""
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    values = [event.value for event in accumulator.Scalars("speed/train(events per s)")]
    return values[len(values) // 3 :]


def round_trip(here: NetworkNode, there: NetworkNode) -> float:
    """Seconds of the fastest ``ping`` of ten, as Python's sockets see it."""
    serve = (
        "import socket; s = socket.create_server(('', 5555)); print('up', flush=True)\n"
        "c, _ = s.accept()\n"
        "while c.recv(1): c.send(b'x')"
    )
    ask = (
        "import socket, sys, time; seconds = []\n"
        "c = socket.create_connection((sys.argv[1], 5555), 10)\n"
        "for _ in range(10):\n"
        "    began = time.perf_counter(); c.send(b'x'); c.recv(1)\n"
        "    seconds.append(time.perf_counter() - began)\n"
        "print(min(seconds))"
    )
    with subprocess.Popen(
        there.command(sys.executable, "-c", serve), stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()
        said = subprocess.check_output(
            here.command(sys.executable, "-c", ask, there.address), timeout=60
        )
    return float(said)


def _start(node: NetworkNode, folder: Path, *command: str) -> subprocess.Popen[bytes]:
    with (folder / f"{node.name}.log").open("wb") as log:
        return subprocess.Popen(
            _inside(node, folder, str(Path(sys.executable).parent / command[0]), *command[1:]),
            env=_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _inside(node: NetworkNode, folder: Path, *command: str) -> list[str]:
    """A command on a node, with a folder of Ray's of its own: Ray finds its node by files there."""
    ray = folder / f"ray-{node.name}"
    ray.mkdir(exist_ok=True)
    mount = f'mkdir -p /tmp/ray && mount --bind {ray} /tmp/ray && exec "$@"'
    return node.command("sh", "-c", mount, "sh", *command)


def _environment() -> dict[str, str]:
    """Of all processes: gloo takes the device of the namespace, not that of the host's name."""
    return {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "GLOO_SOCKET_IFNAME": DEVICE,
        "TP_SOCKET_IFNAME": DEVICE,
        "PYTHONPATH": str(_ROOT),
        "RAY_raylet_start_wait_time_s": f"{_START_TIMEOUT_S:.0f}",
    }
