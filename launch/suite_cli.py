"""``felrec suite``: many runs and tests in one command, and their tables."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from felrec_dist.errors import ConfigError, FelrecError
from launch.stopping import StopRequest, stop_requests

if TYPE_CHECKING:
    from felrec_dist.evaluation.suite import Job, Suite

_FAILED = 1
_POLL_S = 0.2
_LAST_LINES = 12


def suite(
    config: Annotated[str, typer.Argument(help="a YAML file; see configs/suites/")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value over all runs and tests")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="runs and tests of these names, as 'ml-100k_*'; may be repeated"),
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="runs that go on at the same time")] = 1,
    local: Annotated[bool, typer.Option("--local", help="each in one process, no Ray")] = False,
    logs: Annotated[
        Path | None,
        typer.Option(help="folder for what each prints; default: logs in that of the runs"),
    ] = None,
) -> None:
    """Train and test all that a suite names, skip what is done, write its tables.

    Started again, it goes on where it was stopped, also within a run. What fails is told at the
    end, and holds up only the tests of its run.
    """
    from felrec_dist.evaluation.suite import load_suite

    whole = load_suite(config, overrides or [])
    names = _chosen(whole, only)
    folder = logs or whole.local_logs
    if folder is None:
        raise ConfigError(
            "what runs print is written to this machine",
            where="felrec suite",
            got=f"out: {whole.config.out}, and no --logs",
            expected="--logs FOLDER",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with stop_requests(lambda text: typer.echo(text, err=True)) as should_stop:
        conductor = _Conductor(whole, names, folder, local, should_stop)
        failed = conductor.perform(at_once)
        if should_stop():
            typer.echo("stopped; the same command goes on", err=True)
            raise typer.Exit(should_stop.exit_code)
    from felrec_dist.evaluation.suite import write_tables

    for text in write_tables(whole):
        typer.echo(text)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(_FAILED)


def _chosen(whole: Suite, patterns: Sequence[str] | None) -> set[str]:
    names = set(whole.jobs)
    if not patterns:
        return names
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                "no run or test of the suite has such a name",
                where="--only",
                got=pattern,
                expected=", ".join(sorted(names)),
            )
    chosen = {name for name in names if any(fnmatchcase(name, p) for p in patterns)}
    # A test needs what it tests.
    return chosen | {job.of.name for name in chosen if (job := whole.jobs[name]).of is not None}


class _Conductor:
    """Performs jobs as processes of their own; a run and its tests one after the other."""

    def __init__(
        self, whole: Suite, names: set[str], logs: Path, local: bool, should_stop: StopRequest
    ) -> None:
        self.whole = whole
        self.names = names
        self.logs = logs
        self.local = local
        self.should_stop = should_stop
        self._count = 0
        self._lock = threading.Lock()
        self._ends_now = threading.Event()

    def perform(self, at_once: int) -> list[str]:
        """Returns the names of those that failed, or could not be begun since their run failed."""
        runs = [job for job in self.whole.jobs.values() if job.of is None]
        with ThreadPoolExecutor(at_once) as pool:
            try:
                return [name for failed in pool.map(self._chain, runs) for name in failed]
            except BaseException:  # asked twice
                self._ends_now.set()
                raise

    def _chain(self, run: Job) -> list[str]:
        jobs = [job for job in (run, *self.whole.tests_of(run)) if job.name in self.names]
        failed: list[str] = []
        for job in jobs:
            if self.should_stop() or self._ends_now.is_set():
                break
            if failed[:1] == [run.name] or not self._do(job):
                failed.append(job.name)
        return [] if self.should_stop() else failed

    def _do(self, job: Job) -> bool:
        with self._lock:
            self._count += 1
            place = f"[{self._count}/{len(self.names)}] {job.name}"
        try:
            if job.is_done():
                typer.echo(f"{place}: done before")
                return True
            log = self.logs / f"{job.name}.log"
            typer.echo(f"{place}: {'training' if job.of is None else 'testing'}, log {log}")
            began = time.monotonic()
            code = self._run(job.command(local=self.local), log)
            seconds = time.monotonic() - began
            if code == 0:
                job.leave_note(seconds)
        except FelrecError as error:
            typer.echo(f"{place}: {type(error).__name__}: {error}", err=True)
            return False
        if code == 0:
            typer.echo(f"{place}: done in {seconds:,.0f} s")
        elif not self.should_stop():
            last = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
            text = "\n".join(f"  {line}" for line in last)
            typer.echo(
                f"{place}: failed with exit code {code}; the end of {log}:\n{text}", err=True
            )
        return code == 0

    def _run(self, arguments: Sequence[str], log: Path) -> int:
        """Returns the exit code; a stop that is asked of us is asked of the process, once."""
        with (
            log.open("wb") as file,
            # A session of its own: a terminal's Ctrl-C would reach it twice.
            subprocess.Popen(
                [sys.executable, "-m", "launch", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            was_asked = False
            while process.poll() is None:
                if self.should_stop.signal is not None and not was_asked:
                    process.send_signal(self.should_stop.signal)
                    was_asked = True
                if self._ends_now.wait(_POLL_S):
                    process.kill()
            return process.returncode
