"""The table of several runs, letter by letter in each format, and the runs it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from felrec_dist.errors import ConfigError, InputError, StorageError
from felrec_dist.evaluation import report as reports
from felrec_dist.evaluation.compare import FORMATS, ReportedRun, compare
from felrec_dist.evaluation.report import report_url, write_report
from felrec_dist.evaluation.result import METRICS, Metrics

NAN = float("nan")
NUM_EVENTS = {"observed": 3678, "new_users": 772, "new_items": 1550, "total": 6000}


def metrics_of(*ranks: float | None) -> dict[str, Metrics]:
    """Made-up figures by partition, all of them following from the rank; None serves no event."""
    return {
        name: Metrics(num, 0, *[NAN] * 5)
        if rank is None
        else Metrics(num, num, rank, 1 - rank, (1 - rank) / 2, (1 - rank) / 4, (1 - rank) / 5)
        for (name, num), rank in zip(NUM_EVENTS.items(), ranks, strict=True)
    }


def partly(metrics: Metrics) -> Metrics:
    """The same means, over fewer events than there are."""
    return replace(metrics, num_served=metrics.num_events - 1)


def report(model: str, *ranks: float | None, **changes: Any) -> reports.TestReport:
    popular = metrics_of(0.25, 0.2351, 0.572, 0.332)
    base = reports.TestReport(
        model=model,
        variant="",
        variant_settings={"available_within": None},
        dataset="demo",
        dataset_digest="0123456789abcdef" * 4,
        split=[48_000, 6_000, 6_000],
        protocol="causal",
        candidates="training",
        k=10,
        num_negatives=100,
        seed=0,
        batch_size=64,
        checkpoint_url="runs/x/checkpoints/epoch-0002",
        epoch=2,
        training_loss=8.0,
        chance_loss=8.3,
        num_parameters=37_248,
        step_seconds=0.01234,
        epoch_seconds=9.26,
        rows={model: metrics_of(*ranks), "most popular": popular},
        occurrence={},
        popularity={},
    )
    return replace(base, **changes)


def two_runs() -> list[ReportedRun]:
    """One that serves everything, and one that serves the observed part only."""
    observed_only = report(
        "bpr-mf", 0.2504, None, None, 0.2504, num_parameters=1_000_000, step_seconds=None
    )
    rows = observed_only.rows["bpr-mf"]
    rows["total"] = partly(rows["total"])
    return [
        ReportedRun("runs/a", None, report("felrec-q", 0.295, 0.31, 0.23, 0.28)),
        ReportedRun("runs/b", "BPR_MF 100%", replace(observed_only, epoch_seconds=None)),
    ]


TITLE = "demo: test of 6,000 events, causal protocol, training candidates, 100 sampled negatives"

TEXT = f"""\
{TITLE}

                        observed           new users           new items               total
                    3,678 events          772 events        1,550 events        6,000 events
model            rank   HR@10 %      rank   HR@10 %      rank   HR@10 %      rank   HR@10 %   parameters  ms/step  s/epoch
felrec-q        0.295     70.50     0.310     69.00     0.230*    77.00*    0.280*    72.00*      37,248     12.3      9.3
BPR_MF 100%     0.250*    74.96         -         -         -         -         -         -    1,000,000        -        -
most popular    0.250*    75.00*    0.235*    76.49*    0.572     42.80     0.332     66.80            -        -        -

* best of its column
"""  # noqa: E501

MARKDOWN = f"""\
{TITLE}

| model | observed (3,678) MRR | new users (772) MRR | new items (1,550) MRR | total (6,000) MRR | parameters | ms/step | s/epoch |
| :-- | --: | --: | --: | --: | --: | --: | --: |
| felrec-q | 0.353 | 0.345 | **0.385** | **0.360** | 37,248 | 12.3 | 9.3 |
| BPR\\_MF 100% | **0.375** | - | - | - | 1,000,000 | - | - |
| most popular | **0.375** | **0.382** | 0.214 | 0.334 | - | - | - |
"""  # noqa: E501

LATEX = rf"""% {TITLE}
% needs \usepackage{{booktabs}}
\begin{{tabular}}{{lrrrrrrrrrrr}}
\toprule
 & \multicolumn{{2}}{{c}}{{observed}} & \multicolumn{{2}}{{c}}{{new users}} & \multicolumn{{2}}{{c}}{{new items}} & \multicolumn{{2}}{{c}}{{total}} &  &  &  \\
 & \multicolumn{{2}}{{c}}{{3,678 events}} & \multicolumn{{2}}{{c}}{{772 events}} & \multicolumn{{2}}{{c}}{{1,550 events}} & \multicolumn{{2}}{{c}}{{6,000 events}} &  &  &  \\
