"""Raw files: the published layouts, what is inferred, and each way a file can be bad."""

from __future__ import annotations

import gzip
import os
import zipfile
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from felrec_dist.data.dataset import PreparedDataset, Span
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import LAYOUTS, RawSource
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.errors import ConfigError, RawDataError

THIRDS: dict[str, Any] = {"name": "small", "validation_fraction": 0.34, "test_fraction": 0.34}


def prepared(source: RawSource, out: Path) -> tuple[PreparedDataset, EventBatch]:
    dataset = prepare(source, out, **THIRDS)
    span = Span(0, dataset.num_events)
    [(batch, _)] = EventStream(dataset, span, dataset.num_events).batches()
    return dataset, batch


def csv_source(path: Path, **settings: Any) -> RawSource:
    columns = {"user": "u", "item": "i", "timestamp": "t", "timestamp_unit": "s"}
    return RawSource.csv(path, **{**columns, **settings})


def parquet_source(path: Path, **settings: Any) -> RawSource:
    columns = {"user": "u", "item": "i", "timestamp": "t", "timestamp_unit": "s"}
    return RawSource.parquet(path, **{**columns, **settings})


# Published layouts; the rows are made up

DAT = "3::40::5::300\n1::20::1::100\n2::20::3.5::200\n"
RATINGS_CSV = "userId,movieId,rating,timestamp\n3,40,5.0,300\n1,20,0.5,100\n2,20,3.5,200\n"
JODIE = (
    "user_id,item_id,timestamp,state_label,comma_separated_list_of_features\n"
    "1,20,100.0,0,-0.1,0.2,3.0,4.5\n2,20,200.0,0,0,0,0,0\n3,40,300.0,1,1,1,1,1\n"
)
PUBLISHED = {
    "ml-100k": ("ml-100k/u.data", "3\t40\t5\t300\n1\t20\t1\t100\n2\t20\t3\t200\n"),
    "ml-1m": ("ml-1m/ratings.dat", DAT),
    "ml-10m": ("ml-10M100K/ratings.dat", DAT),
    "ml-20m": ("ml-20m/ratings.csv", RATINGS_CSV),
    "ml-25m": ("ml-25m/ratings.csv", RATINGS_CSV),
    "ml-32m": ("ml-32m/ratings.csv", RATINGS_CSV),
    "reddit": ("reddit.csv", JODIE),
    "wikipedia": ("wikipedia.csv", JODIE),
    "mooc": ("mooc.csv", JODIE),
    "lastfm": ("lastfm.csv", JODIE),
}


