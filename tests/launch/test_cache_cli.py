"""``felrec cache`` on saved caches, and on shards in process that stand for running ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cache_server import CacheClient, bucket_of, contents
from felrec_dist.config import ExperimentConfig
from tests import tiny
from tests.cache_server.oracle import row_hash
from tests.launch.caches import CHANGED, NUM_ITEMS, NUM_USERS, fill, save
from tests.launch.commands import Felrec, assert_failed

CHANGED_BUCKET = int(bucket_of(np.array([CHANGED]))[0])


def experiment(folder: Path, num_shards: int = 2, **cache: Any) -> ExperimentConfig:
    cache = {"num_shards": num_shards, "block_rows": 1024, **cache}
    return tiny.experiment("none", str(folder), {"cache": cache})


def saved(folder: Path, num_shards: int = 2, epoch: int = 0, **rows: int) -> str:
    """A checkpoint of a filled cache, in the run's folder."""
    config = experiment(folder, num_shards)
    client = tiny.build_client(config)
    fill(client, **rows)
    return save(client, config, epoch)


def digests_of(folder: Path) -> dict[str, str]:
    client = tiny.build_client(experiment(folder))
    fill(client)
    return {name: f"{digest:016x}" for name, digest in client.digest().items()}


def test_the_digest_of_a_checkpoint_and_of_a_run(felrec: Felrec, tmp_path: Path) -> None:
    run = tmp_path / "a [bold] run"
    older, newer = saved(run, changed=CHANGED), saved(run, epoch=1)
    (run / "checkpoints" / "epoch-0002" / "cache").mkdir(parents=True)  # cut off while written
    digests = digests_of(run)
    for source in (newer, f"{newer}/", run, f"{run}/", f"file://{run}"):
        ended = felrec("cache", "digest", source)
        assert ended.code == 0
        assert ended.out.partition("\n")[0].endswith("a [bold] run/checkpoints/epoch-0001")
        rows = [line.split("│")[1:-1] for line in ended.out.splitlines() if line[0] == "│"]
        assert [[cell.strip() for cell in row] for row in rows] == [
            ["user", f"{NUM_USERS:,}", digests["user"]],
            ["item", f"{NUM_ITEMS:,}", digests["item"]],
        ]
    first = json.loads(felrec("cache", "digest", older, "--json").out)
    second = json.loads(felrec("cache", "digest", run, "--json").out)
    assert second == {
        "source": newer,
        "is_consistent": True,
        "shards": [],
        "tables": [
            {"table": "user", "rows": NUM_USERS, "digest": digests["user"]},
            {"table": "item", "rows": NUM_ITEMS, "digest": digests["item"]},
        ],
    }
    assert first["source"] == older
    assert first["tables"][0]["digest"] != digests["user"]
    assert first["tables"][1] == second["tables"][1]


def test_the_digests_of_buckets(felrec: Felrec, tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(run)
    ended = felrec("cache", "digest", run, "--buckets")
    assert ended.code == 2
    assert "--json" in ended.err
    facts = json.loads(felrec("cache", "digest", run, "--buckets", "--json").out)
    buckets = [row for row in facts["buckets"] if row["table"] == "item"]
    assert len(facts["buckets"]) > len(buckets) > 0
    client = tiny.build_client(experiment(run))
    fill(client)
    keys = np.arange(NUM_ITEMS) - 350
    rows = client.fetch(1, {"item": keys})["item"].rows
    expected: dict[int, list[int]] = {}
    for i, bucket in enumerate(bucket_of(keys).tolist()):
        expected.setdefault(bucket, []).append(row_hash(int(keys[i]), i, rows[i]))
    assert {row["bucket"]: (row["rows"], row["digest"]) for row in buckets} == {
        bucket: (len(hashes), f"{sum(hashes) % 2**64:016x}") for bucket, hashes in expected.items()
    }


@pytest.mark.parametrize("piece_bytes", [2**30, 70_000])
def test_a_whole_cache_is_said_to_be_whole(
    felrec: Felrec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(contents, "PIECE_BYTES", piece_bytes)
    run = tmp_path / "run"
    url = saved(run, num_shards=3)
    num_bytes = sum(path.stat().st_size for path in Path(url, "cache").iterdir())
    ended = felrec("cache", "verify", run)
    assert (ended.code, ended.err) == (0, "")
    assert f"whole: 6 files, {num_bytes:,} bytes" in ended.out
    facts = json.loads(felrec("cache", "verify", run, "--json").out)
    assert (facts["is_whole"], facts["files"], facts["bytes"]) == (True, 6, num_bytes)
    assert {row["table"]: row["digest"] for row in facts["tables"]} == digests_of(run)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("piece_bytes", [2**30, 70_000])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, ["other rows than its manifest says", "rows with digest"]),
        (truncate, ["missing or damaged", "bytes"]),
        (Path.unlink, ["missing or damaged", "FileNotFoundError"]),
    ],
)
def test_a_damaged_file_is_named(
    felrec: Felrec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    words: list[str],
    piece_bytes: int,
) -> None:
    monkeypatch.setattr(contents, "PIECE_BYTES", piece_bytes)
    url, whole = saved(tmp_path / "run", num_shards=3), saved(tmp_path / "whole")
    damage(Path(url, "cache", "user-1365-2730.arrow"))
    facts = ["where: ", "user-1365-2730.arrow", "got: ", "expected: ", "remedy: "]
    assert_failed(felrec("cache", "verify", url), "SnapshotError", *facts, *words)
    assert_failed(felrec("cache", "verify", url, "--json"), "SnapshotError", *facts, *words)
    assert_failed(felrec("cache", "verify", whole, url), "SnapshotError", *facts, *words)
    assert_failed(felrec("cache", "digest", url), "SnapshotError", *facts, *words)