model & NDCG@10 & full HR@10 \% & NDCG@10 & full HR@10 \% & NDCG@10 & full HR@10 \% & NDCG@10 & full HR@10 \% & parameters & ms/step & s/epoch \\
\midrule
felrec-q & 0.176 & 14.10 & 0.172 & 13.80 & \textbf{{0.193}} & \textbf{{15.40}} & \textbf{{0.180}} & \textbf{{14.40}} & 37,248 & 12.3 & 9.3 \\
BPR\_MF 100\% & 0.187 & 14.99 & -- & -- & -- & -- & -- & -- & 1,000,000 & -- & -- \\
most popular & \textbf{{0.188}} & \textbf{{15.00}} & \textbf{{0.191}} & \textbf{{15.30}} & 0.107 & 8.56 & 0.167 & 13.36 & -- & -- & -- \\
\bottomrule
\end{{tabular}}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("form", "metrics", "expected"),
    [
        ("text", ["rank", "hr"], TEXT),
        ("markdown", ["mrr"], MARKDOWN),
        ("latex", ["ndcg", "full-hr"], LATEX),
    ],
)
def test_a_table_letter_by_letter(form: str, metrics: list[str], expected: str) -> None:
    assert FORMATS[form](compare(two_runs()), metrics) == expected


def test_json_has_everything() -> None:
    text = FORMATS["json"](compare(two_runs()), ["rank"])
    assert "NaN" not in text
    facts = json.loads(text)
    rows = facts.pop("rows")
    assert facts == {
        "dataset": "demo",
        "dataset_digest": "0123456789abcdef" * 4,
        "split": [48_000, 6_000, 6_000],
        "protocol": "causal",
        "candidates": "training",
        "available_within": None,
        "k": 10,
        "num_negatives": 100,
        "seed": 0,
    }
    costs = {"num_parameters": 37_248, "step_seconds": 0.01234, "epoch_seconds": 9.26}
    nothing = dict.fromkeys(costs)
    found = [{name: value for name, value in row.items() if name != "metrics"} for row in rows]
    assert found == [
        {"label": "felrec-q", "url": "runs/a", **costs},
        {"label": "BPR_MF 100%", "url": "runs/b", **nothing, "num_parameters": 1_000_000},
        {"label": "most popular", "url": None, **nothing},
    ]
    total = rows[1]["metrics"]["total"]
    assert (total["num_events"], total["num_served"], total["normalized_rank"]) == (
        6000,
        5999,
        0.2504,
    )
    assert rows[1]["metrics"]["new_items"]["mrr"] is None


@pytest.mark.parametrize("name", METRICS)
def test_the_best_of_each_column(name: str) -> None:
    """The lower rank of two, and the higher figure of any other metric."""
    runs = [
        ReportedRun("a", None, report("a", 0.1, 0.3, 0.5, 0.9)),
        ReportedRun("b", None, report("b", 0.2, 0.2, 0.6, 0.8)),
    ]
    cells = compare(runs).cells([name])
    assert [[cell.is_best for cell in row] for row in cells] == [
        [True, False, True, False],
        [False, True, False, False],
        [False, False, False, True],
    ]


def test_a_column_that_nothing_serves_has_no_best() -> None:
    lone = report("a", 0.1, None, None, 0.1)
    cells = compare([ReportedRun("a", None, replace(lone, rows={"a": lone.rows["a"]}))]).cells(
        ["hr"]
    )
    assert [(cell.text, cell.is_best) for cell in cells[0]] == [
        ("90.00", True),
        ("-", False),
        ("-", False),
        ("90.00", True),
    ]


ODD = "a\\b{c}_$&#%~^|<>*`[x]\n% \\end{tabular} \x85z"


