"""The page in Chromium, on a desk and on a phone. Screenshots stay in ``FELREC_ARTEFACTS``, for
people to look at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from felrec_dist.reporting.page import render
from felrec_dist.reporting.runs import read_runs
from tests.reporting.browser import Tab, find_chromium, tab

pytestmark = pytest.mark.slow

DESK, PHONE = 1280, 390
SMALLEST_TEXT_PX = 9.0

# Elements that reach out of the window, unless something around them scrolls. Its width is given: a
# phone's window grows with what does not fit.
OUTSIDE = """(width => [...document.body.querySelectorAll("*")].filter(element => {
  const box = element.getBoundingClientRect();
  if (!box.width || (box.left >= -0.5 && box.right <= width + 0.5)) return false;
  return !element.closest(".scroll, pre, svg");
}).map(element => element.tagName + " " + (element.className || element.id)))
"""
TEXT_SIZES = """
[...document.querySelectorAll("svg text")].map(text => {
  const scale = text.ownerSVGElement.getScreenCTM().a;
  return [text.textContent, parseFloat(getComputedStyle(text).fontSize) * scale];
})
"""
CUT_TEXTS = """
[...document.querySelectorAll("svg text")].filter(text => {
  const box = text.getBoundingClientRect(), figure = text.ownerSVGElement.getBoundingClientRect();
  return box.left < figure.left - 1 || box.right > figure.right + 1
    || box.top < figure.top - 1 || box.bottom > figure.bottom + 1;
}).map(text => text.textContent)
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on PATH (apt-get install chromium)")
    with tab(chromium, tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(scope="module")
def page(runs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    # Labels as long as people's are.
    labels = ("FELRec-Q, as in the paper", "FELRec-P, as in the paper")
    labelled = [f"{label}={url}" for label, url in zip(labels, runs, strict=True)]
    path.write_text(render(read_runs(labelled, "causal")), encoding="utf-8")
    return path


def artefacts(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("FELREC_ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_everything_is_to_be_seen(opened: Tab, page: Path, width: int, tmp_path: Path) -> None:
    opened.requests.clear()
    opened.open(page, width)
    path = artefacts(tmp_path) / f"report-{width}.png"
    opened.screenshot(path)
    assert path.stat().st_size > 50_000

    sizes: Any = opened.evaluate(
        "[innerWidth, document.documentElement.scrollWidth, document.body.scrollWidth]"
    )
    assert sizes[0] == width
    assert max(sizes) == width, "the page scrolls sideways"
    assert opened.evaluate(f"{OUTSIDE}({width})") == []
    texts: Any = opened.evaluate(TEXT_SIZES)
    assert len(texts) > 100
    small = [(text, size) for text, size in texts if size < SMALLEST_TEXT_PX]
    assert small == []
    assert opened.evaluate(CUT_TEXTS) == []
    assert opened.evaluate("document.querySelectorAll('figure').length") > 10
    # Nothing was complained about, and nothing fetched but the page itself.
    assert opened.complaints == []
    assert set(opened.requests) == {page.as_uri()}


def test_what_is_wrong_with_a_page_is_noticed(opened: Tab, page: Path, tmp_path: Path) -> None:
    """A page that is too wide, with small and cut text, that logs an error and asks for a file."""
    wrong = tmp_path / "wrong.html"
    text = page.read_text(encoding="utf-8").split("<meta http-equiv")[0] + "</head><body>"
    wrong.write_text(
        f"{text}<div style='width: 900px'>wide</div><img src='missing.png'>"
        "<svg viewBox='0 0 400 100' width='200'><text x='390' y='50' style='font-size: 8px'>cut off"
        "</text></svg><script>console.error('said'); undefined.call()</script></body></html>",
        encoding="utf-8",
    )
    opened.open(wrong, PHONE)
    assert opened.evaluate("document.documentElement.scrollWidth") > PHONE
    assert opened.evaluate(f"{OUTSIDE}({PHONE})") == ["DIV "]
    assert opened.evaluate(TEXT_SIZES)[0][1] < SMALLEST_TEXT_PX
    assert opened.evaluate(CUT_TEXTS) == ["cut off"]
    complaints = "\n".join(opened.complaints)
    assert "said" in complaints
    assert "TypeError" in complaints
    assert (tmp_path / "missing.png").as_uri() in opened.requests
    opened.complaints.clear()