def test_a_manifest_without_a_part(
    felrec: Felrec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tmp_path / "run")
    client = tiny.build_client(config)
    fill(client)
    snapshot = client.snapshot
    monkeypatch.setattr(client, "snapshot", lambda prefix: snapshot(prefix)[:-1])
    url = save(client, config)
    assert_failed(felrec("cache", "verify", url), "SnapshotError", "every bucket exactly once")


def test_equal_caches_of_one_and_of_three_shards(felrec: Felrec, tmp_path: Path) -> None:
    one, three = saved(tmp_path / "one", 1), saved(tmp_path / "three", 3)
    ended = felrec("cache", "verify", one, tmp_path / "three")
    assert ended.code == 0, ended.err
    assert ended.out.endswith("equal\n")
    assert ended.out.count(digests_of(tmp_path)["user"]) == 2
    facts = json.loads(felrec("cache", "verify", one, three, "--json").out)
    assert facts["is_equal"]
    assert facts["a"]["tables"] == facts["b"]["tables"]
    assert (facts["a"]["source"], facts["b"]["source"]) == (one, three)
    assert facts["num_differing"] == {"user": 0, "item": 0}
    assert facts["differing"] == []


@pytest.mark.parametrize("rows", [{"changed": CHANGED}, {"absent": CHANGED}])
def test_the_bucket_of_the_row_that_differs_is_reported(
    felrec: Felrec, tmp_path: Path, rows: dict[str, int]
) -> None:
    a, b = saved(tmp_path / "a", 1), saved(tmp_path / "b", 3, **rows)
    num_rows = int((bucket_of(np.arange(NUM_USERS)) == CHANGED_BUCKET).sum())
    num_rows_b = num_rows - ("absent" in rows)
    ended = felrec("cache", "verify", a, b, "--json")
    assert ended.code == 1
    facts = json.loads(ended.out)
    assert not facts["is_equal"]
    assert facts["num_differing"] == {"user": 1, "item": 0}
    assert facts["differing"] == [
        {"table": "user", "bucket": CHANGED_BUCKET, "rows_a": num_rows, "rows_b": num_rows_b}
    ]
    ended = felrec("cache", "verify", a, b)
    assert (ended.code, ended.err) == (1, "")
    listed = [line.split() for line in ended.out.splitlines() if line.startswith("│")]
    numbers = [f"{number:,}" for number in (CHANGED_BUCKET, num_rows, num_rows_b)]
    assert [word for word in listed[-1] if word != "│"] == ["user", *numbers]
    assert ended.out.endswith("different: 1 of user, 0 of item of 4,096 buckets\n")


