"""What the figures of a report show of awkward data."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from felrec_dist.reporting.cold_start import Bucket
from felrec_dist.reporting.plots import Style, buckets_plot, similarities_plot
from felrec_dist.reporting.representations import Similarities


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize(
    ("num_buckets", "expected"),
    [
        (6, ["1", "2", "4", "8", "16", "32"]),
        (17, ["1", "4", "16", "64", "256", "1024", "4096", "16384", "65536"]),
    ],
)
def test_labels_of_many_buckets_have_room(num_buckets: int, expected: list[str]) -> None:
    buckets = [Bucket(str(2**n), 10, 10, 50.0, 70.0) for n in range(num_buckets)]
    plot = buckets_plot(
        "n", "t", "c", {"a run": (Style.of(0), buckets)}, x_label="x", y_label="y", most=100.0
    )
    found = texts(plot.svg)
    first = found.index("1")
    assert found[first : first + len(expected)] == expected
    assert found[first + len(expected)] == "x"
    # The interval reaches to 120, the axis does not.
    assert "100" in found
    assert "120" not in found


def test_vectors_that_are_all_alike_have_readable_cosines() -> None:
    cosines = 1.0 - 1e-9 * np.arange(12.0).reshape(3, 4)
    plot = similarities_plot("n", "a run", Similarities(cosines, 7, "1", "2"))
    labels = [text for text in texts(plot.svg) if "." in text]
    assert labels
    assert all(0.97 < float(label) < 1.01 for label in labels), "without an offset beside them"
