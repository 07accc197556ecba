"""``felrec compare``: the tests of several runs in one table."""

from __future__ import annotations

from typing import Annotated, Literal

import typer


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="folders of tested runs, or reports in them such as evaluation/test-causal-reset"
            ".json; each URL or LABEL=URL",
        ),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="rank, hr, mrr, ndcg or full-hr (HR among all candidates); may be repeated; "
            "default: rank and hr, as in the paper"
        ),
    ] = None,
    form: Annotated[
        Literal["text", "markdown", "json", "latex"], typer.Option("--format", help="of the table")
    ] = "text",
    protocol: Annotated[
        Literal["causal", "released"], typer.Option(help="whose report to read of a folder")
    ] = "causal",
    out: Annotated[
        str | None, typer.Option(help="file to write to, any fsspec URL; default: stdout")
    ] = None,
) -> None:
    """Print one table of several runs: models by partition, parameters, time per step and epoch.

    Runs that were not tested alike are refused: another data set or split, other candidates, k or
    negatives.
    """
    from felrec_dist.evaluation import compare as tables
    from felrec_dist.evaluation.result import METRICS, PAPER_METRICS
    from felrec_dist.storage import write_whole

    metrics = metric or PAPER_METRICS
    if unknown := [name for name in metrics if name not in METRICS]:
        raise typer.BadParameter(
            f"{unknown[0]!r} is not one of {', '.join(METRICS)}", param_hint="--metric"
        )
    comparison = tables.compare([tables.ReportedRun.read(run, protocol) for run in runs])
    text = tables.FORMATS[form](comparison, metrics)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_whole(out, text.encode(), "the table cannot be written")
        typer.echo(out)
