"""A study as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from felrec_dist.studies.config import short_names
from felrec_dist.studies.figures import TRAINING_PHASES
from felrec_dist.studies.outcome import CellOutcome, Outlook, StudyOutcome

NOTHING = "-"


def to_markdown(outcome: StudyOutcome) -> str:
    """Returns the tables of a study: cells, check of the model, its constants, predictions."""
    finished = [o for o in outcome.cells if o.figures is not None]
    others = [o for o in outcome.cells if o.figures is None]
    parts = ["# Study", _where(finished), "## Speed", _speed(finished)]
    parts += ["## Traffic, cache and quality", _traffic(finished)]
    if others:
        parts += ["## Not finished", _not_finished(outcome, others)]
    if outcome.model is not None:
        parts += ["## Cost model", _check(outcome), _constants(outcome)]
    for outlook in outcome.outlooks:
        parts += [f"## Predicted: {outlook.section.hardware.name}", _outlook(outlook)]
    return "\n\n".join(parts) + "\n"


def _where(finished: Sequence[CellOutcome]) -> str:
    if not finished:
        return "No cell finished."
    machines = sorted({str(o.machine) for o in finished})
    dates = sorted({o.date for o in finished})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"Measured {days} on {'; '.join(machines)}. Medians after the warm-up; load is the average "
        "number of processes, its own and others, that ran or waited for a core."
    )


def _speed(finished: Sequence[CellOutcome]) -> str:
    heads = [*_setting_heads(finished), "events/s", "ms/step"]
    heads += [f"{phase} %" for phase in TRAINING_PHASES]
    heads += ["loader ms", "load"]
    rows = []
    for o in finished:
        assert o.figures is not None
        figures = o.figures
        total = max(sum(figures.phase_s.values()), 1e-12)
        rows.append(
            [
                *_settings(o),
                f"{figures.events_per_s:,.0f}",
                f"{1000 * figures.step_s:,.1f}",
                *(f"{100 * figures.phase_s[phase] / total:.0f}" for phase in TRAINING_PHASES),
                f"{1000 * sum(figures.loader_s.values()):,.1f}",
                NOTHING if o.load is None else f"{o.load:.1f}",
            ]
        )
    return _table(heads, rows)


def _traffic(finished: Sequence[CellOutcome]) -> str:
    heads = [*_setting_heads(finished), "hit %", "fetched kB/step", "written kB/step"]
    heads += ["gathered kB/step", "cache rows", "cache MB", "checkpoint s", "validation rank"]
    rows = []
    for o in finished:
        assert o.figures is not None
        figures = o.figures
        rows.append(
            [
                *_settings(o),
                f"{100 * figures.hit_rate:.1f}",
                f"{figures.fetched_bytes / 1e3:,.0f}",
                f"{figures.written_bytes / 1e3:,.0f}",
                f"{figures.gathered_bytes / 1e3:,.0f}",
                f"{figures.cache_rows:,}",
                f"{figures.cache_bytes / 1e6:,.1f}",
                f"{figures.checkpoint_s:.2f}",
                f"{figures.validation_rank:.4f}",
            ]
        )
    return _table(heads, rows)


def _not_finished(outcome: StudyOutcome, others: Sequence[CellOutcome]) -> str:
    heads = [*_setting_heads(others), "status", "why", "predicted events/s", "its limit"]
    rows = []
    for o in others:
        predicted = outcome.not_run.get(o.cell.name)
        rows.append(
            [
                *_settings(o),
                o.status,
                " ".join(o.reason.replace("|", "/").split()),
                f"{predicted.events_per_s:,.0f}" if predicted else NOTHING,
                predicted.limit if predicted else NOTHING,
            ]
        )
    return _table(heads, rows)


def _check(outcome: StudyOutcome) -> str:
    if not outcome.checks:
        return "Too few cells to check it: it takes three."
    rows = [
        [
            check.name,
            f"{1000 * check.measured_s:,.1f}",
            f"{1000 * check.predicted_s:,.1f}",
            f"{100 * check.error:+.0f}",
        ]
        for check in outcome.checks
    ]
    errors = sorted(abs(check.error) for check in outcome.checks)
    middle = errors[len(errors) // 2]
    return (
        "Each cell predicted by a model fitted to all others: median error "
        f"{100 * middle:.0f} %, largest {100 * errors[-1]:.0f} %.\n\n"
        + _table(["cell", "measured ms/step", "predicted ms/step", "error %"], rows)
    )


def _constants(outcome: StudyOutcome) -> str:
    assert outcome.model is not None
    rows = [[name, f"{value:.3g}"] for name, value in asdict(outcome.model.constants).items()]
    return _table(["constant", "measured"], rows)


def _outlook(outlook: Outlook) -> str:
    section = outlook.section
    hardware = section.hardware
    assumed = ", ".join(f"{name} {value:.3g}" for name, value in hardware.assumed.items())
    lines = [
        f"{hardware.workers_per_node} workers, {hardware.cores_per_node} cores and "
        f"{hardware.memory_per_node_gb:g} GB for shards a node; {section.shards_per_node} shards a "
        f"node, {section.events_per_worker:,} events a worker and step, "
        f"{section.hot_rows:,} hot rows a side.",
        f"Assumed, not measured: {assumed}." if assumed else "All constants as measured.",
    ]
    rows = [
        [
            f"{p.layout.cache_rows:,}",
            str(p.layout.num_workers),
            f"{p.events_per_s:,.0f}",
            f"{100 * outlook.efficiency(p):.0f}",
            f"{1000 * p.step_s:,.1f}",
            p.limit,
            _gigabytes(p.shard_memory_bytes) + ("" if outlook.fits(p) else " (too much)"),
            f"{p.checkpoint_s:,.0f}",
        ]
        for p in outlook.predictions
    ]
    heads = ["cache rows", "workers", "events/s", "of ideal %", "ms/step", "limit"]
    table = _table([*heads, "GB a node", "checkpoint s"], rows)
    return "\n\n".join([" ".join(lines), table, _first_limits(outlook)])


def _first_limits(outlook: Outlook) -> str:
    lines = []
    for cache_rows in outlook.section.cache_rows:
        predictions = outlook.of_rows(cache_rows)
        start = predictions[0]
        turn = next((p for p in predictions if p.limit != start.limit), None)
        enough = next((p for p in predictions if outlook.fits(p)), None)
        memory = (
            f"memory suffices from {enough.layout.num_workers} workers on"
            if enough
            else "no layout has the memory"
        )
        then = (
            f"then {turn.limit} from {turn.layout.num_workers} workers on"
            if turn
            else f"up to {predictions[-1].layout.num_workers} workers"
        )
        lines.append(f"- {cache_rows:,} rows: {start.limit} binds first, {then}; {memory}.")
    return "\n".join(lines)


def _setting_heads(outcomes: Sequence[CellOutcome]) -> list[str]:
    return list(short_names(list(outcomes[0].cell.settings)).values()) if outcomes else []


def _settings(outcome: CellOutcome) -> list[str]:
    values = outcome.cell.settings.values()
    return [
        NOTHING if value is None else f"{value:,}" if type(value) is int else str(value)
        for value in values
    ]


def _gigabytes(num_bytes: float) -> str:
    amount = num_bytes / 1e9
    return f"{amount:,.1f}" if amount >= 1.0 else f"{amount:.3f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
