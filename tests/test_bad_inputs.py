"""Any input may be bad, and any storage may fail: the command ends in words and nothing is lost.

Each case spoils one thing in a folder that holds raw events, a prepared data set and a finished
run, then gives the command that a user would give. The error must have the right class and say
what failed, where, what was found or expected, and what to do; every file that was there before
must have its bytes, and no other file or folder may be new, but for the few that a case names.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import pickle
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import felrec_dist
import felrec_dist.config
from felrec_dist.config import dump_config, load_config
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource
from felrec_dist.errors import ConfigError, RunStoppedError, StorageError
from felrec_dist.training.checkpoint import CheckpointStore, read_checkpoint
from felrec_dist.training.run import run_training
from felrec_dist.training.world import World
from tests import tiny
from tests.bad_inputs import (
    BEGIN,
    CASES,
    CSV,
    EVALUATE,
    PARQUET,
    PREPARE,
    TRAIN,
    Case,
    Place,
    evil_npy,
    evil_pickle,
    evil_torch_file,
)
from tests.broken_storage import BrokenFileSystem
from tests.launch.commands import Ended, Felrec, runner

ROOT = Path(felrec_dist.__path__[0]).parent


def unpickle_npy(content: bytes) -> object:
    return np.load(io.BytesIO(content), allow_pickle=True)


def unpickle_torch_file(content: bytes) -> object:
    return torch.load(io.BytesIO(content), weights_only=False)


@pytest.mark.parametrize(
    ("content", "load"),
    [
        (evil_pickle(), pickle.loads),
        (evil_npy(), unpickle_npy),
        (evil_torch_file(), unpickle_torch_file),
    ],
)
def test_evil_files_are_evil(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    load: Callable[[bytes], object],
) -> None:
    """A loader that unpickles would be seen."""
    monkeypatch.chdir(tmp_path)
    with suppress(FileExistsError):  # the array holds it more than once
        load(content)
    assert (tmp_path / "executed").exists()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for one another cost more than tiny sums take."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything as it should be: raw events, two data sets, a finished run and a stopped one."""
    folder = tmp_path_factory.mktemp("whole")
    dataset = tiny.prepare_events(folder)
    tiny.prepare_events(folder / "other", seed=1)
    events = pq.read_table(folder / "raw.parquet").to_pylist()
    rows = [f"{event['user']},{event['item']},{event['timestamp']}\n" for event in events]
    (folder / "raw.csv").write_text("".join(["user,item,time\n", *rows]))

    schedule = {"training": {"schedule": {"epochs": 2, "warmup_epochs": 1}}}
    config = tiny.experiment(dataset.url, str(folder / "run"), schedule)
    (folder / "config.yaml").write_text(dump_config(config))
    run_training(config, tiny.build_client(config), World.current(), resume=False)

    cut = tiny.experiment(
        dataset.url,
        str(folder / "cut"),
        {**schedule, "checkpoint": {"every_steps": 4, "on_stop": False}},
    )
    stopping = iter([False] * 8 + [True])
    with pytest.raises(RunStoppedError):
        tiny.build_trainer(cut, dataset, should_stop=lambda: next(stopping)).fit()
    return folder


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A copy of everything, which is also the current folder: what is executed is seen there."""
    folder = tmp_path / "place"
    shutil.copytree(whole, folder)
    for name in ("config.yaml", "run/config.yaml", "cut/config.yaml"):
        config = folder / name
        config.write_text(config.read_text().replace(str(whole), str(folder)))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    BrokenFileSystem.reset()
    yield Place(folder, monkeypatch)
    BrokenFileSystem.reset()


@pytest.fixture
def felrec(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Felrec:
    return runner(capfd, monkeypatch)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of the folder and of the broken storage; folders are there, too."""
    found = BrokenFileSystem.digests()
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def facts_of(ended: Ended) -> tuple[str, dict[str, str]]:
    """The class of the error that the command ended with, and its facts."""
    assert ended.code == 1, ended
    assert "Traceback" not in ended.out + ended.err
    told = ended.err[ended.err.index("error: ") :].removesuffix("\n")
    assert told.isprintable() or set(filter(lambda c: not c.isprintable(), told)) <= {"\n"}, told
    assert len(told) < 10_000
    head, *rest = re.split(r"\n  (where|got|expected|remedy): ", told)
    _, kind, what = head.split(": ", 2)
    return kind, {"what": what, **dict(zip(rest[::2], rest[1::2], strict=True))}


