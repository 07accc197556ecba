"""The examples run from top to bottom, at small sizes, one after the other."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = (
    "model.encoder.width=8",
    "model.encoder.feedforward_width=16",
    "model.encoder.history_length=4",
    "model.encoder.num_layers=1",
    "model.encoder.num_heads=2",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for one another cost more than tiny sums take."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> dict[str, Any]:
    """Returns the variables that the script ends with."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
def test_own_data_and_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = run(
        monkeypatch,
        "my_own_data.py",
        "--out",
        tmp_path,
        "--num-events",
        960,  # whole batches: every item of training and validation is in the cache
        *SMALL,
    )
    out = capsys.readouterr().out
    assert "960 events" in out
    assert "most popular: rank" in out
    dataset = ended["dataset"]
    # The names are those of the CSV, and the list is from the best on, without what comes later.
    best = ended["top_items"](0, 500)
    clicked = {line.split(",")[1].strip('"') for line in ended["csv"].read_text().splitlines()[1:]}
    assert {name for name, _ in best} == clicked
    cosines = [cosine for _, cosine in best]
    assert cosines == sorted(cosines, reverse=True)
    num_known = int(np.isfinite(cosines).sum())
    assert num_known == int((dataset.items.first_positions < dataset.split.test.start).sum())
    assert max(cosines) <= 1 + 1e-6

    ended = run(monkeypatch, "reading_a_cache.py", tmp_path / "run")
    out = capsys.readouterr().out
    assert f"{num_known:,} of {dataset.num_items:,} items, 8 numbers" in out
    assert ended["age"]["rows"] == sum(each.total_rows for each in ended["contents"].values())
    assert len(ended["nearest"]) == 5


@pytest.mark.slow
def test_from_movielens_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a file of its form, since the data themselves are not to be had here."""
    generator = np.random.default_rng(0)
    times = np.sort(generator.integers(874_724_710, 893_286_638, 1000))
    rows = zip(generator.integers(1, 60, 1000), generator.zipf(1.4, 1000) % 90, times, strict=True)
    ratings = tmp_path / "u.data"
    ratings.write_text("".join(f"{user}\t{item}\t4\t{time}\n" for user, item, time in rows))
    again = ("--out", tmp_path / "out", "--ratings", ratings, *SMALL, "data.batch_size=32")
    run(monkeypatch, "movielens_to_report.py", *again)
    out = capsys.readouterr().out
    assert "felrec-q" in out
    assert "felrec-p" in out
    assert "Training loss: felrec-p" in (tmp_path / "out/report.html").read_text()
