"""Two tested runs of one small data set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.training.trainer import NoProgress
from launch import local
from tests import tiny
from tests.launch.commands import Felrec, runner


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for one another cost more than tiny sums take."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return tiny.prepare_events(tmp_path_factory.mktemp("data"), num_events=600)


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory, dataset: PreparedDataset) -> list[str]:
    """FELRec-Q and FELRec-P, trained and tested; only to be read."""
    folder = tmp_path_factory.mktemp("runs")
    urls = []
    for variant in ("felrec-q", "felrec-p"):
        url = str(folder / variant)
        model = tiny.experiment("data", "run").model_dump()["model"] | {"variant": variant}
        config = tiny.experiment(dataset.url, url, {"model": model})
        local.train(config, resume=False, progress=NoProgress())
        urls.append(url)
    return urls


@pytest.fixture
def felrec(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Felrec:
    """Runs the command in this process, as the console script does."""
    return runner(capfd, monkeypatch)
