"""Runs as jobs of a Ray cluster, from a machine that is no part of it: files and the command go to
the cluster's dashboard over HTTP, what the driver prints comes back.

A run's jobs are ``felrec-<folder>-<digest of its address>-<n>``: Ray takes each name once.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from queue import Empty, Queue
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray.exceptions
from ray.job_submission import JobStatus, JobSubmissionClient

from felrec_dist.config import ExperimentConfig, load_config, with_absolute_paths
from felrec_dist.errors import ConfigError, WorkerFailedError
from launch.on_ray import check_reachable, no_cluster, not_let_in, run_digest

CONNECT_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 60.0
UPLOAD_TIMEOUT_S = 600.0
# A dashboard that is started again, or a network that is gone for a while, ends no run.
LOST_TIMEOUT_S = 120.0
POLL_S = 2.0
# After SIGTERM Ray gives a driver 3 s and kills it; the last checkpoint takes longer.
STOP_TIMEOUT_S = 600

# What storages are told through the environment: the driver, the workers and the shards get these.
# Variables that name files of this machine (AWS_PROFILE, AWS_CONFIG_FILE) are not among them.
FORWARDED = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "FSSPEC_*",
)
NOT_FORWARDED = ("FSSPEC_CONFIG_DIR",)
# Beside what .gitignore and .rayignore name.
EXCLUDED = (".git", ".venv", "data", "runs")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Submission:
    """What goes to the cluster.

    Attributes:
        name: of the run's jobs, without their number.
        run_url: the run's folder, absolute.
        entrypoint: the driver's command.
        working_dir: the folder that is uploaded.
        excludes: what of it is not, in the words of .gitignore.
        env_vars: of driver, workers and shards; may hold secrets, and is not shown.
    """

    name: str
    run_url: str
    entrypoint: str
    working_dir: Path
    excludes: tuple[str, ...]
    env_vars: Mapping[str, str] = field(repr=False)

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Returns it in Ray's words."""
        return {
            "working_dir": str(self.working_dir),
            "excludes": list(self.excludes),
            "env_vars": dict(self.env_vars),
        }


def prepare(
    config_url: str,
    overrides: Sequence[str],
    *,
    working_dir: str = ".",
    resume: bool = True,
    environment: Mapping[str, str],
    more_env: Sequence[str] = (),
) -> Submission:
    """Checks a run here, before anything is sent.

    Args:
        config_url: the YAML file, within ``working_dir``, or any fsspec URL.
        overrides: ``key=value``.
        working_dir: the folder to upload.
        resume: whether to go on from the newest checkpoint.
        environment: of this process.
        more_env: names of further variables to forward.

    Raises:
        ConfigError: the config is wrong or is not among what is uploaded, or a variable is not set.
    """
    typed = load_config(config_url, overrides)
    config = with_absolute_paths(typed)
    folder = Path(working_dir).resolve()
    if not folder.is_dir():
        raise ConfigError("the working directory is no folder", where=working_dir)
    excluded = _excluded(config, folder)
    command = ["felrec", "train", _config_in_job(config_url, folder, excluded), *overrides]
    # The job runs in another folder, which is removed.
    for key, before, after in (
        ("data.url", typed.data.url, config.data.url),
        ("run.url", typed.run.url, config.run.url),
    ):
        if before != after:
            command.append(f"{key}={after}")
    if not resume:
        command.append("--no-resume")
    last = re.sub(r"[^\w-]+", "-", config.run.url.rstrip("/").rpartition("/")[2])[:40]
    return Submission(
        name=f"felrec-{last}-{run_digest(config.run.url)}",
        run_url=config.run.url,
        entrypoint=shlex.join(command),
        working_dir=folder,
        excludes=tuple(f"/{path.as_posix()}" for path in excluded),
        env_vars={
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_TIMEOUT_S),
            **_forwarded(environment, more_env),
        },
    )


