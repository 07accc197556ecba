"""Bad inputs and failing storage, one case each, for ``test_bad_inputs.py``."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    FelrecError,
    NonFiniteLossError,
    RawDataError,
    SnapshotError,
    StorageError,
    TrainingError,
)
from felrec_dist.storage import json_sha256
from felrec_dist.training.checkpoint import CheckpointStore, read_checkpoint
from tests import tiny
from tests.broken_storage import (
    BrokenFileSystem,
    Fault,
    forbidden,
    full,
    read_only,
    slow,
    strange,
    unreachable,
)
from tests.launch.commands import Felrec

FIRST, LAST = "run/checkpoints/epoch-0000", "run/checkpoints/epoch-0001"
CUTS = "cut/checkpoints/epoch-0000-step-000000"  # of a run that was stopped within an epoch
PART = "data/events/part-00000.parquet"
NEIGHBOURS = "data/neighbours/items_of_users.npy"

COLUMNS = ("--user", "user", "--item", "item", "--timestamp-unit", "s", "--timestamp")
CSV = ("prepare", "csv", "PLACE/raw.csv", *COLUMNS, "time")
PREPARE = (*CSV, "--out", "PLACE/out/new")
TRAIN = ("train", "PLACE/config.yaml", "--local")
BEGIN = (*TRAIN, "run.url=PLACE/new")
BEGIN_BROKEN = (*TRAIN, "run.url=broken://run")
GO_ON_CUT = (*TRAIN, "run.url=PLACE/cut", "checkpoint.every_steps=4")
EVALUATE = ("evaluate", "PLACE/config.yaml", "--local", "--checkpoint")

# What a run leaves that got as far as its first step.
BEGUN = r"(new|run|cut)(/config\.yaml|/tensorboard(/events\..*)?)?"


@dataclass(frozen=True)
class Place:
    """A folder of one case, and what a case may patch."""

    folder: Path
    patch: pytest.MonkeyPatch

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def filled(self, words: Sequence[str]) -> list[str]:
        """The words, with the folder in the place of PLACE."""
        return [word.replace("PLACE", str(self.folder)) for word in words]


Spoil = Callable[[Place], object]
Then = Callable[[Place, Felrec], object]


def nothing(place: Place, felrec: Felrec | None = None) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: of the case.
        spoil: makes it bad.
        command: of felrec.
        error: the class of what it says.
        facts: a pattern for each of what, where, got, expected and remedy; "-" for a fact that is
            not said.
        written: a pattern of the files that may have changed or come.
        then: what else must hold.
    """

    name: str
    spoil: Spoil
    command: Sequence[str]
    error: type[FelrecError]
    facts: Mapping[str, str]
    written: str = "nothing"
    then: Then = nothing


def facts(text: str) -> dict[str, str]:
    """Patterns as ``what | where | got | expected | remedy``."""
    names = ("what", "where", "got", "expected", "remedy")
    return dict(zip(names, text.split(" | "), strict=True))


# What spoils


def write(name: str, content: bytes | str) -> Spoil:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda place: (place / name).write_bytes(data)


def append(name: str, text: str | bytes) -> Spoil:
    def spoil(place: Place) -> None:
        added = text if isinstance(text, bytes) else text.encode()
        (place / name).write_bytes((place / name).read_bytes() + added)

    return spoil


def replace(name: str, old: str, new: str) -> Spoil:
    def spoil(place: Place) -> None:
        text = (place / name).read_text()
        assert old in text
        (place / name).write_text(text.replace(old, new, 1))

    return spoil


def remove(name: str) -> Spoil:
    def spoil(place: Place) -> None:
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def as_folder(name: str) -> Spoil:
    def spoil(place: Place) -> None:
        remove(name)(place)
        (place / name).mkdir()

    return spoil


def as_file(name: str) -> Spoil:
    def spoil(place: Place) -> None:
        remove(name)(place)
        (place / name).write_text("a file")

    return spoil


def truncate(name: str, num_bytes: int = 9) -> Spoil:
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:-num_bytes])


def flip(name: str, where: float = 0.5) -> Spoil:
    def spoil(place: Place) -> None:
        content = bytearray((place / name).read_bytes())
        content[int(where * len(content))] ^= 1
        (place / name).write_bytes(content)

    return spoil


def copy(source: str, target: str) -> Spoil:
    def spoil(place: Place) -> None:
        assert (place / source).read_bytes() != (place / target).read_bytes()
        shutil.copy(place / source, place / target)

    return spoil


def edit(name: str, change: Callable[[dict[str, Any]], object], *, seal: bool = False) -> Spoil:
    """Changes a file of JSON; sealed, its own digest vouches for the change."""

    def spoil(place: Place) -> None:
        tree = json.loads((place / name).read_text())
        change(tree)
        if seal:
            tree.pop("sha256", None)
            tree["sha256"] = json_sha256(tree)
        (place / name).write_text(json.dumps(tree))

    return spoil


def vouched(checkpoint: str, name: str, content: bytes) -> Spoil:
    """Puts another file into a checkpoint, with a manifest that says it belongs there."""

    def spoil(place: Place) -> None:
        (place / checkpoint / name).write_bytes(content)

        def change(manifest: dict[str, Any]) -> None:
            [file] = [file for file in manifest["files"] if file["path"] == name]
            file.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

        edit(f"{checkpoint}/manifest.json", change, seal=True)(place)

    return spoil


def table(**columns: Any) -> Spoil:
    """Raw events of Parquet."""
    return lambda place: pq.write_table(pa.table(columns), place / "raw.parquet")


def fault(*operations: Any, path: str = "", error: Any, **settings: Any) -> Spoil:
    def spoil(place: Place) -> None:
        BrokenFileSystem.fault = Fault(operations, path, error, **settings)

    return spoil


def both(*spoils: Spoil) -> Spoil:
    def spoil(place: Place) -> None:
        for each in spoils:
            each(place)

    return spoil


def on_broken(name: str) -> Spoil:
    return lambda place: BrokenFileSystem.fill(f"broken://{name}", place / name)


