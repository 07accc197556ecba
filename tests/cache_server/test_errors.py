"""The cache's errors survive the wire with their facts."""

from __future__ import annotations

import pickle

import pytest

from cache_server import errors
from cache_server.errors import CacheError, FelrecError

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, FelrecError)
]


def test_all_kinds_are_here() -> None:
    names = {"FelrecError", "CacheError", "CacheTimeoutError", "ShardLostError", "SnapshotError"}
    assert {kind.__name__ for kind in KINDS} == names


@pytest.mark.parametrize("kind", KINDS)
def test_pickling_keeps_type_facts_and_message(kind: type[FelrecError]) -> None:
    error = kind("It broke.", where="shard 3", got=5, expected=(1, 2), remedy="Mend it.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert str(copy) == (
        "It broke.\n  where: shard 3\n  got: 5\n  expected: (1, 2)\n  remedy: Mend it."
    )
    assert (copy.what, copy.where, copy.got) == ("It broke.", "shard 3", "5")
    assert (copy.expected, copy.remedy) == ("(1, 2)", "Mend it.")


def test_facts_that_are_not_given_are_not_shown() -> None:
    assert str(pickle.loads(pickle.dumps(CacheError("It broke.", got=0)))) == "It broke.\n  got: 0"


def test_the_families() -> None:
    assert issubclass(errors.CacheTimeoutError, TimeoutError)
    assert issubclass(errors.CacheError, RuntimeError)
    for kind in [errors.CacheTimeoutError, errors.ShardLostError, errors.SnapshotError]:
        assert issubclass(kind, CacheError)
