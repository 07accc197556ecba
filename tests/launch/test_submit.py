"""Runs as jobs of a Ray cluster: a head with a dashboard, ``felrec submit``, ``ray job``."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("ray")

from felrec_dist.config import ExperimentConfig, dump_config
from felrec_dist.errors import ConfigError
from felrec_dist.training.checkpoint import CheckpointStore, read_checkpoint
from launch.submission import Cluster, prepare
from tests.chaos.kills import KINDS, experiment, prepare_events
from tests.processes import actors

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TIMEOUT_S = 120.0
SECRET = "never-to-be-seen"

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(4 * TIMEOUT_S)]


@dataclass(frozen=True)
class Head:
    """A cluster of one node.

    Attributes:
        dashboard, address: where it listens.
        pid: of the process that started it.
        env: of commands that use it.
    """

    dashboard: str
    address: str
    pid: int
    env: dict[str, str]

    def start(self, *command: str, cwd: Path) -> subprocess.Popen[str]:
        """Starts a command that may be sent Ctrl-C."""
        return subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=cwd,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *command: str, cwd: Path, code: int = 0) -> str:
        """Runs a command that must end with this exit code; returns what it said."""
        with self.start(*command, cwd=cwd) as process:
            return ended(process, code)


def ended(process: subprocess.Popen[str], code: int) -> str:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ExitStack() as stack:
        # Ray's sockets lie there, and their paths are short.
        folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        names = (
            "port",
            "dashboard-port",
            "ray-client-server-port",
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
        )
        ports = free_ports(len(names))
        env = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        process = subprocess.Popen(
            [
                *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2"),
                *("--temp-dir", folder, f"--object-store-memory={100 * 2**20}"),
                *("--disable-usage-stats", "--include-dashboard=true"),
                *(f"--{name}={port}" for name, port in zip(names, ports, strict=True)),
            ],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        stack.callback(stop, process)
        dashboard = f"http://127.0.0.1:{ports[1]}"
        wait_until(lambda: answers(f"{dashboard}/api/version"))
        client = {**env, "RAY_API_SERVER_ADDRESS": dashboard, "AWS_SECRET_ACCESS_KEY": SECRET}
        yield Head(dashboard, f"127.0.0.1:{ports[0]}", process.pid, client)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30.0)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def write_config(config: ExperimentConfig, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def nothing_runs(head: Head) -> bool:
    return not any(actors(kind, head.pid) for kind in (*KINDS.values(), "ProgressBoard"))


def test_a_run_is_submitted_stopped_and_goes_on(head: Head, tmp_path: Path) -> None:
    dataset = prepare_events(tmp_path, num_kills=4)
    config = experiment(dataset.url, str(tmp_path / "run"))
    folder = write_config(config, tmp_path / "uploaded")
    store = CheckpointStore(config.run.url)
    cluster = Cluster(head.dashboard)
    with head.start("felrec", "submit", "config.yaml", cwd=folder) as submit:
        wait_until(lambda: store.latest() is not None or submit.poll() is not None)
        submit.send_signal(signal.SIGINT)
        with pytest.raises(ConfigError, match="a job of this run is going on") as caught:
            cluster.submit(
                prepare(
                    str(folder / "config.yaml"), [], working_dir=str(folder), environment=head.env
                )
            )
        # What ray job stop asks for.
        job = str(caught.value.got)
        cluster.stop(job)
        output = ended(submit, 130)
    assert "the job goes on; to follow it: ray job logs -f" in output
    assert job in output
    assert "AWS_SECRET_ACCESS_KEY" in output
    assert SECRET not in output + (tmp_path / "run" / "config.yaml").read_text()
    wait_until(lambda: cluster.job(job).status.is_terminal() and nothing_runs(head))
    printed = cluster.printed(job)
    assert "stopped; newest checkpoint" in printed, printed
    newest = store.latest()
    assert newest is not None
    assert not read_checkpoint(newest).position.is_validated

    plain = ("job", "submit", "--working-dir", ".", "--", "felrec", "train", "config.yaml")
    output = head.run("ray", *plain, cwd=folder)
    assert f"resumed from {newest}" in output, output
    assert "most popular" in output
    wait_until(lambda: nothing_runs(head))


def test_a_run_that_fails_has_its_exit_code_and_words(head: Head, tmp_path: Path) -> None:
    config = experiment("none", str(tmp_path / "run"), start_timeout_s=1.0)
    folder = write_config(config, tmp_path / "uploaded")
    # The address of the cluster's head does as well as that of its dashboard.
    command = ("felrec", "submit", "config.yaml", "--address", head.address)
    output = head.run(*command, "cluster.cpus_per_worker=100", cwd=folder, code=1)
    assert "too small for the run" in output
    assert "2 of 200 CPU" in output
    # Inside of what is uploaded a run's folder would be lost.
    plain = ("job", "submit", "--working-dir", ".", "--", "felrec", "train", "config.yaml")
    output = head.run("ray", *plain, "run.url=runs/a", cwd=folder, code=1)
    assert "relative to the files that were uploaded with the job" in output