class Evil:
    """Unpickled, it leaves a file in the folder that is the current one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def evil_pickle() -> bytes:
    return pickle.dumps(Evil())


def evil_torch_file() -> bytes:
    content = io.BytesIO()
    torch.save({"x": Evil()}, content)
    return content.getvalue()


def evil_npy() -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([Evil()] * 300), allow_pickle=True)
    return content.getvalue()


# What must hold afterwards


def assert_restores(url: str) -> None:
    """The checkpoint is whole, its cache too."""
    checkpoint = read_checkpoint(url)
    config = tiny.experiment("data", "run")
    client = tiny.build_client(config)
    client.restore(checkpoint.cache_prefix, checkpoint.chain.parts, 1, 0)
    assert sum(shard.tables["user"].num_rows for shard in client.stats()) > 0


def report(run_url: str) -> dict[str, Any]:
    with fsspec.open(f"{run_url}/evaluation/test-causal.json") as file:
        result: dict[str, Any] = json.load(file)
    for name in ("checkpoint_url", "step_seconds", "epoch_seconds"):
        result.pop(name)
    return result


def newest_restores(run_url: str) -> None:
    BrokenFileSystem.fault = None
    newest = CheckpointStore(run_url).latest()
    assert newest is not None
    assert_restores(newest)


def goes_on_without(checkpoint: str) -> Then:
    """What the message advises: without this checkpoint the run goes on and ends as it had."""

    def then(place: Place, felrec: Felrec) -> None:
        before = report(str(place / "run"))
        assert_restores(str(place / FIRST))
        shutil.rmtree(place / checkpoint)
        assert felrec(*place.filled(TRAIN)).code == 0
        assert report(str(place / "run")) == before

    return then


def repaired(latest: str | None) -> Then:
    """The newest checkpoint is the one that was whole; once the storage works again, the same
    command goes on from there and ends as a run without faults.
    """

    def then(place: Place, felrec: Felrec) -> None:
        assert BrokenFileSystem.fault is not None
        assert BrokenFileSystem.fault.num_met > 0
        BrokenFileSystem.fault = None
        newest = CheckpointStore("broken://run").latest()
        assert newest == (latest and f"broken://run/checkpoints/{latest}")
        if newest is not None:
            assert_restores(newest)
        ended = felrec(*place.filled(BEGIN_BROKEN))
        assert ended.code == 0, ended.err
        assert report("broken://run") == report(str(place / "run"))

    return then


def nothing_opens(url: str) -> Then:
    def then(place: Place, felrec: Felrec) -> None:
        BrokenFileSystem.fault = None
        with pytest.raises(DatasetError, match="no prepared data set"):
            PreparedDataset.open(place.filled([url])[0])

    return then


# Configs


def config_case(name: str, spoil: Spoil | str, told: str) -> Case:
    """``what | got | expected | remedy``; ``spoil`` may be text for the file, or an override."""
    command: Sequence[str] = BEGIN
    where = r"PLACE/config\.yaml"
    if isinstance(spoil, str) and spoil.endswith("\n"):
        spoil = append("config.yaml", spoil)
    elif isinstance(spoil, str):
        command, where, spoil = (*BEGIN, spoil), r"config\.yaml|command line|^[\w.]+$", nothing
    what, rest = told.split(" | ", 1)
    patterns = facts(f"{what} | {where} | {rest}")
    return Case(f"config: {name}", spoil, command, ConfigError, patterns)


def yaml_case(name: str, spoil: Spoil | str, got: str) -> Case:
    return config_case(name, spoil, f"is not YAML | {got} | - | quotes")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
BOMB_IN_A_VALUE = "training.seed=[&a [1,1,1,1,1,1,1,1,1]{}]".format(
    "".join(
        f",&{name} [{','.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefghi", "bcdefghij", strict=True)
    )
)
PYTHON_OBJECT = "x: !!python/object/apply:os.mkdir [executed]\n"

CONFIG_CASES = [
    config_case(
        "unknown key",
        "trainning: {}\n",
        r"unknown config key trainning | - | one of data, run, model | did you mean training\?",
    ),
    config_case(
        "wrong type", "data.batch_size='16'", r"data\.batch_size breaks | '16' | valid integer | -"
    ),
    config_case("number for text", "run.url=7", r"run\.url breaks | 7 | valid string | -"),
    config_case("out of range", "cache.num_shards=0", "num_shards breaks | 0 | greater than | -"),
    config_case("not a number", "training.schedule.base_lr=.nan", "breaks | nan | finite | -"),
    config_case("infinite", "training.schedule.base_lr=-.inf", "breaks | -inf | finite | -"),
    config_case("too large to be finite", "cache.timeout_s=1e999", "breaks | inf | finite | -"),
    config_case(
        "batch not divisible",
        "cluster.num_workers=3",
        r"breaks a rule | - | batch_size = 16 must be a multiple of cluster\.num_workers = 3 | -",
    ),
    config_case("override without value", "training.seed", "no value | seed | key=value | -"),
    config_case(
        "override through a value", "data.url.x=1", "through a value | url = ' | section | -"
    ),
    config_case(
        "a wildcard on remote storage", "run.url=s3://b/[ab]", r"breaks | b/ | \* \? \[ | -"
    ),
    config_case("absent", remove("config.yaml"), "does not exist | - | - | see configs/"),
    config_case(
        "a folder", as_folder("config.yaml"), "cannot be read | IsADirectory | text | rights"
    ),
    config_case(
        "binary",
        write("config.yaml", b"\x89PNG\r\n\x1a\n\x00\xff\xfe"),
        "cannot be read | UnicodeDecodeError | a text file | address",
    ),
    config_case(
        "empty", write("config.yaml", ""), "no tree of keys | NoneType | sections such | -"
    ),
    config_case("bomb of aliases", BOMB, "unknown config key a0 | - | one of data | -"),
    config_case(
        "bomb in a value", BOMB_IN_A_VALUE, r"seed breaks | ^\[\[1, .{,500}$ | integer | -"
    ),
    config_case(
        "alias of itself", "model.encoder=&x [*x]", r"encoder breaks | \[ | dictionary | -"
    ),
    config_case(
        "a huge number", f"training.seed=0x{'f' * 5000}", "seed breaks | int: Exc | less | -"
    ),
    yaml_case("NUL bytes", write("config.yaml", b"data:\0{}"), "#x0000"),
    yaml_case("cut off", write("config.yaml", "data: {url: 'a"), "end of stream"),
    yaml_case("override that is no YAML", "training.seed={", "parsing"),
    yaml_case("object of Python", PYTHON_OBJECT, "constructor for the tag"),
    yaml_case("object of Python as override", PYTHON_OBJECT[:-1].replace(": ", "=", 1), "tag"),
    yaml_case("alias of nothing", "x: *nowhere\n", "undefined alias"),
    yaml_case("key twice", "training: {seed: 1}\n", "'training' stands there twice"),
    yaml_case("deeper than the stack", f"x: {'[' * 3000}\n", "RecursionError"),
    yaml_case("a date that is none", "x: 2020-13-45\n", "month"),
    yaml_case("5000 digits", f"training.seed={'1' * 5000}", "4300 digits"),
    Case(
        "config: at a URL of an unknown kind",
        nothing,
        ("train", "nosuch://config.yaml", "--local"),
        ConfigError,
        facts("cannot be read | nosuch:// | Protocol not known | any fsspec URL | address"),
    ),
    Case(
        "config: on storage that is not reached",
        fault("read", error=strange),
        ("train", "broken://config.yaml", "--local"),
        ConfigError,
        facts("cannot be read | broken:// | EndpointConnectionError | text | connection"),
    ),
    Case(
        "config: no CUDA device",
        lambda place: place.patch.setattr(torch.cuda, "is_available", lambda: False),
        (*BEGIN, "run.device=cuda"),
        ConfigError,
        facts(r"no CUDA device | run\.device | cuda | - | nvidia-smi"),
    ),
    Case(
        "config: more events a batch than there are",
        nothing,
        (*BEGIN, "data.batch_size=1000"),
        ConfigError,
        facts("no whole batch | PLACE/data | 240 training events | at most | -"),
    ),
    # Both beyond what an address can reach: no machine grants it.
    Case(
        "config: a queue larger than memory",
        nothing,
        (*BEGIN, "model.queue_size=100000000000000"),
        TrainingError,
        facts("more memory | PLACE/new | allocate | 'queue_size': 1000 | smaller"),
    ),
    Case(
        "config: more negatives than memory",
        nothing,
        (*BEGIN, "evaluation.num_negatives=10000000000000"),
        TrainingError,
        facts("more memory | PLACE/new | allocate | num_negatives = 1000 | smaller"),
        written=BEGUN,
    ),
]


# Raw events


def raw_case(
    name: str,
    spoil: Spoil,
    told: str,
    *,
    error: type[FelrecError] = RawDataError,
    command: Sequence[str] = PREPARE,
    written: str = "nothing",
    then: Then = nothing,
) -> Case:
    return Case(f"raw: {name}", spoil, command, error, facts(told), written, then)


ROW_302 = r"PLACE/raw\.csv, row 302, column "
PARQUET = ("prepare", "parquet", "PLACE/raw.parquet", *COLUMNS, "timestamp", "--out", "PLACE/new")
MANY = list(range(30))

RAW_CASES = [
    raw_case(
        "missing column",
        replace("raw.csv", "time", "date"),
        r"column is missing | PLACE/raw\.csv, row 1 | user, item, date | 'time' | name one",
    ),
    raw_case(
        "timestamp that is none",
        append("raw.csv", "1,2,yesterday\n"),
        f"timestamp cannot be read | {ROW_302}'time' | 'yesterday' | unit s | correct the row",
    ),
    raw_case(
        "id that is no integer",
        append("raw.csv", "1.5,2,99\n"),
        rf"user is not an integer | {ROW_302}'user' | '1\.5' | kind int | --user-ids string",
        command=(*PREPARE, "--user-ids", "int"),
    ),
    raw_case(
        "id beyond 64 bits",
        append("raw.csv", f"1,{2**63},99\n"),
        rf"beyond a 64-bit integer | {ROW_302}'item' | {2**63!s} | 2\^63 | string",
    ),
    raw_case(
        "no id",
        append("raw.csv", ",2,99\n"),
        f"user is missing | {ROW_302}'user' | '' | a value | drop the row",
    ),
    raw_case(
        "negative timestamp",
        append("raw.csv", "1,2,-5\n"),
        f"timestamp is negative | {ROW_302} | '-5' | from 1970 on | correct or drop",
    ),
    raw_case(
        "timestamp beyond 64 bits",
        append("raw.csv", "1,2,99999999999999999999\n"),
        f"out of range | {ROW_302} | '9{{20}}' | before the year 10000 | --timestamp-unit",
    ),
    raw_case(
        "milliseconds taken for seconds",
        append("raw.csv", "1,2,1700000000000\n"),
        f"out of range | {ROW_302} | '1700000000000' | unit s | --timestamp-unit",
    ),
    raw_case(
        "timestamp not a number",
        append("raw.csv", "1,2,nan\n"),
        f"timestamp cannot be read | {ROW_302} | 'nan' | unit s | correct the row",
    ),
    raw_case(
        "empty file",
        write("raw.csv", ""),
        r"is empty | PLACE/raw\.csv | 0 bytes | a header and rows | check the file",
    ),
    raw_case(
        "header alone",
        write("raw.csv", "user,item,time\n"),
        r"hold no rows | PLACE/raw\.csv | 0 rows | at least one event | check the file",
    ),
    raw_case(
        "a single event",
        write("raw.csv", "user,item,time\n1,2,3\n"),
        "too few events for the split | - | 1 events | at least one event in each part | more data",
    ),
    raw_case(
        "last row cut off",
        append("raw.csv", "1,2"),
        r"wrong number of columns | PLACE/raw\.csv, row 302 | 2 columns: '1,2' | 3 col | correct",
    ),
    raw_case(
        "quote that never ends",
        append("raw.csv", '"1,2,5\n'),
        r"wrong number of columns | PLACE/raw\.csv, row 302 | 1 columns | 3 columns | quotes",
    ),
    raw_case(
        "a line of 5 MB",
        append("raw.csv", "x" * 5_000_000 + ",2,5\n"),
        r"cannot be read | PLACE/raw\.csv | (?s)^.{,1100} characters\)$ | csv | whole",
    ),
    raw_case(
        "column twice",
        replace("raw.csv", "user,item,time", "user,item,time,user"),
        r"same name | PLACE/raw\.csv, row 1 | 2 columns 'user' | one \(the user\) | rename",
    ),
    raw_case(
        "column twice in Parquet",
        lambda place: pq.write_table(
            pa.table([MANY, MANY, MANY, MANY], names=["user", "item", "timestamp", "item"]),
            place / "raw.parquet",
        ),
        r"same name | PLACE/raw\.parquet | 2 columns 'item' | one \(the item\) | rename",
        command=PARQUET,
    ),
    raw_case(
        "row not UTF-8",
        append("raw.csv", b"\xff\xfe,2,5\n"),
        r"not UTF-8 | PLACE/raw\.csv, row 302 | udcff | UTF-8 | convert the file",
    ),
    raw_case(
        "header not UTF-8",
        write("raw.csv", b"user,it\xffem,time\n1,2,3\n"),
        r"not UTF-8 | PLACE/raw\.csv, row 1 | it.udcffem | UTF-8 | convert the file",
    ),
    raw_case(
        "header that would move the cursor",
        write("raw.csv", "us\x1b[2Jer,item,time\n1,2,3\n"),
        r"column is missing | PLACE/raw\.csv, row 1 | us\\x1b\[2Jer | 'user' | .+",
    ),
    raw_case(
        "truncated gzip",
        lambda place: (place / "raw.csv.gz").write_bytes(
            gzip.compress((place / "raw.csv").read_bytes())[:-30]
        ),
        r"cannot be read | PLACE/raw\.csv\.gz | Unexpected end | csv | download it again",
        command=[word.replace("raw.csv", "raw.csv.gz") for word in PREPARE],
    ),
    raw_case(
        "truncated Parquet",
        truncate("raw.parquet"),
        r"cannot be read | PLACE/raw\.parquet | magic bytes | parquet | whole",
        command=PARQUET,
    ),
    raw_case(
        "ids of floats in Parquet",
        table(user=[float(i) for i in MANY], item=MANY, timestamp=MANY),
        r"no id | PLACE/raw\.parquet, column 'user' | DOUBLE | integers or strings | convert",
        command=PARQUET,
    ),
    raw_case(
        "null in Parquet",
        table(user=MANY, item=[*MANY[:-1], None], timestamp=MANY),
        r"item is missing | PLACE/raw\.parquet, row 30, column 'item' | None | a value | drop",
        command=PARQUET,
    ),
    raw_case(
        "absent",
        remove("raw.csv"),
        r"raw file is missing | PLACE/raw\.csv | no such file | a file, a folder | check the path",
    ),
    raw_case(
        "a folder",
        as_folder("raw.csv"),
        r"raw file is missing | PLACE/raw\.csv | a folder without it | \.csv or | check the path",
    ),
    raw_case(
        "unit not said",
        nothing,
        "text does not tell the unit | felrec prepare | - | --timestamp-unit s, ms, us or iso | -",
        error=ConfigError,
        command=[word for word in PREPARE if word not in ("--timestamp-unit", "s")],
    ),
    raw_case(
        "output is a prepared data set",
        nothing,
        "output folder is taken | PLACE/data | a prepared data set | no such folder | --overwrite",
        error=DatasetError,
        command=(*CSV, "--out", "PLACE/data"),
    ),
    raw_case(
        "output is another folder, with --overwrite",
        nothing,
        "folder is taken | PLACE/run | checkpoints, config | no such folder | is ever replaced",
        error=DatasetError,
        command=(*CSV, "--out", "PLACE/run", "--overwrite"),
    ),
    raw_case(
        "output is a file",
        nothing,
        r"output folder is taken | PLACE/raw\.csv | a file | no such folder | another folder",
        error=DatasetError,
        command=(*CSV, "--out", "PLACE/raw.csv"),
    ),
    raw_case(
        "output below a file",
        nothing,
        r"folder cannot be made | PLACE/raw\.csv/new | FileExistsError | - | address",
        error=StorageError,
        command=(*CSV, "--out", "PLACE/raw.csv/new"),
    ),
    raw_case(
        "a bad row while a data set is replaced",
        append("raw.csv", "1,2,-5\n"),
        f"timestamp is negative | {ROW_302} | '-5' | 1970 | correct",
        command=(*CSV, "--out", "PLACE/data", "--overwrite"),
    ),
    raw_case(
        "output at a URL of an unknown kind",
        nothing,
        "no file system | nosuch://new | Protocol not known | that fsspec knows | install",
        error=DatasetError,
        command=(*CSV, "--out", "nosuch://new"),
    ),
    raw_case(
        "output with a wildcard on remote storage",
        nothing,
        r"impossible name | out | new\* | without \* \? \[ | another name",
        error=ConfigError,
        command=(*CSV, "--out", "broken://new*"),
    ),
    raw_case(
        "folder for temporary files absent",
        nothing,
        "temporary files | PLACE/nowhere | No such file | can be written | --temp-dir",
        error=ConfigError,
        command=(*PREPARE, "--temp-dir", "PLACE/nowhere"),
    ),
    raw_case(
        "folder for temporary files that DuckDB cannot use",
        lambda place: (place / "what?").mkdir(),
        r"temporary files | PLACE/what\? | DuckDB | can be written | --temp-dir",
        error=ConfigError,
        command=(*PREPARE, "--temp-dir", "PLACE/what?"),
    ),
    raw_case(
        "less memory than a block",
        nothing,
        "out of memory | felrec-prepare- | Out of Memory | memory_limit 1KB | --memory-limit",
        error=ConfigError,
        command=(*PREPARE, "--memory-limit", "1KB"),
    ),
    raw_case(
        "fractions without training",
        nothing,
        r"leaves nothing to train on | - | 0\.5 | below 1 | -",
        error=ConfigError,
        command=(*PREPARE, "--test-fraction", "0.5", "--validation-fraction", "0.5"),
    ),
    *(
        raw_case(
            f"remote output {name}",
            spoil,
            f"{what} | broken://new | {got} | - | address",
            error=StorageError,
            command=(*CSV, "--out", "broken://new"),
            then=nothing_opens("broken://new"),
        )
        for name, spoil, what, got in (
            ("not reached", fault("look", error=unreachable), "looked into", "endpoint"),
            ("not reached, strange error", fault("look", error=strange), "looked into", "Endpoint"),
            ("read-only", fault("open", "make", error=read_only), "its place", "Read-only"),
            ("full at the first file", fault("write", error=full), "its place", "No space left"),
            ("full at the last", fault("write", path="json", error=full), "its place", "No space"),
            ("lost half way", fault("open", path="part", error=slow), "its place", "too long"),
        )
    ),
]


# Prepared data sets


def data_case(
    name: str,
    spoil: Spoil,
    told: str,
    *,
    error: type[FelrecError] = DatasetError,
    url: str = "PLACE/data",
    written: str = "nothing",
) -> Case:
    command = (*BEGIN, f"data.url={url}")
    return Case(f"data: {name}", spoil, command, error, facts(told), written)


def damaged_case(name: str, spoil: Spoil, told: str) -> Case:
    """``where | got | expected``"""
    return data_case(name, spoil, f"missing or damaged | PLACE/data/{told} | prepare it again")


def description_case(name: str, change: Callable[[dict[str, Any]], object], got: str) -> Case:
    """One that its own digest vouches for."""
    return data_case(
        f"description with {name}",
        edit("data/dataset.json", change, seal=True),
        rf"incomplete | PLACE/data/dataset\.json | {got} | schema version 1 | prepare",
    )


def empty_part_case(name: str, **split: list[int]) -> Case:
    return data_case(
        f"no event in {name}",
        edit("data/dataset.json", lambda manifest: manifest["split"].update(split), seal=True),
        f"the {name} part .* is empty | PLACE/data | - | - | larger --{name}-fraction",
    )


DATA_CASES = [
    damaged_case("part missing", remove(PART), "events/part-0 | no such file | bytes"),
    damaged_case("part truncated", truncate(PART), r"events/part-0 | \d+ bytes | \d+ bytes"),
    damaged_case("byte of a part", flip(PART, 0.01), "events/part-0 | SHA-256 | SHA-256"),
    damaged_case("byte of an index", flip(NEIGHBOURS), "neighbours/items | SHA-256 | SHA-256"),
    damaged_case(
        "byte of a catalogue", flip("data/catalogue/users.parquet"), "catalogue/users | SHA | SHA"
    ),
    damaged_case(
        "part of another data set", copy(f"other/{PART}", PART), "events/part | bytes | bytes"
    ),
    damaged_case(
        "index of another data set",
        copy(f"other/{NEIGHBOURS}", NEIGHBOURS),
        "neighbours/items_of_users | SHA-256 | SHA-256",
    ),
    damaged_case(
        "description of another data set",
        copy("other/data/dataset.json", "data/dataset.json"),
        "events/part | bytes | bytes",
    ),
    damaged_case(
        "pickle for an index",
        lambda place: write(NEIGHBOURS, (evil_npy() + bytes(9999))[:2528])(place),
        "neighbours/items | SHA-256 | SHA-256",
    ),
    data_case(
        "byte of the description",
        replace("data/dataset.json", '"num_train_items": ', '"num_train_items": 1'),
        r"was changed or damaged | PLACE/data/dataset\.json | SHA-256 | as it states | prepare",
    ),
    data_case(
        "another version",
        edit("data/dataset.json", lambda m: m.update(schema_version=7), seal=True),
        "another schema version | PLACE/data | 7 | 1 | prepare it again",
    ),
    data_case(
        "a description of something else",
        write("data/dataset.json", "{}"),
        r"not the description | PLACE/data | b'\{\}' | format | check the path",
    ),
    data_case(
        "a description deeper than the stack",
        write("data/dataset.json", "[" * 100_000),
        r"not the description | PLACE/data | b'\[{60}' | format | check the path",
    ),
    description_case("a file outside", lambda m: m["files"][0].update(path="../../x"), "the files"),
    description_case("a digest outside", lambda m: m.update(digest="../../x"), "the digest"),
    description_case("no parts", lambda m: m.update(parts=[]), "the parts"),
    description_case("a split of another size", lambda m: m.update(num_events=9), "the split"),
    description_case("a split of words", lambda m: m["split"].update(train=["a", "b"]), "TypeE"),
    description_case("no counts", lambda m: m.pop("num_users"), "KeyError"),
    empty_part_case("validation", train=[0, 270], validation=[270, 270]),
    empty_part_case("test", validation=[240, 300], test=[300, 300]),
    data_case(
        "absent",
        nothing,
        r"no prepared data set | PLACE/nowhere | no such folder | dataset\.json | felrec prepare",
        url="PLACE/nowhere",
    ),
    data_case(
        "half of a preparation",
        remove("data/dataset.json"),
        r"no prepared data set | PLACE/data | without dataset\.json | dataset\.json | prepare",
    ),
    data_case(
        "a file",
        nothing,
        r"cannot be reached | PLACE/raw\.csv | NotADirectory | - | check the URL",
        url="PLACE/raw.csv",
    ),
    data_case(
        "URL of an unknown kind",
        nothing,
        "no file system for a URL | nosuch://data | not known | fsspec | install",
        url="nosuch://data",
    ),
    data_case(
        "not reached",
        both(on_broken("data"), fault("read", "look", error=strange)),
        "cannot be reached | broken://data | EndpointConnectionError | - | credentials",
        url="broken://data",
    ),
    data_case(
        "forbidden",
        both(on_broken("data"), fault("read", error=forbidden)),
        "cannot be reached | broken://data | PermissionError | - | credentials",
        url="broken://data",
    ),
    data_case(
        "lost after its description was read",
        both(on_broken("data"), fault("look", error=unreachable)),
        "cannot be read | broken://data | ConnectionError | - | connection",
        error=StorageError,
        url="broken://data",
    ),
    data_case(
        "lost while it is verified",
        both(on_broken("data"), fault("read", path="users.parquet", error=strange)),
        "cannot be read | broken://data/catalogue/users | EndpointConnectionError | - | connection",
        error=StorageError,
        url="broken://data",
    ),
    data_case(
        "lost while its index is copied to this node",
        both(on_broken("data"), fault("read", path=r"\.npy", error=slow, skip=2)),
        "cannot be read | broken://data/neighbours | TimeoutError | - | connection",
        error=StorageError,
        url="broken://data",
        written=r"cache(/.*)?",
    ),
    data_case(
        "lost while the run trains",
        both(on_broken("data"), fault("read", path="part-0", error=unreachable, skip=1)),
        "cannot be read | broken://data/events/part-0 | ConnectionError | - | connection",
        error=StorageError,
        url="broken://data",
        written=rf"cache(/.*)?|{BEGUN}",
    ),
]


# Checkpoints and their caches


def checkpoint_case(
    name: str,
    spoil: Spoil,
    told: str,
    *,
    error: type[FelrecError] = CheckpointError,
    command: Sequence[str] = TRAIN,
    written: str = "nothing",
    then: Then = nothing,
) -> Case:
    return Case(f"checkpoint: {name}", spoil, command, error, facts(told), written, then)


def other_case(name: str, override: str, what: str, got: str) -> Case:
    """A run that would go on as another one."""
    remedy = "the config the run began with"
    command = (*TRAIN, override)
    return checkpoint_case(
        name, nothing, f"{what} | PLACE/{LAST} | {got} | - | {remedy}", command=command
    )


def dense_case(name: str, spoil: Spoil, told: str, file: str) -> Case:
    """``what | got | expected``"""
    what, rest = told.split(" | ", 1)
    told = rf"{what} | PLACE/{LAST}/{file}\.safetensors | {rest} | earlier"
    return checkpoint_case(name, spoil, told, then=goes_on_without(LAST))


def content_case(name: str, file: str, tensors: Mapping[str, torch.Tensor], got: str) -> Case:
    """Tensors that a manifest vouches for, and that are of something else."""
    return checkpoint_case(
        name,
        vouched(LAST, f"{file}.safetensors", safetensors.torch.save(dict(tensors))),
        f"does not hold what this model needs | PLACE/{LAST} | {got} | as felrec-dist | earlier",
        then=goes_on_without(LAST),
    )


def manifest_case(name: str, change: Callable[[dict[str, Any]], object], got: str) -> Case:
    """A manifest that its own digest vouches for."""
    return checkpoint_case(
        f"manifest with {name}",
        edit(f"{LAST}/manifest.json", change, seal=True),
        f"manifest .* is damaged | PLACE/{LAST}/manifest | {got} | - | go back to an earlier one",
    )


def part_case(name: str, spoil: Spoil, told: str) -> Case:
    """``what | got | expected | remedy``"""
    what, rest = told.split(" | ", 1)
    told = f"{what} | PLACE/{USERS} | {rest}"
    command = (*EVALUATE, f"PLACE/{LAST}")
    return checkpoint_case(name, spoil, told, error=SnapshotError, command=command)


USERS = f"{LAST}/cache/user-0000-2048.arrow"
DELTA = f"{CUTS}08/cache/user-0000-2048-since-64.arrow"

CHECKPOINT_CASES = [
    other_case("another seed", "training.seed=5", "another training", "seed 0 .* 5 in the config"),
    other_case("another batch", "data.batch_size=8", r"another data\.batch_size", "16 .* 8"),
    other_case("another model", "model.variant=felrec-p", "another model", "felrec-q.*felrec-p"),
    other_case("another storage", "cache.storage=float16", r"another cache\.storage", "float16"),
    checkpoint_case(
        "another data set",
        nothing,
        rf"another data set | PLACE/{LAST} | digest \w{{64}}$ | digest .*other/data | data\.url",
        command=(*TRAIN, "data.url=PLACE/other/data"),
    ),
    checkpoint_case(
        "a run that is begun again",
        nothing,
        rf"already holds checkpoints | PLACE/run | PLACE/{LAST} | - | set run\.url",
        command=(*TRAIN, "--no-resume"),
    ),
    checkpoint_case(
        "manifest edited",
        replace(f"{LAST}/manifest.json", '"epoch": 1', '"epoch": 0'),
        f"manifest .* is damaged | PLACE/{LAST}/manifest | not the one it states | - | remove this",
        then=goes_on_without(LAST),
    ),
    checkpoint_case(
        "half a manifest",
        truncate(f"{LAST}/manifest.json", 500),
        f"manifest .* is damaged | PLACE/{LAST}/manifest | .+ | - | remove this checkpoint",
        then=goes_on_without(LAST),
    ),
    checkpoint_case(
        "manifest deeper than the stack",
        write(f"{LAST}/manifest.json", "[" * 100_000),
        f"manifest .* is damaged | PLACE/{LAST}/manifest | recursion | - | remove this",
    ),
    manifest_case("a position of words", lambda m: m["position"].update(epoch="x"), "epoch='x'"),
    manifest_case("a negative position", lambda m: m["position"].update(steps=-1), "steps=-1"),
    manifest_case("no list of files", lambda m: m.pop("files"), "KeyError: 'files'"),
    manifest_case(
        "a part outside of its folder",
        lambda m: m["cache_parts"][0].update(path="../../../../secret/cache/x"),
        "cache part '../../",
    ),
    manifest_case(
        "a dense file outside of its folder",
        lambda m: m["files"][0].update(path="../../../secret"),
        r"'model\.safetensors'",
    ),
    checkpoint_case(
        "config of nothing",
        edit(f"{LAST}/manifest.json", lambda m: m.update(config=3), seal=True),
        f"does not hold what this model needs | PLACE/{LAST} | TypeError | felrec-dist | earlier",
    ),
    checkpoint_case(
        "another version",
        edit(f"{LAST}/manifest.json", lambda m: m.update(version=9), seal=True),
        f"another version | PLACE/{LAST} | 9 | 3 | the felrec-dist that wrote it",
    ),
    checkpoint_case(
        "no manifest",
        remove(f"{LAST}/manifest.json"),
        rf"no committed checkpoint | PLACE/{LAST} | no manifest\.json | - | cut off",
        command=(*EVALUATE, f"PLACE/{LAST}"),
    ),
    checkpoint_case(
        "best epoch removed",
        remove(FIRST),
        rf"best epoch cannot be read | PLACE/{FIRST} | no committed | rank 0\.\d+ | put it back",
    ),
    checkpoint_case(
        "from within an epoch",
        nothing,
        f"cannot be tested | PLACE/{CUTS}08 | 8 training steps | after an epoch's | epoch-0003",
        command=(*EVALUATE, f"PLACE/{CUTS}08"),
    ),
    checkpoint_case(
        "a run for a checkpoint",
        nothing,
        "no committed checkpoint | PLACE/run | no manifest | - | epoch-0003",
        command=(*EVALUATE, "PLACE/run"),
    ),
    checkpoint_case(
        "a file for a checkpoint",
        nothing,
        r"no committed checkpoint | PLACE/raw\.csv | no manifest | - | epoch-0003",
        command=(*EVALUATE, "PLACE/raw.csv"),
    ),
    checkpoint_case(
        "URL of an unknown kind",
        nothing,
        "cannot be read | nosuch://x | not known | - | address",
        command=(*EVALUATE, "nosuch://x"),
    ),
    checkpoint_case(
        "no folder given",
        nothing,
        "no checkpoint is given | felrec evaluate | - | --checkpoint FOLDER | -",
        error=ConfigError,
        command=EVALUATE[:-1],
    ),
    dense_case("model missing", remove(f"{LAST}/model.safetensors"), "missing | - | -", "model"),
    dense_case(
        "model truncated", truncate(f"{LAST}/model.safetensors"), "truncated | b | b", "model"
    ),
    dense_case(
        "byte of the optimizer",
        flip(f"{LAST}/optimizer.safetensors"),
        "damaged | SHA-256 | SHA-256",
        "optimizer",
    ),
    dense_case(
        "losses of the epoch before",
        copy(f"{FIRST}/losses.safetensors", f"{LAST}/losses.safetensors"),
        "damaged | SHA-256 | SHA-256",
        "losses",
    ),
    dense_case(
        "pickle for a model",
        vouched(LAST, "model.safetensors", evil_pickle()),
        "no safetensors file | deserializing | -",
        "model",
    ),
    dense_case(
        "pickle of torch for an optimizer",
        vouched(LAST, "optimizer.safetensors", evil_torch_file()),
        "no safetensors file | deserializing | -",
        "optimizer",
    ),
    content_case("model of other tensors", "model", {"x": torch.zeros(3)}, "Missing key"),
    content_case("optimizer of other tensors", "optimizer", {"x": torch.zeros(3)}, "ValueError"),
    content_case(
        "optimizer of another shape",
        "optimizer",
        {"user_type_embedding:momentum_buffer": torch.zeros(3)},
        r"user_type_embedding:momentum_buffer has shape \(3,\)",
    ),
    part_case("cache part missing", remove(USERS), "missing or damaged | NotFound | rows | old"),
    part_case("cache part truncated", truncate(USERS), "missing or damaged | Arrow | rows | old"),
    part_case("byte of a cache part", flip(USERS), "other rows | digest | digest | older"),
    part_case(
        "pickle for a cache part", write(USERS, evil_pickle()), "damaged | Arrow | rows | older"
    ),
    part_case(
        "cache part of the other table",
        copy(f"{LAST}/cache/item-0000-2048.arrow", USERS),
        "not the part that was asked for | table item | table user | list of parts",
    ),
    part_case(
        "cache part of an older epoch",
        copy(f"{FIRST}/cache/user-0000-2048.arrow", USERS),
        r"not the part that was asked for | (rows|digest) \d+ | (rows|digest) \d+ | list of",
    ),
    checkpoint_case(
        "delta of a chain missing",
        remove(DELTA),
        f"missing or damaged | PLACE/{DELTA} | FileNotFound | rows | older",
        error=SnapshotError,
        command=GO_ON_CUT,
        then=lambda place, felrec: assert_restores(str(place / f"{CUTS}04")),
    ),
    checkpoint_case(
        "full snapshot of a chain missing",
        remove(f"{CUTS}04/cache/user-0000-2048.arrow"),
        f"missing or damaged | PLACE/{CUTS}04/cache/user-0000-2048 | FileNotFound | rows | older",
        error=SnapshotError,
        command=GO_ON_CUT,
    ),
    checkpoint_case(
        "full snapshot in the place of a delta",
        copy(f"{CUTS}04/cache/user-0000-2048.arrow", DELTA),
        f"not the part that was asked for | PLACE/{DELTA} | .+ | .+ | list of parts",
        error=SnapshotError,
        command=GO_ON_CUT,
    ),
    checkpoint_case(
        "weights that are not finite",
        lambda place: vouched(
            LAST,
            "model.safetensors",
            safetensors.torch.save(
                {
                    name: tensor * float("nan") if tensor.is_floating_point() else tensor
                    for name, tensor in read_checkpoint(str(place / LAST)).model.items()
                }
            ),
        )(place),
        f"weights are not finite | PLACE/{LAST}, .+ | - | - | base_lr",
        error=NonFiniteLossError,
    ),
]


# Storage that fails while the run reads and writes it


def storage_case(
    name: str,
    spoil: Spoil,
    told: str,
    *,
    latest: str | None = None,
    expected: str = "-",
    error: type[FelrecError] = StorageError,
    written: str = r"broken://run/(?!evaluation).*",
) -> Case:
    """A run on ``broken://run`` that fails, and goes on once the storage works again;
    ``what | where | got``.
    """
    what, rest = told.split(" | ", 1)
    patterns = facts(
        f"{what} | broken://run/{rest} | {expected} | [Cc]heck the address, the rights"
    )
    return Case(f"storage: {name}", spoil, BEGIN_BROKEN, error, patterns, written, repaired(latest))


SPACE = "No space left on device"

STORAGE_CASES = [
    storage_case(
        "full at config.yaml",
        fault("write", path=r"config\.yaml", error=full),
        rf"config cannot be written | config\.yaml | {SPACE}",
    ),
    storage_case(
        "full at the TensorBoard log",
        fault("write", path="tensorboard", error=full),
        f"TensorBoard log cannot be written | tensorboard/events | {SPACE}",
    ),
    storage_case(
        "full at the end of the TensorBoard log",
        fault("write", path="tensorboard", error=full, skip=1),
        f"TensorBoard log cannot be written | tensorboard/events | {SPACE}",
        latest="epoch-0001",
    ),
    storage_case(
        "full at the first cache part",
        fault("write", path="user-0000", error=full),
        f"snapshot could not be written | checkpoints/epoch-0000/cache/user-0000-2048 | {SPACE}",
        expected="rows",
        error=SnapshotError,
    ),
    storage_case(
        "full at the last cache part of the second epoch",
        fault("write", path="epoch-0001/cache/item-2048", error=full),
        f"snapshot could not be written | checkpoints/epoch-0001/cache/item-2048-4096 | {SPACE}",
        latest="epoch-0000",
        expected="rows",
        error=SnapshotError,
    ),
    *(
        storage_case(
            f"full at the {file} of the second epoch",
            fault("write", path=f"epoch-0001/{file}", error=full),
            f"checkpoint cannot be written | checkpoints/epoch-0001/{file} | {SPACE}",
            latest="epoch-0000",
        )
        for file in ("model", "optimizer", "losses", "manifest")
    ),
    storage_case(
        "full at the first manifest",
        fault("write", path="manifest", error=full),
        f"checkpoint cannot be written | checkpoints/epoch-0000/manifest | {SPACE}",
    ),
    *(
        storage_case(
            f"full at the {name}",
            fault("write", path=path, error=full),
            f"of a test cannot be written | evaluation/test-causal | {SPACE}",
            latest="epoch-0001",
            written=r"broken://run/(?!.*json).*|.*/manifest\.json",
        )
        for name, path in (("ranks", r"test-causal\.parquet"), ("report", r"test-causal\.json"))
    ),
    storage_case(
        "read-only",
        fault("make", "open", error=read_only),
        "config cannot be written | config | Read-only",
    ),
    storage_case(
        "forbidden from the second checkpoint on",
        fault("make", path="epoch-0001", error=forbidden),
        "checkpoint cannot be begun | checkpoints/epoch-0001 | PermissionError",
        latest="epoch-0000",
    ),
    storage_case(
        "not reached at the start",
        fault("look", error=unreachable),
        "checkpoints of a run cannot be listed | checkpoints | ConnectionError",
    ),
    storage_case(
        "lost for good at the second manifest",
        fault("open", path="epoch-0001/manifest", error=strange, is_last=True),
        "checkpoint cannot be written | checkpoints/epoch-0001/manifest | EndpointConnectionError",
        latest="epoch-0000",
    ),
    storage_case(
        "slow, then lost, at the second model",
        fault("open", path="epoch-0001/model", error=slow),
        "checkpoint cannot be written | checkpoints/epoch-0001/model | TimeoutError",
        latest="epoch-0000",
    ),
    *(
        storage_case(
            f"half of the second {file}",
            fault("write", path=f"epoch-0001/{file}", error=None),
            rf"checkpoint cannot be written | checkpoints/epoch-0001/{file} | \d+ of \d+ bytes",
            latest="epoch-0000",
        )
        for file in ("model", "manifest")
    ),
    storage_case(
        "the report is lost before it is shown",
        fault("read", path="test-causal", error=unreachable),
        r"report of a test cannot be read | evaluation/test-causal\.json | ConnectionError",
        latest="epoch-0001",
        written="broken://run/.*",
    ),
    Case(
        "storage: old checkpoints that cannot be removed",
        fault("remove", path="epoch-000", error=forbidden),
        (*BEGIN_BROKEN, "checkpoint.keep=1", "training.schedule.epochs=3"),
        StorageError,
        facts("cannot be removed | broken://run | PermissionError | - | rights"),
        written=r"broken://run/(?!evaluation).*",
        then=lambda place, felrec: newest_restores("broken://run"),
    ),
    *(
        Case(
            f"storage: {name} when a run goes on",
            both(on_broken("run"), fault(*operations, path=path, error=unreachable)),
            BEGIN_BROKEN,
            error,
            facts(f"{what} | broken://run | ConnectionError | - | connection"),
        )
        for name, operations, path, error, what in (
            ("its checkpoints not reached", ["look"], "checkpoints", StorageError, "be listed"),
            ("one manifest not reached", ["look"], "0001/manifest", StorageError, "be listed"),
            ("its manifest not read", ["read"], "manifest", CheckpointError, "cannot be read"),
            ("its optimizer not read", ["read"], "optimizer", CheckpointError, "cannot be read"),
        )
    ),
    Case(
        "storage: a cache part not read",
        both(on_broken("run"), fault("read", path="item-2048", error=strange)),
        (*EVALUATE, f"broken://{LAST}"),
        SnapshotError,
        facts(f"missing or damaged | broken://{LAST}/cache/item-2048 | Endpoint | rows | old"),
    ),
    Case(
        "storage: the cache of a run not reached",
        both(on_broken("run"), fault("look", error=strange)),
        ("cache", "verify", "broken://run"),
        StorageError,
        facts("cannot be listed | broken://run | EndpointConnectionError | - | connection"),
    ),
    *(
        Case(f"storage: {name}", spoil, TRAIN, StorageError, facts(f"{told} | - | rights"), written)
        for name, spoil, told, written in (
            (
                "a file for the run's folder",
                as_file("run"),
                r"config cannot be written | PLACE/run/config\.yaml | FileExistsError",
                "nothing",
            ),
            (
                "a folder for config.yaml",
                as_folder("run/config.yaml"),
                r"config cannot be written | PLACE/run/config\.yaml | IsADirectory",
                "nothing",
            ),
            (
                "a file for the TensorBoard folder",
                as_file("run/tensorboard"),
                "TensorBoard log cannot be written | PLACE/run/tensorboard | FileExists",
                "nothing",
            ),
            (
                "a file for the reports' folder",
                as_file("run/evaluation"),
                r"ranks of a test cannot be written | PLACE/run/evaluation/test-c | FileExists",
                BEGUN,
            ),
        )
    ),
    Case(
        "storage: events that cannot be synthesized there",
        nothing,
        ("synthesize", "PLACE/raw.csv/new.parquet", "--num-events", "500"),
        StorageError,
        facts(r"cannot be written | PLACE/raw\.csv/new | Error | the name of a file | name"),
    ),
    Case(
        "storage: events that would be a folder",
        nothing,
        ("synthesize", "PLACE/data", "--num-events", "500"),
        StorageError,
        facts("cannot be written | PLACE/data | Error | the name of a file | name"),
    ),
]


# Numbers

NUMBER_CASES = [
    Case(
        "numbers: a learning rate that no model bears",
        nothing,
        (*BEGIN, "training.schedule.base_lr=1e30"),
        NonFiniteLossError,
        facts(r"loss is not finite | epoch 0, step \d+, events at \w+ \d+ | nan|inf | - | base_lr"),
        written=BEGUN,
    )
]

CASES = [*CONFIG_CASES, *RAW_CASES, *DATA_CASES, *CHECKPOINT_CASES, *STORAGE_CASES, *NUMBER_CASES]
