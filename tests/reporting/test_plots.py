"""What the figures of a report show of awkward data."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("matplotlib")

from felrec_dist.reporting.cold_start import Bucket
from felrec_dist.reporting.plots import Style, buckets_plot


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