class Cluster:
    """The jobs of a Ray cluster.

    Args:
        address: of its dashboard, as ``http://10.0.0.1:8265``, or of its head, as
            ``10.0.0.1:6379``; None takes RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the Ray of this
            machine.

    Raises:
        ConfigError: no cluster answers there, it has no dashboard, or it does not let us in.
    """

    def __init__(self, address: str | None = None) -> None:
        variables = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
        address = address or next(filter(None, map(os.environ.get, variables)), None)
        self.where = address or "this machine"
        if address:
            _check_reachable(address)

        def connect() -> JobSubmissionClient:
            # Ray itself would prefer RAY_ADDRESS to what was typed.
            with _environment("RAY_API_SERVER_ADDRESS", address):
                return JobSubmissionClient(address)

        try:
            self._client = _within(CONNECT_TIMEOUT_S, connect)
        except ray.exceptions.AuthenticationError as error:
            raise not_let_in(self.where, error) from error
        except ConnectionError as error:
            raise no_cluster(self.where, error) from error
        except Exception as error:  # of whatever else listens there
            raise ConfigError(
                "no dashboard of a Ray cluster answers: jobs are submitted to it",
                where=self.where,
                got=f"{type(error).__name__}: {error}",
                expected="the address of a dashboard, as http://10.0.0.1:8265",
                remedy="start the head with ray[default] installed and --dashboard-host 0.0.0.0, "
                "or forward its port 8265",
            ) from error
        self.address: str = self._client.get_address()

    def submit(self, submission: Submission) -> str:
        """Uploads the files and starts the driver; returns the job's id.

        Raises:
            ConfigError: a job of the run is going on, or the files are too large.
        """
        numbered = re.compile(rf"{re.escape(submission.name)}-(\d+)")
        last = 0
        for job in self._answer("list_jobs"):
            match = numbered.fullmatch(job.submission_id or "")
            if match is None:
                continue
            if not job.status.is_terminal():
                raise self._is_going_on(submission, job.submission_id)
            last = max(last, int(match[1]))
        submission_id = f"{submission.name}-{last + 1}"
        try:
            self._ask(
                "submit_job",
                limit_s=UPLOAD_TIMEOUT_S,
                entrypoint=submission.entrypoint,
                submission_id=submission_id,
                runtime_env=submission.runtime_env,
                metadata={"run": submission.run_url},
            )
        except RuntimeError as error:
            if "already exists" in str(error):  # somebody else was faster
                raise self._is_going_on(submission, submission_id) from error
            if any(words in str(error) for words in ("exceeds the maximum size", "code 413")):
                raise ConfigError(
                    "the working directory is too large to upload",
                    where=str(submission.working_dir),
                    got=str(error).strip().splitlines()[-1],
                    expected="at most 100 MiB as a zip file",
                    remedy="name large files in .gitignore or .rayignore, or upload another "
                    "folder, such as one with the config alone: --working-dir",
                ) from error
            raise ConfigError(
                "the cluster does not take the job", where=self.address, got=error
            ) from error
        except OSError as error:  # no connection, or no answer in time
            raise ConfigError(
                "nobody knows whether the cluster has taken the job",
                where=f"{self.address}, job {submission_id}",
                got=f"{type(error).__name__}: {error}",
                remedy="look with ray job list; submitted again, it is refused while the first "
                "goes on",
            ) from error
        return submission_id

    def tail(self, submission_id: str, chunks: Queue[str | None]) -> None:
        """Puts what the driver prints into a queue, from its first line on; None is the end, of
        the job or of the connection.
        """

        async def tail() -> None:
            async for chunk in self._client.tail_job_logs(submission_id):
                chunks.put(chunk)

        try:
            with suppress(Exception):  # whatever broke: the job's state tells whether it goes on
                asyncio.run(tail())
        finally:
            chunks.put(None)

    def job(self, submission_id: str) -> Any:
        """Returns Ray's details of a job."""
        return self._ask("get_job_info", job_id=submission_id)

    def printed(self, submission_id: str) -> str:
        """Returns all that the driver has printed."""
        return str(self._ask("get_job_logs", job_id=submission_id))

    def stop(self, submission_id: str) -> None:
        """Asks a job to end: its driver gets SIGTERM, and takes a checkpoint."""
        self._answer("stop_job", job_id=submission_id)

    def _ask(self, method: str, *, limit_s: float = REQUEST_TIMEOUT_S, **arguments: Any) -> Any:
        return _within(limit_s, lambda: getattr(self._client, method)(**arguments))

    def _answer(self, method: str, **arguments: Any) -> Any:
        try:
            return self._ask(method, **arguments)
        except (OSError, RuntimeError) as error:  # Ray's and requests' errors are among them
            raise ConfigError(
                "the cluster does not answer",
                where=self.address,
                got=f"{method}: {type(error).__name__}: {error}",
                remedy="look at the cluster's head, and try again",
            ) from error

    def _is_going_on(self, submission: Submission, submission_id: str) -> ConfigError:
        return ConfigError(
            "a job of this run is going on: two would write over each other's files",
            where=submission.run_url,
            got=submission_id,
            remedy=f"follow it with ray job logs -f {submission_id}, or stop it with "
            f"ray job stop {submission_id}; or give this one a run.url of its own",
        )


