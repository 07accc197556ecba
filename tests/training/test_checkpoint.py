"""A checkpoint is whole, or it is refused with the reason: nothing half-written ever loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from cache_server import (
    CacheClient,
    InProcessTransport,
    SnapshotError,
    SnapshotPart,
    TableSpec,
)
from felrec_dist.errors import CheckpointError
from felrec_dist.storage import json_sha256, write_whole
from felrec_dist.training.checkpoint import (
    BestEpoch,
    Checkpoint,
    CheckpointStore,
    RunPosition,
    SnapshotChain,
    read_checkpoint,
)
from felrec_dist.training.clock import TrainingCosts

WIDTH = 5
TABLES = {side: TableSpec(width=WIDTH, storage="float32") for side in ("user", "item")}
CONFIG = {"training": {"seed": 3, "schedule": {"eta_min": 1e-7}}, "nothing": None}
MODEL = {
    "encoder.weight": torch.arange(12, dtype=torch.float64).reshape(3, 4).T,  # not contiguous
    "queue.next_slot": torch.tensor(7),
    "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
}
OPTIMIZER = {"encoder.weight:momentum_buffer": torch.full((4, 3), 0.1, dtype=torch.float64)}
COSTS = TrainingCosts(step_seconds=0.5, epoch_seconds=60.0)
LOSSES = torch.tensor([[3.0, 4.0], [5.0, 8.0]], dtype=torch.float64)
VALIDATION = [{"total": {"rank": 0.25}}]


def build_client(seed: int = 0) -> CacheClient:
    client = CacheClient(InProcessTransport(TABLES, num_shards=3), timeout_s=5.0)
    generator = np.random.default_rng(seed)
    keys = generator.permutation(40).astype(np.int64)
    rows = generator.normal(size=(40, WIDTH)).astype(np.float32)
    client.write_back(0, {side: (keys, keys, rows) for side in TABLES})
    return client


def position(epoch: int) -> RunPosition:
    return RunPosition(
        epoch=epoch,
        steps=10,
        is_validated=True,
        global_step=10 * (epoch + 1),
        cache_step=12,
        next_position=160,
        best=BestEpoch(epoch=0, validation_rank=0.25),
    )


def save(
    store: CheckpointStore, epoch: int, *, seed: int = 0, stop_before_commit: bool = False
) -> str:
    """Writes a checkpoint as the trainer does; may be killed when the dense state is due."""
    url = store.begin(position(epoch))
    parts = build_client(seed).snapshot(f"{url}/cache")
    if stop_before_commit:
        raise KeyboardInterrupt
    commit(store, position(epoch), chain_of(position(epoch), parts), seed)
    return url


def chain_of(
    at: RunPosition, parts: Sequence[SnapshotPart], base: SnapshotChain | None = None
) -> SnapshotChain:
    """The base and the parts, as they lie in the checkpoint's folder."""
    mine = [replace(part, path=f"{at.name}/cache/{part.path}") for part in parts]
    return SnapshotChain((*(base.parts if base else ()), *mine), at.next_position)


def commit(store: CheckpointStore, at: RunPosition, chain: SnapshotChain, seed: int = 0) -> None:
    store.commit(
        at,
        config=CONFIG,
        dataset_digest="d1",
        validation=VALIDATION,
        tensors={
            "model": {**MODEL, "seed": torch.tensor(seed)},
            "optimizer": OPTIMIZER,
            "losses": {"losses_nk": LOSSES},
        },
        chain=chain,
        tables=[],
        costs=COSTS,
    )


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    if request.param == "local":
        return CheckpointStore(str(tmp_path / "run"))
    return CheckpointStore(f"memory://{tmp_path.name}/run/")


