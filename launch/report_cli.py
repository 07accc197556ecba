"""``felrec report``: runs as one page."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

PAGE = "index.html"


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="folders of tested runs, each URL or LABEL=URL, or of a suite with all its runs",
        ),
    ],
    out: Annotated[str, typer.Option(help="folder of the page, any fsspec URL")] = "report",
    protocol: Annotated[
        Literal["causal", "released"], typer.Option(help="whose tests of runs to show")
    ] = "causal",
    interaction: Annotated[
        int | None,
        typer.Option(
            help="event_id of the test event whose similarities are shown; default: the first one "
            "with full histories"
        ),
    ] = None,
) -> None:
    """Write one HTML page: data, tables, figures of the paper, training, cache.

    The page needs no network and holds no script. Runs that were not tested alike stand in tables
    of their own.
    """
    from felrec_dist.reporting.page import render
    from felrec_dist.reporting.runs import read_runs
    from felrec_dist.storage import write_whole

    url = f"{out.rstrip('/')}/{PAGE}"
    page = render(read_runs(runs, protocol), interaction)
    write_whole(url, page.encode(), "the report cannot be written")
    typer.echo(url)
