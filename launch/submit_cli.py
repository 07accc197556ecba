"""``felrec submit``: ``felrec train`` as a job of a Ray cluster."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from launch.submission import Cluster

INTERRUPTED = 130


def submit(
    config: Annotated[str, typer.Argument(help="a YAML file in the working directory, or a URL")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as training.seed=1")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="of the dashboard, as http://10.0.0.1:8265; default: RAY_API_SERVER_ADDRESS, "
            "RAY_ADDRESS, or the Ray of this machine"
        ),
    ] = None,
    working_dir: Annotated[
        str, typer.Option(help="folder to upload, without .git, .venv, data, runs, .gitignore's")
    ] = ".",
    env: Annotated[
        list[str] | None,
        typer.Option(help="NAME of a variable to forward, beside those of S3 and FSSPEC_*"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(help="go on from the run's newest checkpoint, or refuse to if there is one"),
    ] = True,
    wait: Annotated[
        bool, typer.Option(help="follow the run to its end, or print the job's id and return")
    ] = True,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt", help="Ctrl-C stops the job, too")
    ] = False,
) -> None:
    """Train on a Ray cluster, from elsewhere: submit the run as a job and follow it.

    Exit code: the run's. Submitted again, the run goes on from its newest checkpoint.
    """
    from launch import submission

    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    prepared = submission.prepare(
        config,
        overrides or [],
        working_dir=working_dir,
        resume=resume,
        environment=os.environ,
        more_env=env or [],
    )
    cluster = submission.Cluster(address)
    say(f"{prepared.entrypoint}\nto {cluster.address}, with {prepared.working_dir}")
    say(f"variables: {', '.join(sorted(prepared.env_vars))}")
    submission_id = cluster.submit(prepared)
    if not wait:
        typer.echo(submission_id)
        return
    say(f"job {submission_id}; to stop it: {_ray_job('stop', cluster, submission_id)}")
    follower = submission.Follower(cluster, submission_id, lambda text: typer.echo(text, nl=False))
    try:
        raise typer.Exit(follower.wait())
    except KeyboardInterrupt:
        if not stop_on_interrupt:
            say(f"the job goes on; to follow it: {_ray_job('logs -f', cluster, submission_id)}")
            raise typer.Exit(INTERRUPTED) from None
    say("stopping the job; its driver takes a checkpoint first")
    cluster.stop(submission_id)
    try:
        raise typer.Exit(follower.wait())
    except KeyboardInterrupt:
        say("the job was asked to stop, and may still be at it")
        raise typer.Exit(INTERRUPTED) from None


def _ray_job(command: str, cluster: Cluster, submission_id: str) -> str:
    return f"ray job {command} --address {cluster.address} {submission_id}"