def assert_whole(checkpoint: Checkpoint, epoch: int, seed: int = 0) -> None:
    assert checkpoint.position == position(epoch)
    assert checkpoint.config == CONFIG
    assert checkpoint.dataset_digest == "d1"
    assert checkpoint.validation == VALIDATION
    assert torch.equal(checkpoint.losses_nk, LOSSES)
    assert checkpoint.training_loss == 10.0
    assert checkpoint.costs == COSTS
    assert checkpoint.model.keys() == {*MODEL, "seed"}
    assert checkpoint.model["seed"] == seed
    for found, expected in ((checkpoint.model, MODEL), (checkpoint.optimizer, OPTIMIZER)):
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    # Into another number of shards than it came from.
    client = CacheClient(InProcessTransport(TABLES, num_shards=2), timeout_s=5.0)
    client.restore(checkpoint.cache_prefix, checkpoint.chain.parts, 1, 12)
    assert client.digest() == build_client(seed).digest()
    assert client.digest() != build_client(seed + 1).digest()


def test_what_was_committed_is_read(store: CheckpointStore) -> None:
    assert store.latest() is None
    url = save(store, 0)
    assert store.latest() == url == store.epoch_url(0)
    assert_whole(read_checkpoint(url), 0)
    assert_whole(read_checkpoint(f"{url}/"), 0)


def test_the_manifest_alone_needs_no_dense_files(store: CheckpointStore) -> None:
    url = save(store, 0)
    whole = read_checkpoint(url)
    fs, path = fsspec.core.url_to_fs(url)
    for name in ("model", "optimizer", "losses"):
        fs.rm(f"{path}/{name}.safetensors")
    manifest = read_checkpoint(url, with_dense=False)
    assert (manifest.model, manifest.optimizer) == ({}, {})
    assert manifest.chain == whole.chain
    assert (manifest.config, manifest.position) == (whole.config, whole.position)
    rewrite(url, lambda m: m["position"].update(epoch=2), with_digest=False)
    with pytest.raises(CheckpointError, match="manifest of a checkpoint is damaged"):
        read_checkpoint(url, with_dense=False)


def test_the_latest_is_the_highest_committed_epoch(store: CheckpointStore) -> None:
    for epoch in (9, 10, 9999, 10_000):
        save(store, epoch)
        assert store.latest() == store.epoch_url(epoch)
    with pytest.raises(KeyboardInterrupt):
        save(store, 10_001, stop_before_commit=True)
    assert store.latest() == store.epoch_url(10_000), "an uncommitted one does not count"


def test_other_folders_are_not_checkpoints(store: CheckpointStore) -> None:
    url = save(store, 1)
    fs, path = fsspec.core.url_to_fs(store.url)
    for name in ("epoch-0009.bak", "epoch-best", "keep-this"):
        fs.makedirs(f"{path}/{name}")
        fs.pipe_file(f"{path}/{name}/manifest.json", b"{}")
    assert store.latest() == url
    save(store, 2)
    store.keep(1, None)
    assert names_in(store) == {"epoch-0002", "epoch-0009.bak", "epoch-best", "keep-this"}


def test_keep_removes_the_others_whole(store: CheckpointStore) -> None:
    for epoch in range(4):
        save(store, epoch)
    with pytest.raises(KeyboardInterrupt):
        save(store, 4, stop_before_commit=True)
    store.keep(2, BestEpoch(0, 0.5))
    assert names_in(store) == {"epoch-0000", "epoch-0002", "epoch-0003"}
    store.keep(1, BestEpoch(2, 0.4))
    assert names_in(store) == {"epoch-0002", "epoch-0003"}
    for epoch in (2, 3):
        assert_whole(read_checkpoint(store.epoch_url(epoch)), epoch)
    with pytest.raises(CheckpointError, match=r"no committed checkpoint"):
        read_checkpoint(store.epoch_url(0))


def names_in(store: CheckpointStore) -> set[str]:
    fs, path = fsspec.core.url_to_fs(store.url)
    return {name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)}


def within_epoch(steps: int) -> RunPosition:
    return replace(
        position(3), steps=steps, is_validated=False, cache_step=steps, next_position=10 * steps
    )


