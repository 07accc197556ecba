"""A file is whole or not there, and a storage that is not reached is not taken for an empty one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from felrec_dist.errors import StorageError
from felrec_dist.storage import check_names_one_folder, exists, json_sha256, write_whole
from tests.broken_storage import BrokenFileSystem, Fault, full, strange, unreachable

WHAT = "it cannot be written"


@pytest.fixture
def broken() -> Iterator[BrokenFileSystem]:
    BrokenFileSystem.reset()
    yield fsspec.filesystem("broken")
    BrokenFileSystem.reset()


@pytest.mark.parametrize("url", ["{}/new/deep/file", "file://{}/new/file", "memory:/{}/new/file"])
def test_what_was_written_is_read(tmp_path: Path, url: str) -> None:
    url = url.format(tmp_path)
    for content in (b"one", b"", b"a longer one"):
        write_whole(url, content, WHAT)
        fs, path = fsspec.core.url_to_fs(url)
        assert fs.cat_file(path) == content
        assert len(fs.find(fs._parent(path))) == 1


def test_a_local_file_does_not_pass_through_the_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another disk it would be copied from there, and may be copied by half."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    write_whole(str(tmp_path / "file"), b"whole", WHAT)
    assert (tmp_path / "file").read_bytes() == b"whole"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("is_there", [True, False])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, is_there: bool) -> None:
    target = tmp_path / "file"
    if is_there:
        target.write_text("before")
    (tmp_path / "file.partial").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"^it cannot be written\n.*/file\n.*No space left") as e:
        write_whole(str(target), b"after" * 10_000, WHAT)
    assert e.value.remedy
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == (
        {"file": "before"} if is_there else {}
    )


def test_interrupted_it_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    target.write_text("before")

    def interrupt(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(str(target), b"after", WHAT)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("operation", ["open", "write"])
def test_a_remote_file_that_fails_is_as_it_was(broken: BrokenFileSystem, operation: str) -> None:
    write_whole("broken://run/file", b"before", WHAT)
    BrokenFileSystem.fault = Fault((operation,), "file", full)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match=r"broken://run/file\n.*No space left"):
        write_whole("broken://run/file", b"after", WHAT)
    BrokenFileSystem.fault = None
    assert broken.cat_file("/run/file") == b"before"
    write_whole("broken://run/file", b"after", WHAT)
    assert broken.cat_file("/run/file") == b"after"


def test_half_a_file_that_the_storage_took_for_the_whole_is_removed(
    broken: BrokenFileSystem,
) -> None:
    BrokenFileSystem.fault = Fault(("write",), "file", None)
    with pytest.raises(StorageError, match=r"got: OSError: 2 of 5 bytes arrived"):
        write_whole("broken://run/file", b"after", WHAT)
    assert not broken.store


def test_only_what_is_not_there_does_not_exist(tmp_path: Path, broken: BrokenFileSystem) -> None:
    (tmp_path / "file").write_text("a file")
    local = fsspec.filesystem("file")
    assert exists(local, str(tmp_path))
    assert exists(local, str(tmp_path / "file"))
    assert not exists(local, str(tmp_path / "other"))
    assert not exists(local, str(tmp_path / "file" / "other"))
    write_whole("broken://run/file", b"a file", WHAT)
    assert exists(broken, "/run/file")
    assert not exists(broken, "/run/other")
    for error in (unreachable, strange):
        BrokenFileSystem.fault = Fault(("look",), "", error)
        assert not broken.exists("/run/file"), "fsspec's own says no"
        with pytest.raises(type(error())):
            exists(broken, "/run/file")


@pytest.mark.parametrize("name", ["run*", "run?", "run[ab]", "a[b/run"])
def test_a_wildcard_is_for_local_disks_only(name: str) -> None:
    check_names_one_folder(name)
    check_names_one_folder(f"/runs/{name}")
    with pytest.raises(ValueError, match=r"without \* \? \["):
        check_names_one_folder(f"s3://runs/{name}")
    check_names_one_folder("s3://runs/run-a.b_c")


def test_the_digest_of_facts_is_of_what_they_say() -> None:
    facts = {"b": [1, 2.5, None], "a": {"x": "é"}}
    digest = json_sha256(facts)
    assert json_sha256(json.loads(json.dumps(facts, indent=3, sort_keys=True))) == digest
    assert json_sha256({**facts, "b": [1, 2.5, 0]}) != digest
