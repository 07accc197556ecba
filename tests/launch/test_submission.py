"""What is sent to a cluster, and what comes of its answers; the cluster is a double in memory."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.job_submission import JobStatus

from felrec_dist.config import ExperimentConfig, dump_config
from felrec_dist.errors import ConfigError, WorkerFailedError
from launch import submission
from launch.submission import Cluster, Follower, Submission, prepare
from tests import tiny
from tests.launch.commands import Felrec, assert_failed

SECRET = "never-to-be-seen"


class Dashboard:
    """A client of Ray's whose jobs end as the test says.

    Args:
        prints: what each job prints, in pieces; an error breaks the connection there.
        ends: status and exit code of each job.
    """

    def __init__(
        self,
        prints: list[str | Exception] | None = None,
        ends: tuple[JobStatus, int | None] = (JobStatus.SUCCEEDED, 0),
    ) -> None:
        self.jobs: list[Any] = []
        self.sent: list[dict[str, Any]] = []
        self.stopped: list[str] = []
        self.refuses: Exception | None = None
        self.silent = 0
        self._prints = prints or []
        self._ends = ends

    def get_address(self) -> str:
        return "http://dashboard:8265"

    def list_jobs(self) -> list[Any]:
        return self.jobs

    def submit_job(self, **job: Any) -> str:
        if self.refuses is not None:
            raise self.refuses
        self.sent.append(job)
        self.add(job["submission_id"], JobStatus.RUNNING)
        return str(job["submission_id"])

    def add(self, submission_id: str | None, status: JobStatus) -> None:
        job = SimpleNamespace(
            submission_id=submission_id, status=status, driver_exit_code=None, message="why"
        )
        self.jobs.append(job)

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        for index, piece in enumerate(self._prints):
            if isinstance(piece, Exception):
                self._prints.pop(index)
                raise piece
            yield piece
        self.end()

    def end(self) -> None:
        self.jobs[-1].status, self.jobs[-1].driver_exit_code = self._ends

    def get_job_info(self, job_id: str) -> Any:
        if self.silent:
            self.silent -= 1
            raise ConnectionError("nobody there")
        [job] = [job for job in self.jobs if job.submission_id == job_id]
        return job

    def get_job_logs(self, job_id: str) -> str:
        self.get_job_info(job_id)
        return "".join(piece for piece in self._prints if isinstance(piece, str))

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config whose run lies in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    write_config(tmp_path, tiny.experiment("events", "out/my run"))
    return tmp_path


def write_config(folder: Path, config: ExperimentConfig) -> None:
    (folder / "config.yaml").write_text(dump_config(config))


def prepared(**changes: Any) -> Submission:
    return prepare("config.yaml", [], **{"environment": {}, **changes})


def connected(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(submission, "JobSubmissionClient", lambda address: dashboard)
    monkeypatch.setattr(submission, "POLL_S", 0.05)
    return Cluster()


# What is sent


def test_the_job_does_what_was_typed_where_it_was_typed(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "config.yaml").rename(folder / "sub" / "config.yaml")
    job = prepare("sub/config.yaml", ["training.seed=3"], resume=False, environment={})
    assert shlex.split(job.entrypoint) == [
        *("felrec", "train", "sub/config.yaml", "training.seed=3"),
        *(f"data.url={folder}/events", f"run.url={folder}/out/my run", "--no-resume"),
    ]
    assert job.working_dir == folder
    assert job.runtime_env["working_dir"] == str(folder)


def test_addresses_elsewhere_stay_as_they_are(folder: Path) -> None:
    overrides = ["data.url=s3://bucket/data", "run.url=s3://bucket/runs/a"]
    job = prepare("config.yaml", overrides, environment={})
    assert shlex.split(job.entrypoint) == ["felrec", "train", "config.yaml", *overrides]
    assert job.name.startswith("felrec-a-")


def test_events_runs_and_history_are_not_uploaded(folder: Path) -> None:
    from ray._private.runtime_env.packaging import _get_excludes

    job = prepared()
    assert job.excludes == ("/.git", "/.venv", "/data", "/runs", "/events", "/out/my run")
    is_excluded = _get_excludes(folder, list(job.excludes))
    out = ("data", "runs/a/config.yaml", "out/my run/checkpoints/x", "events/dataset.json")
    assert [name for name in out if not is_excluded(folder / name)] == []
    within = ("felrec_dist/data/stream.py", "config.yaml", "out/other", "configs/demo.yaml")
    assert [name for name in within if is_excluded(folder / name)] == []


def test_the_environment_of_storages_is_forwarded_and_not_shown(folder: Path) -> None:
    forwarded = {
        "AWS_ACCESS_KEY_ID": SECRET,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": "http://minio:9000",
        "FSSPEC_S3_KEY": SECRET,
        "NCCL_DEBUG": "INFO",
    }
    others = {"AWS_PROFILE": "me", "FSSPEC_CONFIG_DIR": "/home", "HOME": "/home", "TOKEN": SECRET}
    job = prepared(environment=forwarded | others, more_env=["NCCL_DEBUG"])
    assert job.runtime_env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600", **forwarded}
    assert SECRET not in repr(job) + job.entrypoint


@pytest.mark.parametrize("typed", ["TOKEN", f"TOKEN={SECRET}"])
def test_a_variable_that_is_not_set_is_named_without_a_value(folder: Path, typed: str) -> None:
    with pytest.raises(ConfigError, match="not set") as caught:
        prepared(more_env=[typed])
    assert "got: TOKEN\n" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("../config.yaml", "the config is not in the folder that is uploaded"),
        ("runs/config.yaml", "the config lies in a folder that is not uploaded"),
    ],
)
def test_a_config_that_the_job_would_not_find_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, config: str, said: str
) -> None:
    inner = folder / "inner"
    (inner / "runs").mkdir(parents=True)
    (inner / "runs" / "config.yaml").write_text((folder / "config.yaml").read_text())
    monkeypatch.chdir(inner)
    with pytest.raises(ConfigError, match=said):
        prepare(config, [], environment={})


def test_the_config_is_checked_before_anything_is_sent(felrec: Felrec, folder: Path) -> None:
    ended = felrec("submit", "config.yaml", "model.widht=3", "--address", "http://127.0.0.1:1")
    assert_failed(ended, "ConfigError", "unknown config key model.widht")


# What comes of it


def test_jobs_of_a_run_are_numbered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dashboard, job = Dashboard(), prepared()
    cluster = connected(dashboard, monkeypatch)
    dashboard.add(None, JobStatus.RUNNING)  # a driver that nobody submitted
    dashboard.add("felrec-other-0123456789abcdef-7", JobStatus.RUNNING)
    dashboard.add(f"{job.name}-9", JobStatus.FAILED)
    dashboard.add(f"{job.name}-10", JobStatus.STOPPED)
    assert cluster.submit(job) == f"{job.name}-11"
    assert dashboard.sent[0]["metadata"] == {"run": f"{folder}/out/my run"}
    with pytest.raises(ConfigError, match=rf"is going on(?s:.*)got: {job.name}-11"):
        cluster.submit(job)
    assert len(dashboard.sent) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("Job with submission_id x already exists.", "a job of this run is going on"),
        (
            "Request failed with status code 500: Traceback\nValueError: Package size (120.00MiB) "
            "exceeds the maximum size of 100.00MiB.",
            r"too large to upload(?s:.*)120\.00MiB",
        ),
        ("Request failed with status code 413: Too Large", "too large to upload"),
        ("Request failed with status code 500: disk full", r"does not take(?s:.*)disk full"),
    ],
)
def test_a_job_that_is_not_taken_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: str, said: str
) -> None:
    dashboard = Dashboard()
    dashboard.refuses = RuntimeError(error)
    with pytest.raises(ConfigError, match=said):
        connected(dashboard, monkeypatch).submit(prepared())


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ((JobStatus.SUCCEEDED, 0), 0),
        ((JobStatus.FAILED, 1), 1),
        ((JobStatus.FAILED, 7), 7),
        ((JobStatus.FAILED, -9), 137),
        ((JobStatus.STOPPED, None), 143),
    ],
)
def test_the_exit_code_is_the_runs(
    felrec: Felrec,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    ends: tuple[JobStatus, int | None],
    code: int,
) -> None:
    dashboard = Dashboard(["one\ntw", "o\n"], ends)
    connected(dashboard, monkeypatch)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    ended = felrec("submit", "config.yaml")
    assert (ended.code, ended.out) == (code, "one\ntwo\n")
    assert dashboard.sent[0]["runtime_env"]["env_vars"]["AWS_SECRET_ACCESS_KEY"] == SECRET
    assert "AWS_SECRET_ACCESS_KEY" in ended.err
    assert SECRET not in ended.err
    assert os.environ.get("RAY_API_SERVER_ADDRESS") is None


def test_a_job_that_never_ran_its_command_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard = Dashboard(ends=(JobStatus.FAILED, None))
    cluster = connected(dashboard, monkeypatch)
    with pytest.raises(WorkerFailedError, match=r"not by the end of its command(?s:.*)got: why"):
        Follower(cluster, cluster.submit(prepared()), print).wait()


def test_without_waiting_the_id_is_all_that_is_printed(
    felrec: Felrec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected(Dashboard(["never read"]), monkeypatch)
    ended = felrec("submit", "config.yaml", "--no-wait")
    assert (ended.code, ended.out) == (0, f"{prepared().name}-1\n")


def test_a_connection_that_breaks_loses_and_repeats_no_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str | Exception] = ["ab", "cd", OSError("gone"), "ef", OSError("again"), "gh"]
    dashboard = Dashboard(pieces)
    cluster = connected(dashboard, monkeypatch)
    written: list[str] = []
    follower = Follower(cluster, cluster.submit(prepared()), written.append)
    dashboard.silent = 2
    assert follower.wait() == 0
    assert "".join(written) == "abcdefgh"


def test_the_end_of_a_job_that_ended_while_the_connection_was_lost_is_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard = Dashboard(["ab", OSError("gone"), "cd"], (JobStatus.FAILED, 7))
    cluster = connected(dashboard, monkeypatch)
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        dashboard.end()

    dashboard.silent = 2
    assert Follower(cluster, cluster.submit(prepared()), write).wait() == 7
    assert "".join(written) == "abcd"


@pytest.mark.parametrize("error", [TimeoutError("no answer within 600 s"), ConnectionError("gone")])
def test_an_upload_that_gets_no_answer_may_have_arrived(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    dashboard = Dashboard()
    dashboard.refuses = error
    with pytest.raises(ConfigError, match=rf"nobody knows(?s:.*)-1(?s:.*){error}"):
        connected(dashboard, monkeypatch).submit(prepared())


@pytest.mark.parametrize("error", [RuntimeError("code 500"), ConnectionError("gone")])
def test_a_dashboard_that_fails_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    dashboard = Dashboard()
    cluster = connected(dashboard, monkeypatch)

    def fails(**arguments: object) -> None:
        raise error

    monkeypatch.setattr(dashboard, "list_jobs", fails)
    monkeypatch.setattr(dashboard, "stop_job", fails)
    for ask in (lambda: cluster.submit(prepared()), lambda: cluster.stop("x")):
        with pytest.raises(ConfigError, match=rf"does not answer(?s:.*)http(?s:.*){error}"):
            ask()


def test_a_cluster_that_stays_away_ends_the_wait(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard = Dashboard([OSError("gone")])
    cluster = connected(dashboard, monkeypatch)
    follower = Follower(cluster, cluster.submit(prepared()), print, lost_timeout_s=0.2)
    dashboard.silent = 10**6
    with pytest.raises(ConfigError, match=r"does not answer any more(?s:.*)nobody there"):
        follower.wait()


def test_a_connection_that_says_nothing_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard = Dashboard()
    cluster = connected(dashboard, monkeypatch)
    monkeypatch.setattr(cluster, "tail", lambda submission_id, chunks: chunks.put("first"))
    monkeypatch.setattr(cluster, "printed", lambda submission_id: "first and last")
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        dashboard.end()

    assert Follower(cluster, cluster.submit(prepared()), write).wait() == 0
    assert written == ["first", " and last"]


@pytest.mark.parametrize(
    ("options", "code", "num_stopped", "said"),
    [
        ([], 130, 0, "the job goes on; to follow it: ray job logs -f --address http://dashboard"),
        (["--stop-on-interrupt"], 143, 1, "stopping the job"),
    ],
)
def test_ctrl_c_leaves_the_job_or_stops_it(
    felrec: Felrec,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    code: int,
    num_stopped: int,
    said: str,
) -> None:
    dashboard = Dashboard(ends=(JobStatus.STOPPED, None))
    connected(dashboard, monkeypatch)
    wait, interrupts = Follower.wait, [KeyboardInterrupt()]

    def interrupted(follower: Follower) -> int:
        if interrupts:
            raise interrupts.pop()
        return wait(follower)

    monkeypatch.setattr(Follower, "wait", interrupted)
    ended = felrec("submit", "config.yaml", *options)
    assert (ended.code, len(dashboard.stopped)) == (code, num_stopped)
    assert said in ended.err
    assert f"ray job stop --address http://dashboard:8265 {prepared().name}-1" in ended.err


# Where there is no cluster


@pytest.mark.parametrize("address", ["http://127.0.0.1:{}", "127.0.0.1:{}"])
def test_no_cluster_at_the_address(felrec: Felrec, folder: Path, address: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        there = address.format(free.getsockname()[1])
        ended = felrec("submit", "config.yaml", "--address", there)
    assert_failed(ended, "ConfigError", "no Ray cluster answers", there, "felrec submit")


def test_the_address_may_come_from_the_environment(
    felrec: Felrec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    ended = felrec("submit", "config.yaml")
    assert_failed(ended, "ConfigError", "where: http://127.0.0.1:1\n")
    ended = felrec("submit", "config.yaml", "--address", "http://127.0.0.1:3")
    assert_failed(ended, "ConfigError", "where: http://127.0.0.1:3\n")


@pytest.fixture
def server() -> Iterator[Callable[[int, bytes], str]]:
    """Something that answers every request in the same way."""
    answer: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer[-1]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=http.serve_forever)
    thread.start()

    def start(status: int, body: bytes) -> str:
        answer.append((status, body))
        return f"http://127.0.0.1:{http.server_port}"

    yield start
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b"Unauthorized: Missing authentication token", "does not let us in"),
        (403, b"Forbidden: Invalid authentication token", "does not let us in"),
        (404, b"no such page", "no dashboard of a Ray cluster answers"),
        (500, b"", "no dashboard of a Ray cluster answers"),
        (200, b"<html>something else</html>", "no dashboard of a Ray cluster answers"),
        (200, b'{"ray_version": "1.0"}', "Ray version 1.0 is running on the cluster"),
    ],
)
def test_who_answers_and_is_no_open_dashboard_is_named(
    server: Callable[[int, bytes], str],
    felrec: Felrec,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    body: bytes,
    said: str,
) -> None:
    # Ray itself would ask this one.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    address = server(status, body)
    ended = felrec("submit", "config.yaml", "--address", address)
    assert_failed(ended, "ConfigError", said, address)
    assert ("RAY_AUTH_MODE=token" in ended.err) == (status in (401, 403))


def test_a_dashboard_that_says_nothing_is_not_waited_for(
    felrec: Felrec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "CONNECT_TIMEOUT_S", 0.3)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        ended = felrec("submit", "config.yaml", "--address", address)
    assert_failed(ended, "ConfigError", "no dashboard", "no answer within 0.3 s")