def assert_told(ended: Ended, case: Case, place: Place) -> None:
    kind, told = facts_of(ended)
    assert kind == case.error.__name__, told
    for name, pattern in case.facts.items():
        if pattern == "-":
            assert name not in told, (name, told)
        else:
            [pattern] = place.filled([pattern])
            assert re.search(pattern, told.get(name, "")), (name, pattern, told)
    assert {"what"} < told.keys()
    assert told.keys() & {"expected", "remedy"}, "nobody is told what to do"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_ends_in_words_and_changes_nothing(
    case: Case, place: Place, felrec: Felrec
) -> None:
    case.spoil(place)
    before = digests(place.folder)
    ended = felrec(*place.filled(case.command))
    assert_told(ended, case, place)
    after = digests(place.folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    strange = sorted(name for name in changed if not re.fullmatch(case.written, name))
    assert strange == []
    case.then(place, felrec)


def test_no_case_stands_twice() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


# Where a table of commands does not reach


@pytest.mark.parametrize("num_bytes", [0, 10_000, 20_000, 30_000, 300_000])
def test_a_disk_that_is_full_at_any_time_leaves_no_half_data_set(
    place: Place, num_bytes: int
) -> None:
    """No file may grow beyond so many bytes: the work of the sort, then the files themselves."""
    before = digests(place.folder)
    source = RawSource.parquet(
        place / "raw.parquet",
        user="user",
        item="item",
        timestamp="timestamp",
        timestamp_unit="s",
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        if num_bytes == 300_000:
            prepare(source, place / "new", name="tiny")
        else:
            with pytest.raises((ConfigError, StorageError), match=r"File too large\n(.|\n)*remedy"):
                prepare(source, place / "new", name="tiny")
            assert apart_from_progress(digests(place.folder)) == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    prepare(source, place / "new", name="tiny", overwrite=True).verify()
    assert only_the_new_data_set(digests(place.folder), before)


def apart_from_progress(found: dict[str, str]) -> dict[str, str]:
    """Without what a preparation that ran out of room keeps to go on from."""
    progress = re.compile(r"out|(out/)?(\.new\.partial|felrec-prepare-[0-9a-f]{16})(/.*)?")
    return {name: digest for name, digest in found.items() if not progress.fullmatch(name)}


def only_the_new_data_set(found: dict[str, str], before: dict[str, str]) -> bool:
    new = re.compile(r"out|(out/)?new(/.*)?")
    return before.items() <= found.items() and all(
        new.fullmatch(name) for name in found.keys() - before.keys()
    )


@pytest.mark.parametrize("failing", ["part-00000", "users_of_items", "items.parquet", "dataset"])
def test_a_disk_that_is_full_at_any_file_leaves_no_half_data_set(
    place: Place, felrec: Felrec, failing: str
) -> None:
    """Each file is opened by Arrow, NumPy or Python; in the place of one there is no room."""
    before = digests(place.folder)
    real_mkdir = Path.mkdir
    files = {
        "part-00000": ("events", "part-00000.parquet"),
        "users_of_items": ("neighbours", "users_of_items.npy"),
        "items.parquet": ("catalogue", "items.parquet"),
        "dataset": ("catalogue", "../dataset.json"),
    }
    folder, name = files[failing]

    def mkdir(path: Path, *args: Any, **options: Any) -> None:
        real_mkdir(path, *args, **options)
        if path.name == folder and not (path / name).is_symlink():
            (path / name).symlink_to("/dev/full")

    with place.patch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        ended = felrec(*place.filled(PREPARE))
    kind, told = facts_of(ended)
    assert kind == "StorageError"
    assert "No space left" in told["got"]
    assert "free space" in told["remedy"]
    assert apart_from_progress(digests(place.folder)) == before
    # What it keeps is of use: with room again, the same command ends with the whole data set.
    for link in filter(Path.is_symlink, place.folder.rglob("*")):
        link.unlink()
    assert felrec(*place.filled(PREPARE)).code == 0
    assert only_the_new_data_set(digests(place.folder), before)


def test_an_object_store_that_refuses_ends_in_words(place: Place, felrec: Felrec) -> None:
    """The real one, with an endpoint where nobody listens and no patience."""
    s3fs = pytest.importorskip("s3fs")
    place.patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        place.patch.setenv(name, "x")
    place.patch.setitem(
        fsspec.config.conf, "s3", {"config_kwargs": {"retries": {"max_attempts": 0}}}
    )
    place.patch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    before = digests(place.folder)
    for command, error in (
        ((*BEGIN, "data.url=s3://bucket/data"), "DatasetError"),
        ((*TRAIN, "run.url=s3://bucket/run"), "StorageError"),
        ((*EVALUATE, "s3://bucket/run/checkpoints/epoch-0000"), "CheckpointError"),
        ((*CSV, "--out", "s3://bucket/new"), "StorageError"),
        (("train", "s3://bucket/config.yaml", "--local"), "ConfigError"),
        (("cache", "digest", "s3://bucket/run"), "StorageError"),
    ):
        kind, told = facts_of(felrec(*place.filled(command)))
        assert kind == error
        assert "EndpointConnectionError" in told["got"]
        assert told["where"].startswith("s3://bucket/")
        assert told["remedy"]
    assert digests(place.folder) == before
    s3fs.S3FileSystem.clear_instance_cache()


def test_ids_and_times_at_the_edge_of_64_bits_are_ids_and_times(
    place: Place, felrec: Felrec
) -> None:
    generator = np.random.default_rng(0)
    ids = np.array([-(2**63), -(2**63) + 1, -1, 0, 1, 2**62, 2**63 - 2, 2**63 - 1])
    last = 253_402_300_799_999_999
    columns = {
        "user": generator.choice(ids, 300),
        "item": generator.choice(ids, 300),
        "timestamp": np.sort(generator.choice([0, 1, last - 1, last], 300)),
    }
    pq.write_table(pa.table(columns), place / "raw.parquet")
    ended = felrec(*place.filled(["us" if word == "s" else word for word in PARQUET]))
    assert ended.code == 0, ended.err
    dataset = PreparedDataset.open(place / "new")
    assert set(dataset.users.ids) == set(dataset.items.ids) == set(ids)
    ended = felrec(*place.filled((*TRAIN, "data.url=PLACE/new", "run.url=PLACE/edge")))
    assert ended.code == 0, ended.err
    newest = read_checkpoint(str(place / "edge/checkpoints/epoch-0001"))
    client = tiny.build_client(load_config(str(place / "edge/config.yaml")))
    client.restore(newest.cache_prefix, newest.chain.parts, 1, 0)
    client.begin_generation(1)
    fetched = client.fetch(0, {"user": ids})["user"]
    assert fetched.found.all()
    assert np.isfinite(fetched.rows).all()
    assert np.unique(fetched.rows, axis=0).shape == fetched.rows.shape, "no two share a row"


HOSTILE = (
    "$(mkdir executed)",
    "`mkdir executed`",
    "; mkdir executed #",
    "| mkdir executed",
    "../../outside",
    "/etc/passwd",
    "..",
    ".",
    "~",
    "-rf",
    "a/b\\c",
    "two\nlines\r\n",
    "\x1b[2J\x07",
    "'; DROP TABLE raw; --",
    "\"quoted\", 'twice'",
    "{x!r} %s %n",
    "*?[a-z]",
    "NULL",
    "null\x00byte",
    " ",
    "\u202eright to left",
    "🦊" * 50,
    "x" * 100_000,
)


def test_hostile_ids_and_names_are_only_text(place: Place, felrec: Felrec) -> None:
    """They reach no shell and no file name: only the usual files come, where they belong."""
    ids = [*HOSTILE, *(f"plain {number}" for number in range(20))]
    generator = np.random.default_rng(0)
    users, items = ([ids[n] for n in generator.integers(0, len(ids), 300)] for _ in range(2))
    columns = {"user": users, "item": items, "timestamp": list(range(300))}
    pq.write_table(pa.table(columns), place / "raw.parquet")
    before = digests(place.folder)
    name = "../../$(mkdir executed)\n'\"; DROP TABLE raw; --"
    ended = felrec(*place.filled((*PARQUET, "--name", name)))
    assert ended.code == 0, ended.err
    dataset = PreparedDataset.open(place / "new")
    assert dataset.name == name
    for names, catalogue in ((users, dataset.users), (items, dataset.items)):
        assert catalogue.names is not None
        assert set(catalogue.names.to_pylist()) == set(names)
    assert felrec(*place.filled((*TRAIN, "data.url=PLACE/new", "run.url=PLACE/new-run"))).code == 0

    usual = {name.partition("/")[2] for name in before if name.split("/")[0] in ("data", "run")}
    came = digests(place.folder).keys() - before.keys()
    folders = {name for name in came if (place / name).is_dir()}
    for found in came - folders:
        top, _, rest = found.partition("/")
        assert top in ("new", "new-run")
        assert rest in usual or rest.startswith("tensorboard/events.out.tfevents."), found
    assert {path.name for path in place.folder.parent.iterdir()} == {"place"}


@pytest.mark.parametrize(
    "name", ["a b; mkdir executed #", "$(mkdir executed)", "'\"`{x}`", "[*]", "ф-🦊", "-rf"]
)
def test_folders_of_hostile_names_hold_all_that_comes(
    place: Place, felrec: Felrec, name: str
) -> None:
    folder = place / "hostile" / name
    folder.mkdir(parents=True)
    raw = folder / f"{name}.csv"
    shutil.copy(place / "raw.csv", raw)
    before = digests(place.folder)
    out = folder / "data"
    given = {"PLACE/raw.csv": str(raw), "PLACE/out/new": str(out)}
    words = [given.get(word, word) for word in PREPARE]
    ended = felrec(*words, "--temp-dir", folder)
    assert ended.code == 0, ended.err
    overrides = [
        f"{key}={json.dumps(str(value), ensure_ascii=False)}"
        for key, value in (("data.url", out), ("run.url", folder / "run"))
    ]
    for _ in range(2):
        ended = felrec(*place.filled(TRAIN), *overrides)
        assert ended.code == 0, ended.err
    newest = CheckpointStore(str(folder / "run")).latest()
    ended = felrec("cache", "verify", newest)
    assert ended.code == 0, ended.err
    for found in digests(place.folder).keys() - before.keys():
        assert found.startswith(f"hostile/{name}/"), found


# What the code may not do

NEVER = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "torch.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
}
SAFE_LOADERS = {"_Loader", "yaml.SafeLoader"}


def dangers(source: str) -> list[str]:
    """Calls that would execute what a file or a name holds, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        loader = options.get("Loader", *[ast.unparse(arg) for arg in node.args[1:2]] or [""])
        if (
            called in NEVER
            or (called == "yaml.load" and loader not in SAFE_LOADERS)
            or (called == "np.load" and options.get("allow_pickle") != "False")
            or options.get("shell", "False") != "False"
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    ("source", "is_dangerous"),
    [
        ("eval(text)", True),
        ("model.eval()", False),
        ("os.system('ls')", True),
        ("subprocess.run(command, shell=True)", True),
        ("subprocess.run(command, shell=False)", False),
        ("torch.load(path)", True),
        ("safetensors.torch.load(content)", False),
        ("yaml.load(text, yaml.Loader)", True),
        ("yaml.load(text)", True),
        ("yaml.load(text, Loader=yaml.Loader)", True),
        ("yaml.load(text, _Loader)", False),
        ("yaml.safe_load(text)", False),
        ("np.load(path)", True),
        ("np.load(path, allow_pickle=False)", False),
        ("pickle.loads(content)", True),
    ],
)
def test_the_search_for_dangers_finds_them(source: str, is_dangerous: bool) -> None:
    assert bool(dangers(source)) is is_dangerous


def test_the_code_executes_no_input() -> None:
    files = [
        path
        for name in ("felrec_dist", "cache_server", "launch")
        for path in (ROOT / name).rglob("*.py")
    ]
    assert len(files) > 50
    found = {str(path.relative_to(ROOT)): dangers(path.read_text()) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}
    pickles = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    found_imports = {
        (str(path.relative_to(ROOT)), name)
        for path in files
        for name in imports(path.read_text()) & {*pickles, "subprocess"}
    }
    # It starts this program itself, with a list of arguments and no shell.
    assert found_imports == {("launch/suite_cli.py", "subprocess")}


def imports(source: str) -> set[str]:
    return {
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [*(a.name for a in node.names), getattr(node, "module", None) or ""]
    }


def test_the_yaml_loader_is_the_safe_one() -> None:
    assert issubclass(felrec_dist.config._Loader, yaml.SafeLoader)