@pytest.mark.parametrize("packing", ["file", "folder", "zip", "detected"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts(tmp_path: Path, name: str, packing: str) -> None:
    member, text = PUBLISHED[name]
    file = tmp_path / "raw" / member
    file.parent.mkdir(parents=True)
    file.write_text(text)
    path = file if packing == "file" else tmp_path / "raw"
    if packing == "zip":
        path = tmp_path / f"{name}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(file, member)
            archive.writestr("README", "made up")
    if packing == "detected":
        source = RawSource.detect(file)
    else:
        source = RawSource.from_name(name, path)
    dataset, batch = prepared(source, tmp_path / "out")
    assert batch.user.tolist() == [1, 2, 3]
    assert batch.item.tolist() == [20, 20, 40]
    assert batch.timestamp.tolist() == [100_000_000, 200_000_000, 300_000_000]
    if name.startswith("ml-"):
        assert batch.event_id.tolist() == [1, 2, 0]
    assert dataset.source["layout"] == name


@pytest.mark.parametrize(
    ("name", "file"), [("twitch-100k", "100k_a.csv"), ("twitch", "full_a.csv")]
)
def test_twitch(tmp_path: Path, name: str, file: str) -> None:
    (tmp_path / file).write_text(
        "7,34347669376,alpha,5415,5419\n8,34391109664,beta,0,3\n7,3436925,alpha,5414,5415\n"
    )
    dataset, batch = prepared(RawSource.detect(tmp_path / file), tmp_path / "out")
    assert dataset.source["layout"] == name
    assert batch.user.tolist() == [8, 7, 7]
    assert batch.item.tolist() == [0, 1, 1]
    assert dataset.items.names is not None
    assert dataset.items.names.to_pylist() == ["beta", "alpha"]
    assert batch.timestamp.tolist() == [0, 5414 * 600_000_000, 5415 * 600_000_000]


def test_every_layout_is_tested() -> None:
    assert set(LAYOUTS) == {*PUBLISHED, "twitch", "twitch-100k"}


def test_ml_100k_as_published(tmp_path: Path) -> None:
    default = Path(__file__).parents[2] / "../shared/data"
    folder = Path(os.environ.get("FELREC_DATA", default)) / "ml-100k"
    if not (folder / "u.data").exists():
        pytest.skip("needs MovieLens-100K: set FELREC_DATA to the folder that holds ml-100k/")
    dataset = prepare(RawSource.from_name("ml-100k", folder), tmp_path / "out", name="ml-100k")
    assert (dataset.num_events, dataset.num_users, dataset.num_items) == (100_000, 943, 1_682)
    assert dataset.split.test == Span(90_000, 100_000)
    rows = [line.split("\t") for line in (folder / "u.data").read_text().splitlines()]
    order = sorted(range(len(rows)), key=lambda row: (int(rows[row][3]), row))
    [(batch, _)] = EventStream(dataset, Span(0, 100_000), 100_000).batches()
    assert batch.event_id.tolist() == order
    assert batch.user.tolist() == [int(rows[row][0]) for row in order]
    assert batch.item.tolist() == [int(rows[row][1]) for row in order]


def test_a_layout_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ml-100k'"):
        RawSource.from_name("ml-100", "somewhere")


def test_a_layout_that_cannot_be_detected(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RawDataError, match=r"layout cannot be told(.|\n)*thesis.tex"):
        RawSource.detect(tmp_path)


def test_a_zip_without_the_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        archive.writestr("movies.dat", "x")
    with pytest.raises(RawDataError, match=r"got: movies.dat\n  expected: ratings.dat"):
        prepared(RawSource.from_name("ml-1m", tmp_path / "ml.zip"), tmp_path / "out")


def test_a_truncated_zip(tmp_path: Path) -> None:
    path = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ratings.dat", DAT)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(RawDataError, match=r"cannot be read(.|\n)*ml-1m.zip"):
        prepared(RawSource.from_name("ml-1m", path), tmp_path / "out")


# Several files, packed files, odd text


def test_files_are_numbered_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("u,i,t\n3,1,5\n4,1,5\n")
    (tmp_path / "a.csv").write_text("t,u,i\n5,1,1\n5,2,1\n")  # columns are found by name
    (tmp_path / "c.csv").write_text("u,i,t\n")
    for source in (
        csv_source(tmp_path / "*.csv"),
        csv_source(tmp_path),
        RawSource.csv(
            *(tmp_path / f"{name}.csv" for name in "abc"),
            user="u",
            item="i",
            timestamp="t",
            timestamp_unit="s",
        ),
    ):
        dataset = prepare(source, tmp_path / "out", overwrite=True, **THIRDS)
        [(batch, _)] = EventStream(dataset, Span(0, 4), 4).batches()
        assert batch.event_id.tolist() == [0, 1, 2, 3]
        assert batch.user.tolist() == [1, 2, 3, 4]
        assert [file["name"] for file in dataset.source["files"]] == ["a.csv", "b.csv", "c.csv"]


def test_gzip_and_glob_characters_in_a_name(tmp_path: Path) -> None:
    path = tmp_path / "it's [1] *.csv.gz"
    (tmp_path / "it's 1 x.csv.gz").write_bytes(gzip.compress(b"u,i,t\n7,7,7\n"))
    path.write_bytes(gzip.compress(b"u,i,t\n1,1,1\n2,2,2\n3,3,3\n"))
    _, batch = prepared(csv_source(path), tmp_path / "out")
    assert batch.user.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffu,i,t\n1,1,1\n2,2,2\n3,3,3\n",
        "u,i,t\r\n1,1,1\r\n2,2,2\r\n3,3,3",
        "u,i,t\n\n1,1,1\n\n2,2,2\n3,3,3\n\n\n",
        'u,"i", t\n"1",1,1\n2,2,2\n3,"3",3\n',
        "u,i,t\n1, 1 ,1\n+2,2, 2\n3,3,3\n",
    ],
    ids=["byte order mark", "CRLF", "blank lines", "quotes", "spaces"],
)
def test_text_that_others_write(tmp_path: Path, text: str) -> None:
    path = tmp_path / "raw.csv"
    path.write_bytes(text.encode())
    source = csv_source(path, user_ids="int", item_ids="int")
    _, batch = prepared(source, tmp_path / "out")
    assert batch.user.tolist() == batch.item.tolist() == [1, 2, 3]
    assert batch.timestamp.tolist() == [1_000_000, 2_000_000, 3_000_000]