def test_only_so_many_buckets_are_listed(felrec: Felrec, tmp_path: Path) -> None:
    a = saved(tmp_path / "a")
    config = experiment(tmp_path / "b")
    empty = save(tiny.build_client(config), config)
    num_users = np.unique(bucket_of(np.arange(NUM_USERS))).size
    num_items = np.unique(bucket_of(np.arange(NUM_ITEMS) - 350)).size
    for options, limit in (((), 20), (("--limit", 3), 3), (("--limit", 0), 0)):
        ended = felrec("cache", "verify", a, empty, "--json", *options)
        facts = json.loads(ended.out)
        assert facts["num_differing"] == {"user": num_users, "item": num_items}
        assert [row["table"] for row in facts["differing"]] == ["user"] * limit + ["item"] * limit
        ended = felrec("cache", "verify", a, empty, *options)
        assert ended.code == 1
        assert f"different: {num_users:,} of user, {num_items:,} of item" in ended.out
    assert felrec("cache", "verify", a, empty, "--limit", -1).code == 2


def test_other_tables_are_refused_unread(felrec: Felrec, tmp_path: Path) -> None:
    a = saved(tmp_path / "a")
    narrow = experiment(tmp_path / "b", storage="bfloat16")
    b = save(tiny.build_client(narrow), narrow)
    for path in [*Path(a, "cache").iterdir(), *Path(b, "cache").iterdir()]:
        path.unlink()
    words = ("other tables", "user 8 x float32", "item 8 x bfloat16", a, b)
    assert_failed(felrec("cache", "verify", a, b), "ConfigError", *words)


def test_the_sizes_of_files_are_told_unread(felrec: Felrec, tmp_path: Path) -> None:
    run = tmp_path / ("a folder with a name so long that " * 5)
    url = saved(run)
    files = {
        f"epoch-0000/cache/{path.name}": path.stat().st_size
        for path in Path(url, "cache").iterdir()
    }
    for path in Path(url, "cache").iterdir():
        path.unlink()
    facts = json.loads(felrec("cache", "stats", run, "--json").out)
    assert facts["source"] == url
    assert {row["file"]: row["bytes"] for row in facts["files"]} == files
    assert sum(row["rows"] for row in facts["files"] if row["table"] == "user") == NUM_USERS
    first = facts["files"][0]
    assert (first["first_bucket"], first["last_bucket"]) == (0, 2047)
    assert first["bytes_per_row"] == pytest.approx(first["bytes"] / first["rows"], abs=0.05)
    ended = felrec("cache", "stats", run)
    assert ended.code == 0
    assert "…" not in ended.out
    for name, size in files.items():
        assert name in ended.out
        assert f"{size:,}" in ended.out


def test_any_url_is_a_source(felrec: Felrec, tmp_path: Path) -> None:
    run = f"memory://{tmp_path.name}/run"
    config = tiny.experiment("none", run)
    client = tiny.build_client(config)
    fill(client)
    url = save(client, config)
    assert json.loads(felrec("cache", "verify", run, "--json").out)["source"] == url
    assert felrec("cache", "verify", url, saved(tmp_path / "run", 3)).code == 0


def test_mistakes_end_in_words(
    felrec: Felrec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "checkpoints" / "epoch-0000").mkdir(parents=True)
    for source in ("nowhere", tmp_path / "run", tmp_path / "run" / "checkpoints" / "epoch-0000"):
        ended = felrec("cache", "digest", source)
        assert_failed(ended, "CheckpointError", "no committed checkpoint", str(source))
    assert_failed(felrec("cache", "stats", "nosuch://run"), "StorageError", "nosuch")
    url = saved(tmp_path / "whole")
    manifest = Path(url, "manifest.json")
    manifest.write_text(manifest.read_text().replace('"global_step": 10', '"global_step": 11'))
    assert_failed(felrec("cache", "verify", url), "CheckpointError", "manifest", "damaged")
    ended = felrec("cache", "verify", "running:run")
    assert_failed(ended, "ConfigError", "no files to verify", "two caches to compare")
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "launch.on_ray", raising=False)
    assert_failed(felrec("cache", "digest", "running:run"), "ConfigError", "ray is not installed")
    assert felrec("cache", "digest", saved(tmp_path / "other")).code == 0, "files need no Ray"