def test_any_name_stays_in_its_cell() -> None:
    comparison = compare([ReportedRun("a", ODD, report("a", 0.1, 0.1, 0.1, 0.1, dataset=ODD))])
    latex = FORMATS["latex"](comparison, ["rank"]).splitlines()
    assert len(latex) == 12
    assert latex[0].startswith("% a\\b{c}_$&#%~^|<>*`[x] % \\end{tabular} z: test of")
    assert latex[8].startswith(
        r"a\textbackslash{}b\{c\}\_\$\&\#\%\textasciitilde{}\textasciicircum{}\textbar{}"
        r"\textless{}\textgreater{}*`[x] \% \textbackslash{}end\{tabular\} z & "
    )
    markdown = FORMATS["markdown"](comparison, ["rank"]).splitlines()
    assert len(markdown) == 6
    escaped = r"| a\\b{c}\_\$&\#%\~^\|\<\>\*\`\[x\] % \\end{tabular} z | "
    assert markdown[4].startswith(escaped)
    text = FORMATS["text"](comparison, ["rank"]).splitlines()
    assert len(text) == 9


def test_models_of_one_name_are_told_apart_by_their_folders() -> None:
    runs = [
        ReportedRun(url, label, report("felrec-q", 0.1, 0.1, 0.1, 0.1))
        for url, label in (("runs/a", None), ("s3://b/c/", None), ("runs/d", "mine"))
    ]
    labels = [row.label for row in compare(runs).rows]
    assert labels == ["felrec-q (a)", "felrec-q (c)", "mine", "most popular"]


@pytest.mark.parametrize("label", ["felrec-q", "most popular"])
def test_two_rows_of_one_name_are_refused(label: str) -> None:
    runs = [
        ReportedRun("runs/a", None, report("felrec-q", 0.1, 0.1, 0.1, 0.1)),
        ReportedRun("runs/b", label, report("felrec-p", 0.1, 0.1, 0.1, 0.1)),
    ]
    with pytest.raises(ConfigError, match=rf"(?s)one name.*runs/b.*got: {label}.*LABEL=URL"):
        compare(runs)


def test_free_baselines_of_other_batches_are_other_rows() -> None:
    large = report("b", 0.1, 0.1, 0.1, 0.1, batch_size=4096)
    large.rows["most popular"] = metrics_of(0.26, 0.26, 0.26, 0.26)
    runs = [
        ReportedRun("a", None, report("a", 0.1, 0.1, 0.1, 0.1)),
        ReportedRun("b", None, large),
        ReportedRun("c", None, report("c", 0.1, 0.1, 0.1, 0.1)),
    ]
    rows = compare(runs).rows
    labels = ["most popular (batch 64)", "most popular (batch 4,096)"]
    assert [row.label for row in rows] == ["a", "b", "c", *labels]
    assert rows[3].metrics == runs[0].report.rows["most popular"]
    assert rows[4].metrics == large.rows["most popular"]


DATA = "compare runs of one prepared data set"
AGAIN = r"felrec evaluate RUN/config\.yaml"


@pytest.mark.parametrize(
    ("changes", "got", "expected", "remedy"),
    [
        ({"dataset_digest": "f" * 64}, "data set f{16}", "data set 0123456789abcdef", DATA),
        (
            {"dataset_digest": "f" * 64, "split": [40_000, 6_000, 6_000]},
            "data set f{16}, split 40,000 / 6,000 / 6,000",
            "data set 0123456789abcdef, split 48,000 / 6,000 / 6,000",
            DATA,
        ),
        ({"protocol": "released"}, "protocol released", "protocol causal", AGAIN),
        ({"candidates": "growing"}, "candidates growing", "candidates training", AGAIN),
        (
            {"variant_settings": {"available_within": 7.5}},
            r"candidates training \(within 7\.5 days\)",
            "candidates training",
            AGAIN,
        ),
        ({"k": 5}, "k 5", "k 10", AGAIN),
        ({"num_negatives": 20}, "number of negatives 20", "number of negatives 100", AGAIN),
        ({"seed": 1}, "seed of the negatives 1", "seed of the negatives 0", AGAIN),
        (
            {"candidates": "growing", "k": 5},
            "candidates growing, k 5",
            "candidates training, k 10",
            AGAIN,
        ),
    ],
)
def test_runs_that_do_not_compare_are_refused(
    changes: dict[str, Any], got: str, expected: str, remedy: str
) -> None:
    """Also behind others that do, and with all that differs."""
    same = [
        ReportedRun(url, None, report(url, 0.1, 0.1, 0.1, 0.1, dataset=f"called {url}"))
        for url in ("runs/a", "runs/b")
    ]
    other = ReportedRun("runs/c", None, report("c", 0.1, 0.1, 0.1, 0.1, **changes))
    message = (
        rf"do not compare\n  where: runs/c\n  got: {got}\n  expected: {expected}, as in runs/a\n"
        rf"  remedy: .*{remedy}"
    )
    with pytest.raises(ConfigError, match=message):
        compare([*same, other])
    assert len(compare(same).rows) == 3


