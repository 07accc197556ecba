"""Data set, checkpoints, results and TensorBoard on an object store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

moto_server = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")

ROOT = Path(__file__).parents[2]
FELREC = [str(Path(sys.executable).parent / "felrec")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A local S3 server with an empty bucket; settings come from the environment alone."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in settings.items():
            patched.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield {**os.environ, **settings}
    server.stop()


def test_a_run_on_s3(environment: dict[str, str], tmp_path: Path) -> None:
    def felrec(*args: str) -> None:
        done = subprocess.run(
            [*FELREC, *args],
            cwd=ROOT,
            env={**environment, "XDG_CACHE_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    raw = tmp_path / "raw.parquet"
    felrec("synthesize", str(raw), "--num-events", "3000", "--num-users", "100")
    columns = ("--user", "user", "--item", "item", "--timestamp", "timestamp")
    felrec(
        *("prepare", "parquet", str(raw), *columns, "--timestamp-unit", "ms"),
        *("--out", "s3://bucket/data"),
    )
    train = (
        *("train", "configs/demo.yaml", "--local"),
        *("data.url=s3://bucket/data", "run.url=s3://bucket/run", "training.schedule.epochs=2"),
    )
    felrec(*train)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    first = json.loads(files.cat_file("bucket/run/evaluation/test-causal.json"))
    written = files.find("bucket/run")
    assert any("tensorboard/events" in path for path in written)
    assert any("/cache/user-0000-2048.arrow" in path for path in written)

    felrec(*train, "--resume")  # nothing is left to train: the test is repeated from the checkpoint
    files.invalidate_cache()
    assert json.loads(files.cat_file("bucket/run/evaluation/test-causal.json")) == first