@pytest.mark.parametrize(("delimiter", "has_header"), [("|", True), ("::", False), (" ", False)])
def test_other_delimiters(tmp_path: Path, delimiter: str, has_header: bool) -> None:
    lines = [["u", "i", "t"]] * has_header + [["1", "x", "5"], ["2", "y", "6"], ["3", "x", "7"]]
    path = tmp_path / "raw.txt"
    path.write_text("".join(delimiter.join(line) + "\n" for line in lines))
    columns: dict[str, Any] = {} if has_header else {"user": 0, "item": 1, "timestamp": 2}
    source = csv_source(path, delimiter=delimiter, has_header=has_header, **columns)
    dataset, batch = prepared(source, tmp_path / "out")
    assert batch.user.tolist() == [1, 2, 3]
    assert dataset.items.names is not None
    assert dataset.items.names.to_pylist() == ["x", "y"]


# Ids


@pytest.mark.parametrize(
    ("ids", "kind", "expected"),
    [
        (["5", "-3", "9223372036854775807"], None, [5, -3, 2**63 - 1]),
        (["5", " 3", "-9223372036854775808"], None, [5, 3, -(2**63)]),
        (["5", "7", "007"], None, ["5", "7", "007"]),
        (["5", "7", "7.0"], None, ["5", "7", "7.0"]),
        (["5", "7", "1e3"], None, ["5", "7", "1e3"]),
        (["5", "7", "x"], None, ["5", "7", "x"]),
        (["5", "7", "1_0"], None, ["5", "7", "1_0"]),
        (["5", "7", "8"], "string", ["5", "7", "8"]),
        (["5", "+7", "008"], "int", [5, 7, 8]),
    ],
)
def test_integers_are_keys_only_if_all_are_integers(
    tmp_path: Path, ids: list[str], kind: Any, expected: list[Any]
) -> None:
    path = tmp_path / "raw.csv"
    path.write_text("u,i,t\n" + "".join(f"{u},1,{t}\n" for t, u in enumerate(ids)))
    dataset, _ = prepared(csv_source(path, user_ids=kind), tmp_path / "out")
    names = dataset.users.names
    found = dataset.users.ids.tolist() if names is None else names.to_pylist()
    assert found == expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([-1, 0, 127], pa.int8()), [-1, 0, 127]),
        (pa.array([1, 2, 2**63 - 1], pa.uint64()), [1, 2, 2**63 - 1]),
        (pa.array(["1", "2", "3"]), ["1", "2", "3"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b"]),
        (pa.array(["a", "b", "c"], pa.large_string()), ["a", "b", "c"]),
    ],
    ids=["int8", "uint64", "digits", "dictionary", "large_string"],
)
def test_parquet_ids_are_of_their_type(tmp_path: Path, column: pa.Array, expected: Any) -> None:
    path = tmp_path / "raw.parquet"
    pq.write_table(pa.table({"u": column, "i": [1, 1, 1], "t": [0, 1, 2]}), path)
    dataset, _ = prepared(parquet_source(path), tmp_path / "out")
    names = dataset.users.names
    assert (dataset.users.ids.tolist() if names is None else names.to_pylist()) == expected


# Timestamps

BERLIN = timezone(timedelta(hours=2))
NOON = datetime(2020, 6, 1, 12, 0, 0, 250_000, tzinfo=UTC)
NOON_US = 1_591_012_800_250_000


