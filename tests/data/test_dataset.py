"""Opening a prepared data set, and refusing what is not one."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import felrec_dist.data.dataset
from felrec_dist.data.dataset import Catalogue, PreparedDataset
from felrec_dist.data.prepare import prepare
from felrec_dist.errors import DatasetError
from felrec_dist.storage import json_sha256
from tests.data.oracle import prepare_rows, some_rows, write_parquet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(prepare_rows(some_rows(), tmp_path).url)


def change_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "dataset.json"
        manifest = json.loads(file.read_text())
        change(manifest)
        if manifest.pop("sha256", None) is not None:
            manifest["sha256"] = json_sha256(manifest)
        file.write_text(json.dumps(manifest))

    return damage


def truncate(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "dataset.json").unlink(),
            r"no prepared data set here(.|\n)*a folder without dataset.json(.|\n)*interrupted",
        ),
        (
            lambda folder: (folder / "dataset.json").write_text('{"format": "felrec'),
            "not the description of a prepared data set",
        ),
        (
            lambda folder: (folder / "dataset.json").write_text("[1]"),
            "not the description of a prepared data set",
        ),
        (
            change_manifest(lambda manifest: manifest.update(schema_version=0)),
            r"another schema version(.|\n)*got: 0\n  expected: 1\n  remedy: prepare it again",
        ),
        (change_manifest(lambda manifest: manifest.pop("split")), "is incomplete"),
        (
            lambda folder: (folder / "events/part-00003.parquet").unlink(),
            r"where: .*part-00003.parquet\n  got: no such file",
        ),
        (truncate("events/part-00005.parquet"), r"where: .*part-00005.parquet\n  got: \d+ bytes"),
        (
            truncate("neighbours/users_of_items.npy"),
            r"where: .*users_of_items.npy\n  got: 927 bytes\n  expected: 928",
        ),
        (truncate("catalogue/items.parquet"), "where: .*catalogue/items.parquet"),
    ],
)
def test_a_damaged_data_set_does_not_open(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    PreparedDataset.open(folder)
    damage(folder)
    with pytest.raises(DatasetError, match=message):
        PreparedDataset.open(folder)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"got: no such folder(.|\n)*felrec prepare"):
        PreparedDataset.open(tmp_path / "nothing")


def test_an_unknown_protocol() -> None:
    with pytest.raises(DatasetError, match=r"no file system for a URL(.|\n)*gopher"):
        PreparedDataset.open("gopher://host/path")


@pytest.mark.parametrize("name", ["neighbours/items_of_users.npy", "catalogue/users.parquet"])
def test_files_damaged_inside(folder: Path, name: str) -> None:
    (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    dataset = PreparedDataset.open(folder)
    with pytest.raises(DatasetError, match=f"missing or damaged(.|\n)*{name}"):
        _ = dataset.users if "catalogue" in name else dataset.neighbours("user")[0]


def test_verify_sees_a_changed_byte(folder: Path) -> None:
    dataset = PreparedDataset.open(folder)
    dataset.verify()
    file = folder / "events/part-00001.parquet"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=r"part-00001.parquet\n  got: SHA-256"):
        PreparedDataset.open(folder).verify()


def test_a_flipped_bit_anywhere_in_the_description_is_noticed(folder: Path) -> None:
    """Counts and the split stand only there: one digit would make another experiment of it."""
    file = folder / "dataset.json"
    content = file.read_bytes()
    generator = np.random.default_rng(0)
    num_noticed = 0
    for _ in range(300):
        flipped = bytearray(content)
        flipped[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
        file.write_bytes(flipped)
        try:
            PreparedDataset.open(folder)
        except DatasetError:
            num_noticed += 1
        else:
            # White space between the values, or the name of the digest itself.
            facts, found = json.loads(content), json.loads(bytes(flipped))
            known = facts.keys() - {"sha256"}
            assert {key: facts[key] for key in known} == {key: found[key] for key in known}
    assert num_noticed > 200


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["split"].update(train=[0, 70]),
        lambda manifest: manifest.update(num_events=101),
        lambda manifest: manifest["parts"].pop(2),
        lambda manifest: manifest["parts"].clear(),
        lambda manifest: manifest["files"].pop(),
        lambda manifest: manifest["files"][0].update(path="../../secret"),
        lambda manifest: manifest["parts"][0].update(path="events/../../secret.parquet"),
        lambda manifest: manifest.update(digest="../../.config"),
    ],
)
@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_description_that_does_not_fit_together(
    folder: Path, change: Callable[[dict[str, Any]], object], is_sealed: bool
) -> None:
    if not is_sealed:
        change_manifest(lambda manifest: manifest.update(sha256=None))(folder)
        PreparedDataset.open(folder)
    change_manifest(change)(folder)
    with pytest.raises(
        DatasetError, match=r"incomplete\.\n.*\n  got: ValueError: the .*\n.*version 1"
    ):
        PreparedDataset.open(folder)


def test_neighbours_of_another_shape(folder: Path) -> None:
    name = "neighbours/items_of_users.npy"
    np.save(folder / name, np.zeros(99, dtype=np.int64))
    size = (folder / name).stat().st_size

    def change(manifest: dict[str, Any]) -> None:
        [file] = [file for file in manifest["files"] if file["path"] == name]
        file["bytes"] = size

    change_manifest(change)(folder)
    with pytest.raises(DatasetError, match=r"got: int64 \(99,\)\n  expected: int64 \(100,\)"):
        PreparedDataset.open(folder).neighbours("user")[0]


def test_local_files_are_mapped_where_they_lie(folder: Path) -> None:
    index = PreparedDataset.open(folder).neighbours("item")[0]
    assert isinstance(index, np.memmap)
    assert Path(str(index.filename)) == folder / "neighbours/users_of_items.npy"


def test_a_data_set_pickles_as_its_url(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    dataset = PreparedDataset.open("out")
    assert len(dataset.users) == dataset.num_users
    monkeypatch.chdir("/")
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert (again.digest, again.url, again.split) == (dataset.digest, dataset.url, dataset.split)


def test_a_catalogue_checks_its_columns() -> None:
    right = np.zeros(2, dtype=np.int64)
    wrong = np.zeros(3, dtype=np.int64)
    with pytest.raises(DatasetError, match=r"where: validation_counts\n  got: int64 \(3,\)"):
        Catalogue(right, right, right, wrong, right)


# Staging


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[str]:
    source = write_parquet(some_rows(), tmp_path / "raw.parquet")
    prepare(source, "memory://staged/out", name="rows")
    yield "memory://staged/out"
    fsspec.filesystem("memory").rm("/staged", recursive=True)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    memory = type(fsspec.filesystem("memory"))
    get_file = memory.get_file

    def counted(self: Any, remote: str, local: str, **options: Any) -> None:
        made.append(remote)
        get_file(self, remote, local, **options)

    monkeypatch.setattr(memory, "get_file", counted)
    return made


def test_remote_neighbours_are_copied_once_per_node(
    tmp_path: Path, remote: str, downloads: list[str]
) -> None:
    results: list[np.ndarray[Any, Any]] = []

    def rank() -> None:
        dataset = PreparedDataset.open(remote, stage_dir=tmp_path / "stage")
        results.append(dataset.neighbours("user")[0])

    ranks = [threading.Thread(target=rank) for _ in range(8)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert downloads == ["/staged/out/neighbours/items_of_users.npy"]
    assert len(results) == 8
    assert all((result == results[0]).all() for result in results)
    staged = [path.name for path in (tmp_path / "stage").rglob("*") if path.is_file()]
    assert sorted(staged) == ["items_of_users.npy", "items_of_users.npy.lock"]


def test_another_data_set_at_the_same_url_is_staged_anew(
    tmp_path: Path, remote: str, downloads: list[str]
) -> None:
    old = PreparedDataset.open(remote, stage_dir=tmp_path / "stage").neighbours("user")[0]
    rows = [(user, 4, time) for user, _, time in some_rows()]  # of the same size
    source = write_parquet(rows, tmp_path / "raw.parquet")
    prepare(source, remote, name="rows", overwrite=True)
    new = PreparedDataset.open(remote, stage_dir=tmp_path / "stage").neighbours("user")[0]
    assert len(downloads) == 2
    assert (new == 4).all()
    assert not (old == 4).all()


def test_a_broken_copy_is_not_taken_for_whole(
    tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type(fsspec.filesystem("memory"))
    with monkeypatch.context() as patch:
        patch.setattr(
            memory, "get_file", lambda _self, _remote, local: Path(local).write_bytes(b"half")
        )
        dataset = PreparedDataset.open(remote, stage_dir=tmp_path / "stage")
        with pytest.raises(DatasetError, match="got: 4 bytes"):
            dataset.neighbours("user")[0]
    assert not list((tmp_path / "stage").rglob("*.partial"))
    assert dataset.neighbours("user")[0].shape == (100,)


def test_waiting_for_another_process_has_a_limit(
    tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(felrec_dist.data.dataset, "STAGE_TIMEOUT_S", 0.2)
    dataset = PreparedDataset.open(remote, stage_dir=tmp_path / "stage")
    target = tmp_path / "stage" / dataset.digest / "neighbours/items_of_users.npy"
    target.parent.mkdir(parents=True)
    with (
        felrec_dist.data.dataset._lock(Path(f"{target}.lock"), unless=lambda: False),
        pytest.raises(DatasetError, match=r"did not finish copying(.|\n)*items_of_users.npy.lock"),
    ):
        dataset.neighbours("user")[0]
    assert dataset.neighbours("user")[0].shape == (100,)


def test_the_default_stage_folder_is_in_the_users_cache(
    tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dataset = PreparedDataset.open(remote)
    staged = Path(str(dataset.neighbours("item")[0].filename))
    assert staged.is_relative_to(tmp_path / "cache/felrec-dist" / dataset.digest)
