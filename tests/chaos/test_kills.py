"""Twenty kills change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")

from tests.chaos.kills import EPOCHS, Killer, experiment, prepare_events, train
from tests.ray_sessions import ray_session
from tests.runs import differences
from tests.tiny import BATCH

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
]

NUM_KILLS = 20
TIMEOUT_S = 1500.0


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session():
        yield


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    dataset = prepare_events(tmp_path, NUM_KILLS)
    undisturbed = experiment(dataset.url, str(tmp_path / "undisturbed"))
    killed = experiment(dataset.url, str(tmp_path / "killed"))
    num_steps = EPOCHS * (len(dataset.split.train) // BATCH)
    killer = Killer(killed, num_steps, NUM_KILLS, seed=0)

    train(undisturbed, timeout_s=TIMEOUT_S)
    with killer:
        train(killed, killer, timeout_s=TIMEOUT_S)

    for kill in killer.kills:
        print(kill)
    assert len(killer.kills) == NUM_KILLS
    assert {kill.kind for kill in killer.kills} == {"worker", "shard"}
    assert differences(undisturbed.run.url, killed.run.url) == []
