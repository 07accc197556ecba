"""One process without Ray: the cache is what the config says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from felrec_dist.config import with_absolute_paths
from launch import local
from tests import tiny


@pytest.mark.parametrize("spills", [False, True])
def test_its_shards_keep_in_memory_what_they_may(
    spills: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {"spill_dir": "spilled", "memory_per_shard_gb": 1e-6} if spills else {}
    config = with_absolute_paths(tiny.experiment("data", "run", {"cache": changes}))
    assert config.cache.spill_dir == (str(tmp_path / "spilled") if spills else None)
    keys = np.arange(200)
    with local._client(config) as client:
        client.write_back(0, {"user": (keys, keys, np.ones((200, 8), np.float32))})
        stats = client.stats()
    assert len(stats) == 2
    assert all((shard.tables["user"].spilled_bytes > 0) == spills for shard in stats)