@pytest.mark.parametrize(
    ("unit", "text", "expected"),
    [
        ("s", "0", 0),
        ("s", "253402300799", 253_402_300_799_000_000),
        ("s", "1591012800.25", NOON_US),
        ("s", "1388534400.1234565", 1_388_534_400_123_457),
        ("s", "1.5e9", 1_500_000_000_000_000),
        ("s", " 12", 12_000_000),
        ("ms", "1591012800250", NOON_US),
        ("ms", "0.0004", 0),
        ("ms", "0.0005", 1),
        ("us", "1591012800250001", NOON_US + 1),
        ("iso", "2020-06-01T12:00:00.25Z", NOON_US),
        ("iso", "2020-06-01 12:00:00.250", NOON_US),
        ("iso", "2020-06-01T14:00:00.25+02:00", NOON_US),
        ("iso", "2020-06-01T10:30:00.25-0130", NOON_US),
        ("iso", "2020-06-01", NOON_US - 43_200_250_000),
        ("iso", "1970-01-01T00:00:00.000001", 1),
    ],
)
def test_times_in_text(tmp_path: Path, unit: str, text: str, expected: int) -> None:
    path = tmp_path / "raw.csv"
    path.write_text("u,i,t\n" + f"1,1,{text}\n" * 3)
    _, batch = prepared(csv_source(path, timestamp_unit=unit), tmp_path / "out")
    assert batch.timestamp.tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("column", "unit", "expected"),
    [
        (pa.array([NOON], pa.timestamp("us")), None, NOON_US),
        (pa.array([NOON], pa.timestamp("ms")), None, NOON_US),
        (pa.array([NOON], pa.timestamp("ns")), "ms", NOON_US),
        (pa.array([NOON], pa.timestamp("us", "UTC")), None, NOON_US),
        (pa.array([NOON.astimezone(BERLIN)], pa.timestamp("us", "+02:00")), None, NOON_US),
        (pa.array([date(2020, 6, 1)]), None, NOON_US - 43_200_250_000),
        (pa.array([1_591_012_800], pa.int32()), "s", NOON_US - 250_000),
        (pa.array([1_591_012_800.25]), "s", NOON_US),
        (pa.array([Decimal("1591012800.25")]), "s", NOON_US),
        (pa.array([2.5], pa.float32()), "ms", 2_500),
        (pa.array(["2020-06-01T14:00:00.25+02:00"]), "iso", NOON_US),
        (pa.array(["1591012800.25"]), "s", NOON_US),
    ],
    ids=str,
)
def test_times_in_parquet(tmp_path: Path, column: pa.Array, unit: Any, expected: int) -> None:
    path = tmp_path / "raw.parquet"
    three = pa.concat_arrays([column] * 3)
    pq.write_table(pa.table({"u": [1, 1, 1], "i": [1, 1, 1], "t": three}), path)
    _, batch = prepared(parquet_source(path, timestamp_unit=unit), tmp_path / "out")
    assert batch.timestamp.tolist() == [expected] * 3


# Bad input: each case names the file, the row and the way out, and leaves nothing behind