class Follower:
    """Passes on what a job's driver prints, until the job ends.

    Args:
        cluster: that runs it.
        submission_id: of the job.
        write: takes what is new.
        lost_timeout_s: for how long the cluster may not answer.
    """

    def __init__(
        self,
        cluster: Cluster,
        submission_id: str,
        write: Callable[[str], None],
        lost_timeout_s: float = LOST_TIMEOUT_S,
    ) -> None:
        self._cluster = cluster
        self._id = submission_id
        self._write = write
        self._lost_timeout_s = lost_timeout_s
        self._num_written = 0

    def wait(self) -> int:
        """Returns the run's exit code; may be called again after an interrupt.

        Raises:
            ConfigError: the cluster does not answer any more.
            WorkerFailedError: the job ended, and Ray knows no exit code of its command.
        """
        while True:
            job = self._follow_connection() or self._ask(self._cluster.job)
            if job.status.is_terminal():
                # What a connection that broke, or says nothing, has not brought.
                self._pass_on(self._ask(self._cluster.printed)[self._num_written :])
                return self._exit_code(job)
            time.sleep(POLL_S)

    def _follow_connection(self) -> Any:
        """Returns the job once it has ended, or None if the connection was lost."""
        chunks: Queue[str | None] = Queue()
        threading.Thread(
            target=self._cluster.tail, args=(self._id, chunks), name="job logs", daemon=True
        ).start()
        # A new connection begins with the first line.
        to_skip = self._num_written
        while True:
            try:
                chunk = chunks.get(timeout=POLL_S)
            except Empty:
                job = self._ask(self._cluster.job)
                if not job.status.is_terminal():
                    continue
                return job
            if chunk is None:
                return None
            self._pass_on(chunk[to_skip:])
            to_skip = max(0, to_skip - len(chunk))

    def _pass_on(self, text: str) -> None:
        self._write(text)
        self._num_written += len(text)

    def _ask(self, question: Callable[[str], _T]) -> _T:
        deadline = time.monotonic() + self._lost_timeout_s
        while True:
            try:
                return question(self._id)
            except Exception as error:  # of HTTP and of Ray
                if time.monotonic() >= deadline:
                    raise ConfigError(
                        "the cluster does not answer any more; the job may go on",
                        where=f"{self._cluster.address}, job {self._id}",
                        got=f"{type(error).__name__}: {error}",
                        remedy="look at the cluster's head; when it is back, "
                        f"ray job logs -f {self._id}",
                    ) from error
            time.sleep(POLL_S)

    def _exit_code(self, job: Any) -> int:
        if job.status == JobStatus.STOPPED:
            return 128 + signal.SIGTERM
        if job.status == JobStatus.SUCCEEDED:
            return 0
        code: int | None = job.driver_exit_code
        if code is None:
            raise WorkerFailedError(
                "the job ended, and not by the end of its command",
                where=f"{self._cluster.address}, job {self._id}",
                got=job.message,
                remedy="look at the head's memory and logs; submitted again, the run goes on from "
                "its newest checkpoint",
            )
        # A process that a signal ended.
        return code if code >= 0 else 128 - code


def _config_in_job(config_url: str, folder: Path, excluded: Sequence[Path]) -> str:
    """Returns the config's address as the job sees it."""
    if "://" in config_url or "::" in config_url:
        return config_url
    path = Path(config_url).resolve()
    if not path.is_relative_to(folder):
        raise ConfigError(
            "the config is not in the folder that is uploaded",
            where=config_url,
            expected=f"a file in {folder}, or a URL such as s3://bucket/config.yaml",
            remedy="upload the folder that it is in: --working-dir",
        )
    inside = path.relative_to(folder)
    for other in excluded:
        if inside.is_relative_to(other):
            raise ConfigError(
                "the config lies in a folder that is not uploaded",
                where=config_url,
                expected=f"a file outside of {other}/",
                remedy="copy it, or upload the folder that it is in: --working-dir",
            )
    return inside.as_posix()


def _excluded(config: ExperimentConfig, folder: Path) -> list[Path]:
    """Returns what is not uploaded, relative to the working directory."""
    found = [Path(name) for name in EXCLUDED]
    for url in (config.data.url, config.run.url):
        path = Path(url.removeprefix("file://"))
        if path.is_relative_to(folder) and path != folder:
            found.append(path.relative_to(folder))
    return list(dict.fromkeys(found))


def _forwarded(environment: Mapping[str, str], more: Sequence[str]) -> dict[str, str]:
    missing = [name for name in more if name not in environment]
    if missing:
        raise ConfigError(
            "a variable that is to be forwarded is not set",
            where="--env",
            got=", ".join(name.partition("=")[0] for name in missing),
            expected="names of variables of this environment, without values",
        )
    return {
        name: value
        for name, value in environment.items()
        if name in more
        or (any(fnmatchcase(name, pattern) for pattern in FORWARDED) and name not in NOT_FORWARDED)
    }


def _check_reachable(address: str) -> None:
    """Asks whether anybody listens; Ray itself would try for minutes."""
    parts = urlsplit(address)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        check_reachable(address, parts.hostname, port)
    elif "://" not in address:
        host, _, port_text = address.rpartition(":")
        if port_text.isdecimal():
            check_reachable(address, host, int(port_text))


def _within(limit_s: float, call: Callable[[], _T]) -> _T:
    """Returns what the call returns, or raises what it raises; Ray's own have no time limit.

    Raises:
        TimeoutError: it did neither in time.
    """
    answers: Queue[tuple[_T | None, Exception | None]] = Queue()

    def answer() -> None:
        try:
            answers.put((call(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=answer, name="request to Ray", daemon=True).start()
    try:
        value, error = answers.get(timeout=limit_s)
    except Empty:
        raise TimeoutError(f"no answer within {limit_s:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # None only if the call returned it


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Sets a variable while the body runs, unless the value is None."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
