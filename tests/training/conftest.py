"""The data set of these tests, prepared once."""

from __future__ import annotations

import pytest

from felrec_dist.data.dataset import PreparedDataset
from tests import tiny


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return tiny.prepare_events(tmp_path_factory.mktemp("tiny"))