def assert_refused(source: RawSource, folder: Path, message: str) -> None:
    before = {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")}
    with pytest.raises(RawDataError, match=message):
        prepare(source, folder / "out", **THIRDS)
    assert {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")} == before


GOOD = "u,i,t\n1,1,1\n2,2,2\n3,3,3\n"


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (GOOD, {"user": "U"}, r"column is missing(.|\n)*'U' \(the user\)\n.*did you mean 'u'"),
        ("usr,i,t\n1,1,1\n", {"user": "user"}, "did you mean 'usr'"),
        (GOOD, {"item": "movie"}, r"got: u, i, t\n  expected: 'movie' \(the item\)"),
        ("", {}, r"raw file is empty(.|\n)*got: 0 bytes"),
        ("\n\n", {}, "raw file is empty"),
        ("u,i,t\n", {}, r"hold no rows(.|\n)*raw.csv\n  got: 0 rows"),
        ("u,i,t\n1,1,1\n2,2,2\n", {}, "too few events"),
        (GOOD + ",4,4\n", {}, r"user is missing.\n  where: .*raw.csv, row 5, column 'u'"),
        (GOOD + '4,"",4\n', {}, "item is missing.\n  where: .*raw.csv, row 5, column 'i'"),
        (GOOD + "\n\n4,4,\n", {}, "timestamp is missing.\n  where: .*raw.csv, row 7, column 't'"),
        ('u,i,t\n"a\nb",1,1\nc,1,\n', {}, "timestamp is missing.\n  where: .*raw.csv, row 4,"),
        (GOOD + "4,4,-1\n", {}, "timestamp is negative.\n  where: .*row 5(.|\n)*got: '-1'"),
        (GOOD + "4,4,-0.5\n", {}, "timestamp is negative.\n  where: .*row 5(.|\n)*got: '-0.5'"),
        (GOOD + "4,4,soon\n", {}, r"timestamp cannot be read(.|\n)*row 5(.|\n)*got: 'soon'"),
        (GOOD + "4,4,nan\n", {}, r"timestamp cannot be read(.|\n)*got: 'nan'"),
        (GOOD + "4,4,0x10\n", {}, r"timestamp cannot be read(.|\n)*got: '0x10'"),
        (GOOD + "4,4,2020-01-01\n", {}, r"timestamp cannot be read(.|\n)*unit s"),
        (GOOD, {"timestamp_unit": "iso"}, r"cannot be read(.|\n)*row 2(.|\n)*got: '1'(.|\n)*iso"),
        (
            GOOD.replace(",1\n", ",2020-13-01\n"),
            {"timestamp_unit": "iso"},
            r"timestamp cannot be read(.|\n)*row 2(.|\n)*2020-13-01",
        ),
        (
            GOOD + "4,4,1591012800250\n",
            {},
            r"out of range(.|\n)*row 5(.|\n)*year 10000 in unit s\n  remedy: give the unit",
        ),
        (GOOD + "4,4,9223372036854775807\n", {}, r"out of range(.|\n)*got: '9223372036854775807'"),
        (GOOD + "4,4,1e40\n", {}, r"out of range(.|\n)*got: '1e40'"),
        (GOOD + "4,4," + "9" * 60 + "\n", {"timestamp_unit": "us"}, "out of range"),
        (
            GOOD + "9223372036854775808,4,4\n",
            {},
            r"user is beyond a 64-bit integer(.|\n)*row 5(.|\n)*--user-ids string",
        ),
        (GOOD + "4,-9223372036854775809,4\n", {}, "item is beyond a 64-bit integer"),
        (
            GOOD + "4,x,4\n",
            {"item_ids": "int"},
            r"item is not an integer(.|\n)*row 5(.|\n)*got: 'x'(.|\n)*--item-ids string",
        ),
        (GOOD + "4,1.5,4\n", {"item_ids": "int"}, r"item is not an integer(.|\n)*got: '1.5'"),
        (GOOD + "4,0x1F,4\n", {"item_ids": "int"}, r"item is not an integer(.|\n)*got: '0x1F'"),
        (GOOD + "4,4\n", {}, r"wrong number of columns(.|\n)*row 5(.|\n)*2 columns: '4,4'"),
        (GOOD + "4,4,4,4\n", {}, r"wrong number of columns(.|\n)*row 5(.|\n)*expected: 3 columns"),
        (GOOD + "\n4\n", {"user_ids": "string"}, r"wrong number of columns(.|\n)*row 6"),
        (GOOD, {"delimiter": ";"}, r"column is missing(.|\n)*got: u,i,t"),
        (
            GOOD,
            {"has_header": False, "user": 0, "item": 1, "timestamp": 3},
            r"column is missing(.|\n)*got: 3 columns\n  expected: the timestamp in column 3",
        ),
        (
            GOOD,
            {"has_header": False, "user": 0, "item": 1, "timestamp": 2},
            r"timestamp cannot be read(.|\n)*row 1, column 2\n  got: 't'",
        ),
    ],
)
def test_bad_text(tmp_path: Path, text: str, settings: dict[str, Any], message: str) -> None:
    path = tmp_path / "raw.csv"
    path.write_text(text)
    assert_refused(csv_source(path, **settings), tmp_path, message)


def test_a_bad_row_in_the_second_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(GOOD)
    (tmp_path / "b.csv").write_text(GOOD + "4,4,\n")
    assert_refused(csv_source(tmp_path / "*.csv"), tmp_path, r"b.csv, row 5, column 't'")


def test_bytes_that_are_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "raw.csv"
    path.write_bytes(GOOD.encode() + b"4,caf\xe9,4\n")
    assert_refused(csv_source(path), tmp_path, r"not UTF-8(.|\n)*row 5(.|\n)*caf")


def test_a_truncated_gzip(tmp_path: Path) -> None:
    path = tmp_path / "raw.csv.gz"
    path.write_bytes(gzip.compress(os.urandom(500).hex().encode())[:-100])
    assert_refused(csv_source(path), tmp_path, r"cannot be read(.|\n)*raw.csv.gz")


def test_a_bad_row_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", DAT + "4::x::1::1\n")
    source = RawSource.from_name("ml-1m", tmp_path / "ml-1m.zip")
    assert_refused(source, tmp_path, "ml-1m.zip/ml-1m/ratings.dat, row 4, column 1\n  got: 'x'")


@pytest.mark.parametrize("missing", ["no.csv", "no-*.csv", "no/"])
def test_a_missing_file(tmp_path: Path, missing: str) -> None:
    path = tmp_path / missing
    assert_refused(csv_source(path), tmp_path, r"raw file is missing(.|\n)*got: no such file")


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    (tmp_path / "ml-1m").mkdir()
    source = RawSource.from_name("ml-1m", tmp_path / "ml-1m")
    assert_refused(source, tmp_path, r"a folder without it\n  expected: ratings.dat")


