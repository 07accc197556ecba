"""A report as one HTML page that needs nothing from outside, on a phone as on paper."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jinja2

from felrec_dist.config import dump_config
from felrec_dist.reporting import sections
from felrec_dist.reporting.plots import Style
from felrec_dist.reporting.runs import ComparedRuns, distinct
from felrec_dist.reporting.statistics import DatasetStatistics

_TEMPLATE = "page.html.j2"


def render(groups: Sequence[ComparedRuns], interaction: int | None = None) -> str:
    """Returns the page.

    Args:
        groups: of ``read_runs``; at least one.
        interaction: id of the test event whose similarities are shown; None chooses one.
    """
    runs = distinct(groups)
    labels = dict.fromkeys(run.label for group in groups for run in group.runs)
    styles = {
        label: Style.of(number) for number, label in enumerate([*labels, *sections.DRAWN_BASELINES])
    }
    statistics: dict[str, DatasetStatistics] = {}
    parts = [
        sections.what_was_run(runs),
        sections.data(runs, statistics),
        *(sections.results(number, group, styles) for number, group in enumerate(groups)),
        sections.training(runs, styles),
        sections.cache(runs, styles, statistics),
        sections.representations(runs, interaction),
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(_TEMPLATE).render(
        sections=[part for part in parts if part.tables or part.plots or part.notes],
        configs={
            run.url: dump_config(run.config).rstrip() for run in runs if run.config is not None
        },
        labels={run.url: run.label for run in runs},
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("felrec-dist"),
    )
