"""``felrec scale``: a study of what runs cost, measured and predicted."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from launch.stopping import stoppable


def scale(
    study: Annotated[str, typer.Argument(help="a YAML file; see configs/studies/")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of the study, as out=runs/again")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="one process, no Ray; cells of one worker")
    ] = False,
) -> None:
    """Run a grid of trainings; write a table, plots, and what larger machines would do.

    Run again, it skips the cells that have finished. Exit code 1 if a cell failed.
    """
    # Hours of training are not for a report that cannot be drawn.
    import matplotlib  # noqa: F401

    from felrec_dist.studies.config import load_study
    from launch import scale as studies
    from launch.progress import TerminalProgress

    config, cells = load_study(study, overrides or [])
    console = Console()
    with stoppable(console) as should_stop, TerminalProgress(console) as progress:
        outcome = studies.run(
            config, cells, local=local, progress=progress, should_stop=should_stop
        )
    for url in studies.write_report(outcome):
        typer.echo(url)
    typer.echo(f"TensorBoard: tensorboard --logdir {config.out}/{studies.HPARAMS}")
    statuses = [cell.status for cell in outcome.cells]
    typer.echo(
        ", ".join(f"{statuses.count(one)} {one}" for one in ("finished", "failed", "not run"))
    )
    if "failed" in statuses:
        raise typer.Exit(1)