def parquet_file(**columns: Any) -> Callable[[Path], None]:
    table = pa.table({"u": [1, 2, 3], "i": [1, 2, 3], "t": [1, 2, 3], **columns})
    return lambda path: pq.write_table(table, path)


@pytest.mark.parametrize(
    ("write", "settings", "message"),
    [
        (parquet_file(), {"user": "usr"}, r"column is missing(.|\n)*'usr' \(the user\)"),
        (parquet_file(u=[1, 2, None]), {}, "user is missing.\n  where: .*raw.parquet, row 3,"),
        (parquet_file(t=[1, None, 3]), {}, "timestamp is missing.\n  where: .*row 2, column 't'"),
        (parquet_file(i=["a", "", "b"]), {}, "item is missing.\n  where: .*row 2, column 'i'"),
        (parquet_file(t=[1, 2, -3]), {}, r"timestamp is negative(.|\n)*row 3(.|\n)*got: '-3'"),
        (parquet_file(t=[1.0, 2.0, float("nan")]), {}, r"timestamp cannot be read(.|\n)*row 3"),
        (parquet_file(t=[1, 2, 2**62]), {}, r"timestamp is out of range(.|\n)*row 3"),
        (
            parquet_file(u=pa.array([1, 2, 2**64 - 1], pa.uint64())),
            {},
            r"user is beyond a 64-bit integer(.|\n)*got: '18446744073709551615'",
        ),
        (parquet_file(u=[1.0, 2.0, 3.0]), {}, r"type that is no id(.|\n)*got: DOUBLE"),
        (parquet_file(i=[[1], [2], [3]]), {}, r"type that is no id(.|\n)*got: BIGINT\[\]"),
        (parquet_file(t=[True, False, True]), {}, r"type that is no time(.|\n)*got: BOOLEAN"),
        (
            parquet_file(),
            {"timestamp_unit": None},
            r"unit of the timestamps(.|\n)*--timestamp-unit",
        ),
        (parquet_file(), {"timestamp_unit": "iso"}, r"unit of the timestamps(.|\n)*unit iso"),
        (parquet_file(t=["a", "b", "c"]), {"timestamp_unit": "iso"}, r"cannot be read(.|\n)*row 1"),
        (parquet_file(u=["1", "x", "2"]), {"user_ids": "int"}, r"not an integer(.|\n)*got: 'x'"),
        (lambda path: path.write_bytes(b"u,i,t\n1,1,1\n"), {}, r"cannot be read(.|\n)*raw.parquet"),
        (lambda path: path.write_bytes(b""), {}, r"cannot be read(.|\n)*raw.parquet"),
    ],
)
def test_bad_parquet(
    tmp_path: Path, write: Callable[[Path], object], settings: dict[str, Any], message: str
) -> None:
    path = tmp_path / "raw.parquet"
    write(path)
    assert_refused(parquet_source(path, **settings), tmp_path, message)


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_parquet(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "raw.parquet"
    parquet_file()(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert_refused(parquet_source(path), tmp_path, r"cannot be read(.|\n)*raw.parquet")


def test_parquet_damaged_inside(tmp_path: Path) -> None:
    path = tmp_path / "raw.parquet"
    parquet_file()(path)
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)
    path.write_bytes(content)
    assert_refused(parquet_source(path), tmp_path, r"cannot be read(.|\n)*raw.parquet")


# Sources that contradict themselves


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"user": 0}, r"given in the wrong way(.|\n)*expected: a column name"),
        ({"has_header": False}, r"given in the wrong way(.|\n)*expected: a column number"),
        ({"item": "u"}, "must be three columns"),
        ({"timestamp_unit": "ns"}, r"where: timestamp_unit\n  got: 'ns'"),
        ({"timestamp_unit": None}, r"unit of the timestamps is missing(.|\n)*--timestamp-unit"),
        ({"user_ids": "uuid"}, r"where: user_ids\n  got: 'uuid'"),
        ({"delimiter": ""}, "delimiter is impossible"),
    ],
)
def test_impossible_sources(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        csv_source(Path("raw.csv"), **settings)


def test_no_file_at_all() -> None:
    source = RawSource.csv(user="u", item="i", timestamp="t", timestamp_unit="s")
    with pytest.raises(RawDataError, match="No raw file is given"):
        source.resolve()