def test_a_chain_of_checkpoints_shares_its_parts(store: CheckpointStore) -> None:
    """Each cut holds the rows of its own events; the older folders go, what is needed stays."""
    client = CacheClient(InProcessTransport(TABLES, num_shards=3), timeout_s=5.0)
    chain: SnapshotChain | None = None
    digests = {}
    for steps in (1, 2, 3):
        keys = np.arange(10 * (steps - 1), 10 * steps, dtype=np.int64)
        rows = np.full((10, WIDTH), steps, dtype=np.float32)
        client.write_back(steps - 1, {side: (keys % 15, keys, rows) for side in TABLES})
        at = within_epoch(steps)
        url = store.begin(at)
        since = None if chain is None else chain.next_position
        chain = chain_of(at, client.snapshot(f"{url}/cache", steps, since=since), chain)
        commit(store, at, chain)
        digests[steps] = client.digest()
    assert store.latest() == f"{store.url}/epoch-0003-step-00000003"
    assert not read_checkpoint(f"{store.url}/epoch-0003-step-00000001").chain.wants_full
    # A third and two thirds of the base's rows were written since.
    assert read_checkpoint(f"{store.url}/epoch-0003-step-00000003").chain.wants_full

    store.keep(2, None)
    fs, path = fsspec.core.url_to_fs(f"{store.url}/epoch-0003-step-00000001")
    left = {name.rpartition("/")[2] for name in fs.find(path)}
    assert chain is not None
    assert left == {part.path.rpartition("/")[2] for part in chain.parts if part.since is None}
    for steps in (2, 3):
        checkpoint = read_checkpoint(f"{store.url}/{within_epoch(steps).name}")
        other = CacheClient(InProcessTransport(TABLES, num_shards=2), timeout_s=5.0)
        other.restore(checkpoint.cache_prefix, checkpoint.chain.parts, 1, steps)
        assert other.digest() == digests[steps]

    save(store, 3)
    assert store.latest() == store.epoch_url(3), "the epoch's end comes after its steps"
    store.keep(1, None)
    assert not fs.exists(path) or not fs.find(path), "nobody names its parts any more"


def test_a_manifest_cannot_lead_out_of_the_folder(store: CheckpointStore) -> None:
    url = save(store, 0)
    for path in ("../../elsewhere/cache/x.arrow", "/etc/passwd", "cache/../../../x", "cache/a b"):

        def redirect(manifest: dict[str, Any], path: str = path) -> None:
            manifest["cache_parts"][0].update(path=path)

        rewrite(url, redirect, with_digest=True)
        with pytest.raises(CheckpointError, match=r"manifest of a checkpoint is damaged"):
            read_checkpoint(url)


def test_keep_removes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(str(tmp_path))
    url = save(store, 0)
    save(store, 1)
    monkeypatch.setattr(
        fsspec.core.url_to_fs(url)[0], "rm", stop_after(1, fsspec.core.url_to_fs(url)[0].rm)
    )
    with pytest.raises(KeyboardInterrupt):
        store.keep(1, None)
    assert not Path(url, "manifest.json").exists()
    assert Path(url, "model.safetensors").exists(), "it was stopped in the middle"


