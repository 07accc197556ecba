"""One tree of errors, drawn in one place, and every one of them travels between processes."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator

import pytest

import felrec_dist.errors
from felrec_dist.errors import FelrecError


def tree(root: type[FelrecError]) -> Iterator[type[FelrecError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


ERRORS = list(tree(FelrecError))
LINE = re.compile(r"^ {4}(?P<indent>[│├└─ ]*)(?P<name>\w+Error)(?: \((?P<builtin>\w+)\))?")


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_pickles_with_its_facts(kind: type[FelrecError]) -> None:
    error = kind("it failed", where="shard 1", got=3, expected="four", remedy="do it again")
    error.__cause__ = KeyError("why")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.what, again.where, again.got, again.expected, again.remedy) == (
        "it failed",
        "shard 1",
        "3",
        "four",
        "do it again",
    )
    assert (
        str(again)
        == str(error)
        == ("it failed\n  where: shard 1\n  got: 3\n  expected: four\n  remedy: do it again")
    )
    assert str(pickle.loads(pickle.dumps(kind("alone")))) == "alone"


def test_facts_that_are_false_are_told() -> None:
    assert str(FelrecError("failed", got=0, expected=False)).splitlines() == [
        "failed",
        "  got: 0",
        "  expected: False",
    ]


def test_facts_are_printable_whatever_a_file_holds() -> None:
    error = FelrecError("failed", where="a\udcff\x1b[31mb", got="x" * 5_000_000, expected="a\tb\nc")
    where, got, *expected = str(error).splitlines()[1:]
    assert where == r"  where: a\udcff\x1b[31mb"
    assert got == f"  got: {'x' * 1000} ... (5,000,000 characters)"
    assert expected == ["  expected: a\tb", "c"]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(FelrecError("failed", got="x" * 2000)) == f"failed\n  got: {'x' * 2000}"


def test_the_drawn_tree_is_the_real_one() -> None:
    """Each line of the drawing gives a class, its parent by depth, and its base among built-ins."""
    drawing = felrec_dist.errors.__doc__
    assert drawing is not None
    drawn: dict[str, tuple[str | None, str | None]] = {}
    parents: list[str] = []
    for line in drawing.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        depth = len(match["indent"]) // 4
        drawn[match["name"]] = (parents[depth - 1] if depth else None, match["builtin"])
        parents[depth:] = [match["name"]]

    real: dict[str, tuple[str | None, str | None]] = {}
    for kind in ERRORS:
        ours = [base.__name__ for base in kind.__bases__ if issubclass(base, FelrecError)]
        others = [base.__name__ for base in kind.__bases__ if not issubclass(base, FelrecError)]
        assert len(ours) <= 1
        assert len(others) <= 1
        if kind is FelrecError:
            real[kind.__name__] = (None, None)
        else:
            real[kind.__name__] = (ours[0], others[0] if others else None)
    assert drawn == real


def test_the_whole_tree_is_offered_in_one_place() -> None:
    assert {kind.__name__ for kind in ERRORS} == set(felrec_dist.errors.__all__)
    assert all(getattr(felrec_dist.errors, kind.__name__) is kind for kind in ERRORS)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_each_error_has_its_sentence(kind: type[FelrecError]) -> None:
    assert kind.__doc__
    assert kind.__doc__.split("\n")[0].endswith((".", ":"))
