"""The data set of these tests, prepared once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.training import hot_tier
from tests import tiny


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for one another cost more than tiny sums take."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def no_spare_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny data would all fit beside the capacity, and nothing would ever leave the hot tier."""
    monkeypatch.setattr(hot_tier, "SMALLEST_RESERVE", 1)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return tiny.prepare_events(tmp_path_factory.mktemp("tiny"))
