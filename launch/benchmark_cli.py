"""``felrec benchmark``: every figure of speed, as a command."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from felrec_dist.errors import ConfigError

if TYPE_CHECKING:
    from benchmarks.measure import Report

PAGE_WIDTH = 140
ALL = "all"


def benchmark(
    name: Annotated[
        str,
        typer.Argument(
            help="loader, encoder, step, end-to-end, evaluate, workers, prepare, cache, growth, "
            "nodes, or all"
        ),
    ] = ALL,
    goals: Annotated[
        bool, typer.Option("--goals", help="hold the ratios against the goals; exit code 1 if not")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="small sizes: shows that it runs, not how fast")
    ] = False,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="of the model")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="of a process, for torch")] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout, and nothing else there")
    ] = False,
) -> None:
    """Measure both sides in turn, in one run: medians and their ratios."""
    import torch

    from benchmarks import goals as goal_table
    from benchmarks import registry

    known = registry.names()
    if name != ALL and name not in known:
        raise ConfigError(
            "there is no such benchmark",
            where="felrec benchmark",
            got=name,
            expected=f"{', '.join(known)} or {ALL}",
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "no CUDA device is available", where="felrec benchmark", got="--device cuda"
        )
    torch.set_num_threads(threads)
    chosen = known if name == ALL else (name,)
    wanted = [goal for goal in goal_table.GOALS if goal.benchmark in chosen]
    if goals:
        chosen = tuple(one for one in known if any(goal.benchmark == one for goal in wanted))
        if not chosen:
            raise ConfigError(
                "no goal belongs to this benchmark",
                where="felrec benchmark --goals",
                got=name,
                expected=", ".join(sorted({goal.benchmark for goal in goal_table.GOALS})),
            )
    page = Console(stderr=as_json)
    if not page.is_terminal:
        page.width = max(page.width, PAGE_WIDTH)

    reports: list[Report] = []
    for one in chosen:
        found = registry.run(one, quick=quick, device=torch.device(device))
        reports += found
        for report in found:
            report.show(page)
    outcomes = goal_table.outcomes(reports, wanted) if goals else []
    if goals:
        goal_table.show(outcomes, page)
    if as_json:
        facts: dict[str, object] = {"reports": [asdict(report) for report in reports]}
        if goals:
            facts["goals"] = goal_table.to_rows(outcomes)
        typer.echo(json.dumps(facts, indent=1))
    if any(outcome.holds is False for outcome in outcomes):
        raise typer.Exit(1)