def test_help(felrec: Felrec) -> None:
    for command in ("digest", "verify", "stats"):
        assert command in felrec("cache", "--help").out
        assert "running:" in felrec("cache", command, "--help").out


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CacheClient:
    """Two shards that ``running:run`` leads to."""
    client = tiny.build_client(experiment(tmp_path / "run"))

    @contextmanager
    def running_cache(run_url: str) -> Iterator[CacheClient]:
        assert run_url == "run"
        yield client

    on_ray = ModuleType("launch.on_ray")
    on_ray.running_cache = running_cache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "launch.on_ray", on_ray)
    return client


def test_a_running_cache_that_is_a_cut(
    felrec: Felrec, running: CacheClient, tmp_path: Path
) -> None:
    fill(running)
    ended = felrec("cache", "digest", "running:run")
    assert ended.out.endswith("every shard: generation 0, writes received through step 0\n")
    facts = json.loads(felrec("cache", "digest", "running:run", "--json").out)
    assert facts["is_consistent"]
    here = {"generation": 0, "received_step": 0, "has_later_steps": False}
    assert facts["shards"] == [{"shard": 0, **here}, {"shard": 1, **here}]
    assert {row["table"]: row["digest"] for row in facts["tables"]} == digests_of(tmp_path)
    for a, b in ((saved(tmp_path / "saved", 3), "running:run"), ("running:run", "running:run")):
        assert felrec("cache", "verify", a, b).code == 0
    changed = saved(tmp_path / "changed", 3, changed=CHANGED)
    facts = json.loads(felrec("cache", "verify", "running:run", changed, "--json").out)
    assert [row["bucket"] for row in facts["differing"]] == [CHANGED_BUCKET]


def write_to_first(client: CacheClient, *steps: int) -> None:
    for step in steps:
        client.write_back(step, {}, shards=[0])


@pytest.mark.parametrize("step", [1, 2], ids=["one shard is further", "one has a later step"])
def test_a_running_cache_that_is_no_cut_is_said_to_be_none(
    felrec: Felrec, running: CacheClient, tmp_path: Path, step: int
) -> None:
    fill(running)
    write_to_first(running, step)
    ended = felrec("cache", "digest", "running:run")
    assert ended.code == 0
    assert "no consistent cut" in ended.out
    facts = json.loads(felrec("cache", "digest", "running:run", "--json").out)
    assert not facts["is_consistent"]
    first = {"generation": 0, "received_step": step % 2, "has_later_steps": step == 2}
    assert facts["shards"][0] == {"shard": 0, **first}
    facts = json.loads(
        felrec("cache", "verify", saved(tmp_path / "saved"), "running:run", "--json").out
    )
    assert facts["is_equal"]
    assert facts["a"]["is_consistent"]
    assert not facts["b"]["is_consistent"]


def test_the_sizes_of_shards(felrec: Felrec, running: CacheClient) -> None:
    fill(running)
    running.write_back(0, {})
    expected = running.stats()
    ended = felrec("cache", "stats", "running:run", "--json")
    facts = json.loads(ended.out)
    assert facts["is_equally_far"]
    assert facts["shards"] == [
        {
            "shard": shard,
            "generation": 0,
            "received_step": 0,
            "late_messages": 0,
            "repeated_messages": 1,
        }
        for shard in range(2)
    ]
    for row in facts["tables"]:
        table = expected[row["shard"]].tables[row["table"]]
        assert (row["rows"], row["bytes"]) == (table.num_rows, table.nbytes)
        assert row["index_bytes"] == table.index_bytes
        assert row["bytes_per_row"] == pytest.approx(table.nbytes / table.num_rows, abs=0.05)
    assert len(facts["tables"]) == 4
    ended = felrec("cache", "stats", "running:run")
    assert "not equally far" not in ended.out
    assert f"{expected[1].tables['user'].nbytes:,}" in ended.out
    write_to_first(running, 1)
    assert "not equally far" in felrec("cache", "stats", "running:run").out
    assert not json.loads(felrec("cache", "stats", "running:run", "--json").out)["is_equally_far"]


def test_an_empty_cache(felrec: Felrec, running: CacheClient) -> None:
    facts = json.loads(felrec("cache", "digest", "running:run", "--json").out)
    assert [row["rows"] for row in facts["tables"]] == [0, 0]
    assert [row["digest"] for row in facts["tables"]] == ["0" * 16] * 2
    facts = json.loads(felrec("cache", "stats", "running:run", "--json").out)
    assert [row["bytes_per_row"] for row in facts["tables"]] == [None] * 4
    assert felrec("cache", "stats", "running:run").code == 0
