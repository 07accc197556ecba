"""What is shown of a cache, against a cache that was restored and raw events in a list."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cache_server import CacheClient, InProcessTransport
from felrec_dist.config import parse_config
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.errors import InputError
from felrec_dist.reporting import representations
from felrec_dist.reporting.representations import read_map, read_similarities
from felrec_dist.reporting.runs import Run
from tests.reporting.test_cold_start import first_run

N = 4


@pytest.fixture(scope="module")
def run(runs: list[str]) -> Run:
    return first_run(runs[0])


@pytest.fixture(scope="module")
def cache(run: Run) -> CacheClient:
    assert run.config is not None
    checkpoint = run.checkpoint()
    client = CacheClient(InProcessTransport(run.config.cache_tables()))
    client.restore(checkpoint.cache_prefix, checkpoint.chain.parts, 1, 0)
    return client


def vector(cache: CacheClient, side: str, key: int) -> np.ndarray | None:
    fetched = cache.fetch(0, {side: np.array([key])})[side]
    return fetched.rows[0].astype(np.float64) if fetched.found[0] else None


@pytest.mark.parametrize("event_id", [541, 580, 599])
def test_the_similarities_are_those_of_single_pairs(
    run: Run, dataset: PreparedDataset, cache: CacheClient, event_id: int
) -> None:
    raw = pq.read_table(Path(dataset.url).parent / "raw.parquet").to_pylist()
    user, item = raw[event_id]["user"], raw[event_id]["item"]
    items = [*[row["item"] for row in raw[:event_id] if row["user"] == user][-N:], item]
    users = [*[row["user"] for row in raw[:event_id] if row["item"] == item][-N:], user]
    found = read_similarities(run, dataset, event_id)
    assert (found.event_id, found.user, found.item) == (event_id, str(user), str(item))
    assert found.cosines_RC.shape == (len(items), len(users))
    for r, i in enumerate(items):
        for c, u in enumerate(users):
            a, b = vector(cache, "item", i), vector(cache, "user", u)
            if a is None or b is None:
                assert np.isnan(found.cosines_RC[r, c])
            else:
                cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                assert found.cosines_RC[r, c] == pytest.approx(cosine, abs=1e-9)


@pytest.mark.parametrize("history_length", [N, 24])
@pytest.mark.parametrize("read_events", [65_536, 7])
def test_the_interaction_that_is_chosen_has_the_longest_histories(
    run: Run,
    dataset: PreparedDataset,
    monkeypatch: pytest.MonkeyPatch,
    read_events: int,
    history_length: int,
) -> None:
    """The first one with full histories; where there is none, the first with the longest."""
    monkeypatch.setattr(representations, "_READ_EVENTS", read_events)
    assert run.config is not None
    tree = run.config.model_dump(mode="json")
    tree["model"]["encoder"]["history_length"] = history_length
    longer = replace(run, config=parse_config(tree, where="test"))
    raw = pq.read_table(Path(dataset.url).parent / "raw.parquet").to_pylist()
    shortest = []
    for event_id in range(540, 600):
        before = raw[:event_id]
        lengths = [
            sum(row[side] == raw[event_id][side] for row in before) for side in ("user", "item")
        ]
        shortest.append(min(*lengths, history_length))
    assert (max(shortest) == history_length) == (history_length == N)
    assert read_similarities(longer, dataset, None).event_id == 540 + int(np.argmax(shortest))


@pytest.mark.parametrize("event_id", [539, 600, -1])
def test_only_events_of_the_test_are_shown(
    run: Run, dataset: PreparedDataset, event_id: int
) -> None:
    with pytest.raises(InputError, match=rf"no such event(?s:.*)got: event {event_id}\n"):
        read_similarities(run, dataset, event_id)


def test_the_map_is_of_what_occurs_before_the_test(
    run: Run, dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(representations, "MAPPED", 40)
    found = read_map(run, dataset)
    assert found.places_M2.shape == (80, 2)
    assert np.isfinite(found.places_M2).all()
    assert found.is_user_M.tolist() == [True] * 40 + [False] * 40
    assert found.num_events_M.min() >= 1
    raw = pq.read_table(Path(dataset.url).parent / "raw.parquet").to_pylist()[:540]
    users = {row["user"] for row in raw}
    counts = sorted(sum(row["user"] == user for row in raw) for user in users)
    assert sorted(found.num_events_M[:40]) <= counts[-40:]
    assert np.array_equal(read_map(run, dataset).places_M2, found.places_M2)
    monkeypatch.setattr(representations, "MAPPED", 4)
    with pytest.raises(InputError, match=r"too little for a map(?s:.*)got: 8 users and items"):
        read_map(run, dataset)


def test_a_cache_of_another_data_set_is_not_shown(run: Run, dataset: PreparedDataset) -> None:
    """As that of a test with a cache of its own."""
    other = replace(run, report=replace(run.report, dataset_digest="f" * 64))
    with pytest.raises(InputError, match="another cache than the checkpoint's"):
        read_map(other, dataset)