def test_under_the_released_protocol_popularity_is_still_causal() -> None:
    run = ReportedRun("a", None, report("a", 0.1, 0.1, 0.1, 0.1, protocol="released"))
    assert compare([run]).title.endswith("most and recently popular: causal")


@pytest.mark.parametrize(
    ("given", "label", "url"),
    [
        ("memory://here/a", None, "memory://here/a"),
        ("Q, 3 layers=memory://here/a", "Q, 3 layers", "memory://here/a"),
        ("memory://here/lr=0.1", None, "memory://here/lr=0.1"),
        ("x=memory://here/lr=0.1", "x", "memory://here/lr=0.1"),
    ],
)
def test_a_label_is_what_stands_before_the_first_equals_sign(
    given: str, label: str | None, url: str
) -> None:
    written = report("felrec-q", 0.1, None, 0.3, 0.4)
    write_report(url, written)
    run = ReportedRun.read(given, "causal")
    assert (run.label, run.url) == (label, url)
    assert repr(run.report) == repr(written), "NaN is unequal to itself; as text it is not"


def test_a_report_is_a_row_beside_the_plain_one_of_its_run() -> None:
    url = "memory://variants"
    write_report(url, report("felrec-q", 0.1, 0.1, 0.1, 0.1))
    write_report(url, report("felrec-q (reset)", 0.2, 0.2, 0.2, 0.2, variant="reset"))
    reset = f"{report_url(url, 'causal', 'reset')}.json"
    assert reset == "memory://variants/evaluation/test-causal-reset.json"
    comparison = compare([ReportedRun.read(run, "causal") for run in (url, reset)])
    assert [row.label for row in comparison.rows] == [
        "felrec-q",
        "felrec-q (reset)",
        "most popular",
    ]
    assert [row.url for row in comparison.rows] == [url, url, None]
    run = ReportedRun.read(f"Q, reset={reset}", "released")
    assert (run.label, run.report.variant) == ("Q, reset", "reset")
    message = r"no such report.*\n  where: .*test-causal-zero\.json"
    with pytest.raises(InputError, match=message):
        ReportedRun.read(f"{report_url(url, 'causal', 'zero')}.json", "causal")


def test_a_run_without_a_report_says_how_to_make_one() -> None:
    write_report("memory://there", report("a", 0.1, 0.1, 0.1, 0.1))
    message = r"(?s)no report .* released protocol.*there/evaluation/test-released.*felrec evaluate"
    with pytest.raises(InputError, match=message):
        ReportedRun.read("memory://there", "released")


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"rows": {}}', '{"model": "a", "rows": {"a": {"total": {"x": 1}}}}']
)
def test_a_report_of_something_else_is_named(content: str, tmp_path: Any) -> None:
    path = tmp_path / "evaluation" / "test-causal.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(InputError, match=r"(?s)not hold what it should.*test-causal\.json.*anew"):
        ReportedRun.read(str(tmp_path), "causal")


def test_a_storage_that_refuses_is_no_missing_report(tmp_path: Any) -> None:
    url = report_url(str(tmp_path), "causal")
    (tmp_path / "evaluation" / "test-causal.json").mkdir(parents=True)
    with pytest.raises(StorageError, match=rf"(?s)cannot be read.*{url}.*IsADirectoryError"):
        ReportedRun.read(str(tmp_path), "causal")