def stop_after(num_calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; killed when it is called once more."""
    calls = iter(range(num_calls))

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return wrapper


def test_killed_before_the_commit_nothing_loads(store: CheckpointStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        save(store, 0, stop_before_commit=True)
    assert store.latest() is None
    with pytest.raises(CheckpointError, match=r"no committed checkpoint\n(.*\n)*.*cut off"):
        read_checkpoint(store.epoch_url(0))
    save(store, 0, seed=1)
    assert_whole(read_checkpoint(store.epoch_url(0)), 0, seed=1)


def test_killed_while_it_replaces_one_of_the_same_epoch_neither_loads(
    store: CheckpointStore,
) -> None:
    url = save(store, 0, seed=1)
    with pytest.raises(KeyboardInterrupt):
        save(store, 0, seed=2, stop_before_commit=True)
    assert store.latest() is None
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        read_checkpoint(url)
    fs, path = fsspec.core.url_to_fs(url)
    assert not fs.exists(f"{path}/model.safetensors"), "nothing of the older one is left to mix"


@pytest.mark.parametrize("num_files", [0, 1, 2, 3])
def test_killed_within_the_commit_nothing_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int
) -> None:
    """At each of the dense files, and when the manifest is due."""
    store = CheckpointStore(str(tmp_path))
    save(store, 0)
    monkeypatch.setattr(
        "felrec_dist.training.checkpoint.write_whole", stop_after(num_files, write_whole)
    )
    with pytest.raises(KeyboardInterrupt):
        save(store, 1)
    monkeypatch.undo()
    assert store.latest() == store.epoch_url(0)
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        read_checkpoint(store.epoch_url(1))


def test_a_manifest_cut_off_while_it_is_written_does_not_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(str(tmp_path))
    real_write = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        if "manifest" not in path.name:
            return real_write(path, content)
        real_write(path, content[: len(content) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        with pytest.raises(KeyboardInterrupt):
            save(store, 0)
    assert store.latest() is None
    assert not list(tmp_path.rglob("manifest*"))


DENSE = ("model.safetensors", "optimizer.safetensors", "losses.safetensors")


@pytest.mark.parametrize("file", DENSE)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"^a file of a checkpoint is missing\n  where: .*{file}\n  remedy: remove"),
        ("truncated", r"^a file of a checkpoint is truncated\n  where: .*{file}\n  got: \d+ bytes"),
        ("empty", r"a file of a checkpoint is truncated\n  where: .*{file}\n  got: 0 bytes"),
        ("flipped", r"^a file of a checkpoint is damaged\n  where: .*{file}\n  got: SHA-256"),
        ("longer", r"a file of a checkpoint is truncated\n  where: .*{file}"),
    ],
)
def test_a_damaged_dense_file(store: CheckpointStore, file: str, damage: str, message: str) -> None:
    url = save(store, 0)
    apply_damage(f"{url}/{file}", damage)
    with pytest.raises(CheckpointError, match=message.replace("{file}", file)):
        read_checkpoint(url)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "flipped"])
def test_a_damaged_snapshot_is_refused_when_it_is_restored(
    store: CheckpointStore, damage: str
) -> None:
    url = save(store, 0)
    checkpoint = read_checkpoint(url)
    client = build_client()
    for part in checkpoint.chain.parts:
        damaged = f"{checkpoint.cache_prefix}/{part.path}"
        fs, path = fsspec.core.url_to_fs(damaged)
        content = fs.cat_file(path)
        apply_damage(damaged, damage)
        with pytest.raises(SnapshotError, match=re.escape(part.path)):
            client.restore(checkpoint.cache_prefix, checkpoint.chain.parts, 1, 12)
        fs.pipe_file(path, content)
    client.restore(checkpoint.cache_prefix, checkpoint.chain.parts, 2, 12)
    assert client.digest() == build_client().digest()


def apply_damage(url: str, damage: str) -> None:
    fs, path = fsspec.core.url_to_fs(url)
    content = fs.cat_file(path)
    fs.rm_file(path)
    middle = len(content) // 2
    if damage == "truncated":
        fs.pipe_file(path, content[:-1])
    elif damage == "empty":
        fs.pipe_file(path, b"")
    elif damage == "flipped":
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        fs.pipe_file(path, flipped)
    elif damage == "longer":
        fs.pipe_file(path, content + b"\0")
    else:
        assert damage == "missing"


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed(tmp_path: Path) -> None:
    """The position of the run stands only there: one digit would make another run of it."""
    url = save(CheckpointStore(str(tmp_path)), 0)
    manifest = Path(url, "manifest.json")
    content = manifest.read_bytes()
    generator = np.random.default_rng(0)
    num_noticed = 0
    for _ in range(300):
        place, bit = int(generator.integers(len(content))), int(generator.integers(8))
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        manifest.write_bytes(flipped)
        try:
            found = read_checkpoint(url)
        except CheckpointError:
            num_noticed += 1
        else:
            # White space between the values, or e for E: the same manifest.
            assert json.loads(bytes(flipped)) == json.loads(content)
            assert found.position == position(0)
    assert num_noticed > 200


def rewrite(url: str, change: Callable[[dict[str, Any]], None], *, with_digest: bool) -> None:
    fs, path = fsspec.core.url_to_fs(f"{url}/manifest.json")
    manifest = json.loads(fs.cat_file(path))
    change(manifest)
    if with_digest:
        manifest.pop("sha256")
        manifest["sha256"] = json_sha256(manifest)
    fs.pipe_file(path, json.dumps(manifest).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), r"of another version\n.*\n  got: 2\n  expected: 3"),
        (lambda m: m.pop("version"), r"of another version"),
        (lambda m: m.update(format="else"), r"this is not a checkpoint\n.*\n.*'felrec-dist"),
        (lambda m: m.pop("format"), r"this is not a checkpoint"),
        (lambda m: m.pop("config"), r"manifest of a checkpoint is damaged\n.*\n.*'config'"),
        (lambda m: m["position"].pop("best"), r"manifest of a checkpoint is damaged\n.*\n.*'best'"),
        (lambda m: m["position"].update(x=1), r"manifest of a checkpoint is damaged\n.*\n.*'x'"),
        (lambda m: m["files"].pop(0), r"manifest of a checkpoint is damaged\n.*\n.*model\.safe"),
        (lambda m: m.update(files=3), r"manifest of a checkpoint is damaged\n.*\n.*TypeError"),
        (lambda m: m["cache_parts"][0].pop("path"), r"manifest of a checkpoint is damaged\n"),
    ],
)
def test_another_manifest(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    url = save(CheckpointStore(str(tmp_path)), 0)
    rewrite(url, change, with_digest=True)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(url)


def test_a_checkpoint_of_before_there_were_costs_is_read(tmp_path: Path) -> None:
    url = save(CheckpointStore(str(tmp_path)), 0)
    rewrite(url, lambda m: m.pop("costs"), with_digest=True)
    assert read_checkpoint(url).costs == TrainingCosts(None, None)


def test_a_manifest_that_was_edited_is_refused(tmp_path: Path) -> None:
    url = save(CheckpointStore(str(tmp_path)), 0)
    rewrite(url, lambda m: None, with_digest=False)
    assert_whole(read_checkpoint(url), 0)
    rewrite(url, lambda m: m["position"].update(epoch=2), with_digest=False)
    with pytest.raises(CheckpointError, match=r"is damaged\n.*\n  got: SHA-256 .* not the one"):
        read_checkpoint(url)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"manifest of a checkpoint is damaged\n  where: .*manifest\.json\n"),
        (b"{", r"manifest of a checkpoint is damaged"),
        (b"\xff\xfe\xfd", r"manifest of a checkpoint is damaged"),
        (b"[]", r"this is not a checkpoint"),
        (b"{}", r"this is not a checkpoint"),
    ],
)
def test_a_manifest_of_garbage(store: CheckpointStore, content: bytes, message: str) -> None:
    url = save(store, 0)
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{path}/manifest.json", content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(url)


def test_a_safetensors_file_that_is_none(tmp_path: Path) -> None:
    url = save(CheckpointStore(str(tmp_path)), 0)
    content = b"not tensors"
    Path(url, "model.safetensors").write_bytes(content)

    def vouch(manifest: dict[str, Any]) -> None:
        import hashlib

        facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["files"][0].update(facts)

    rewrite(url, vouch, with_digest=True)
    with pytest.raises(
        CheckpointError, match=r"no safetensors file\n  where: .*model\.safetensors"
    ):
        read_checkpoint(url)


def test_a_place_without_a_checkpoint(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"no committed checkpoint\n  where: .*\n"):
            read_checkpoint(str(place))
    (tmp_path / "file").write_text("a file")
    with pytest.raises(CheckpointError, match=r"no committed checkpoint"):
        read_checkpoint(str(tmp_path / "file"))
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"a checkpoint cannot be read\n(.*\n)*  got: IsADir"):
        read_checkpoint(str(tmp_path / "folder"))
