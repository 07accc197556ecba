"""``felrec cache``: what caches hold, whether their files are whole, whether two are equal.

A source names a cache: a checkpoint's folder, a run's folder, which means its newest checkpoint, or
``running:`` and the folder of a run that trains on Ray right now.

Every command makes lists of rows first. ``--json`` prints them as they are, otherwise each becomes
a table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cache_server import (
    NUM_BUCKETS,
    BucketDigests,
    CacheClient,
    ShardDigests,
    SnapshotPart,
    TableSpec,
)
from cache_server.contents import cut_of, shard_contents, snapshot_contents
from felrec_dist.errors import ConfigError

RUNNING = "running:"
DIFFERENT = 1
PAGE_WIDTH = 120

cache_app = typer.Typer(
    help="Look into caches, saved or running: digests, comparison, sizes.", no_args_is_help=True
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="a checkpoint's folder, a run's folder (its newest checkpoint), or running:FOLDER for "
        "the cache of the run that trains there right now",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there")]
Row: TypeAlias = dict[str, str | int | float | None]


@cache_app.command()
def digest(
    source: Source,
    buckets: Annotated[
        bool, typer.Option("--buckets", help="with --json: also of each bucket that has rows")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print each table's number of rows and 64-bit digest.

    Neither the number of shards nor the order of writes changes a digest.
    """
    if buckets and not as_json:
        raise typer.BadParameter("needs --json", param_hint="--buckets")
    with open_cache(source) as cache:
        contents = cache.read()
    if not as_json:
        print_contents(open_page(), contents)
    elif buckets:
        print_json(contents.facts() | {"buckets": contents.bucket_rows()})
    else:
        print_json(contents.facts())


@cache_app.command()
def verify(
    source: Source,
    other: Annotated[
        str | None,
        typer.Argument(metavar="OTHER", help="another cache, saved or running, to compare with"),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, help="how many differing buckets of each table to list")
    ] = 20,
    as_json: AsJson = False,
) -> None:
    """Verify the files of a saved cache, or compare two caches: exit code 1 if they differ."""
    if other is None:
        verify_files(source, as_json=as_json)
    else:
        compare(source, other, limit=limit, as_json=as_json)


@cache_app.command()
def stats(source: Source, as_json: AsJson = False) -> None:
    """Print sizes: of a running cache its shards, of a saved one its files, which are not read."""
    with open_cache(source) as cache:
        facts = cache.sizes()
    if as_json:
        print_json(facts)
        return
    page = open_page()
    for name, rows in facts.items():
        if isinstance(rows, list):
            print_rows(page, f"{name} of {cache.source}", rows)
    if not facts.get("is_equally_far", True):
        print_line(page, "the run went on while it was read: the shards are not equally far")


@dataclass(frozen=True)
class Contents:
    """What a cache held when it was read.

    Attributes:
        source: where it is.
        digests: by table.
        shards: of a running cache, how far each shard was; a saved one has none.
    """

    source: str
    digests: Mapping[str, BucketDigests]
    shards: Sequence[ShardDigests] = ()

    @property
    def is_consistent(self) -> bool:
        """Whether it is one consistent cut; a checkpoint is written at one only."""
        return not self.shards or cut_of(self.shards) is not None

    def facts(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "is_consistent": self.is_consistent,
            "shards": [
                {
                    "shard": shard.shard,
                    "generation": shard.fence.generation,
                    "received_step": shard.fence.received_step,
                    "has_later_steps": not shard.is_cut,
                }
                for shard in self.shards
            ],
            "tables": [
                {"table": name, "rows": digests.total_rows, "digest": in_hex(digests.digest)}
                for name, digests in self.digests.items()
            ],
        }

    def bucket_rows(self) -> list[Row]:
        """Returns the buckets that have rows."""
        return [
            {
                "table": name,
                "bucket": int(bucket),
                "rows": int(digests.num_rows[bucket]),
                "digest": in_hex(int(digests.digests[bucket])),
            }
            for name, digests in self.digests.items()
            for bucket in digests.num_rows.nonzero()[0]
        ]


@dataclass(frozen=True)
class SavedCache:
    """The cache of a checkpoint.

    Attributes:
        source: the checkpoint's folder.
        tables: what it holds.
        prefix, parts: of its snapshot.
    """

    source: str
    tables: Mapping[str, TableSpec]
    prefix: str
    parts: Sequence[SnapshotPart]

    def read(self) -> Contents:
        """Reads and verifies every file."""
        columns = (TextColumn("reading"), BarColumn(), TimeRemainingColumn())
        page = Console(stderr=True)
        is_shown = page.is_terminal
        with Progress(*columns, console=page, transient=True, disable=not is_shown) as bar:
            task = bar.add_task("")
            digests = snapshot_contents(
                self.prefix,
                self.parts,
                self.tables,
                lambda done, total: bar.update(task, completed=done, total=total),
            )
        return Contents(self.source, digests)

    def sizes(self) -> dict[str, Any]:
        """Returns its files, as the manifest describes them."""
        files = [
            {
                "file": part.path,
                "table": part.table,
                "first_bucket": part.bucket_start,
                "last_bucket": part.bucket_stop - 1,
                "rows": part.num_rows,
                "bytes": part.nbytes,
                "bytes_per_row": ratio(part.nbytes, part.num_rows),
            }
            for part in self.parts
        ]
        return {"source": self.source, "files": files}


@dataclass(frozen=True)
class RunningCache:
    """The cache of a run that trains right now.

    Attributes:
        source: ``running:`` and the run's folder.
        client: of its shards.
    """

    source: str
    client: CacheClient

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        return self.client.tables

    def read(self) -> Contents:
        """Lets each shard compute its digests; its fetches and writes wait meanwhile."""
        shards = self.client.bucket_digests()
        return Contents(self.source, shard_contents(shards), shards)

    def sizes(self) -> dict[str, Any]:
        """Returns its shards, and the tables of each."""
        shards = self.client.stats()
        return {
            "source": self.source,
            "is_equally_far": len({shard.fence for shard in shards}) == 1,
            "shards": [
                {
                    "shard": shard.shard,
                    "generation": shard.fence.generation,
                    "received_step": shard.fence.received_step,
                    "late_messages": shard.late_messages,
                    "repeated_messages": shard.repeated_messages,
                }
                for shard in shards
            ],
            "tables": [
                {
                    "shard": shard.shard,
                    "table": name,
                    "rows": table.num_rows,
                    "bytes": table.nbytes,
                    "spilled_bytes": table.spilled_bytes,
                    "bytes_per_row": ratio(table.nbytes + table.spilled_bytes, table.num_rows),
                    "index_bytes": table.index_bytes,
                }
                for shard in shards
                for name, table in shard.tables.items()
            ],
        }


@contextmanager
def open_cache(source: str) -> Iterator[SavedCache | RunningCache]:
    """Yields the cache that a source names; of a saved one, only the manifest was read.

    Raises:
        CheckpointError: there is no committed checkpoint, or its manifest is damaged.
        StorageError: the folder cannot be looked into.
        ConfigError: no run trains there, or there is no Ray cluster.
    """
    if source.startswith(RUNNING):
        from launch.on_ray import running_cache

        with running_cache(source.removeprefix(RUNNING)) as client:
            yield RunningCache(source, client)
    else:
        yield open_saved_cache(source)


def open_saved_cache(url: str) -> SavedCache:
    """Returns the cache of a checkpoint, or of a run's newest."""
    from felrec_dist.config import parse_config
    from felrec_dist.training.checkpoint import CheckpointStore, read_checkpoint

    newest = CheckpointStore(url).latest()
    checkpoint = read_checkpoint(newest or url, with_dense=False)
    config = parse_config(checkpoint.config, where=checkpoint.url)
    return SavedCache(
        source=checkpoint.url,
        tables=config.cache_tables(),
        prefix=checkpoint.cache_prefix,
        parts=list(checkpoint.chain.parts),
    )


def verify_files(source: str, *, as_json: bool) -> None:
    """Reads every file of a saved cache; the first that is damaged raises."""
    if source.startswith(RUNNING):
        raise ConfigError(
            "a running cache has no files to verify",
            where="felrec cache verify",
            got=source,
            expected="a saved cache, or two caches to compare",
        )
    cache = open_saved_cache(source)
    contents = cache.read()
    num_files, num_bytes = len(cache.parts), sum(part.nbytes for part in cache.parts)
    if as_json:
        print_json(contents.facts() | {"is_whole": True, "files": num_files, "bytes": num_bytes})
        return
    page = open_page()
    print_contents(page, contents)
    print_line(
        page,
        f"whole: {num_files} files, {num_bytes:,} bytes; the rows and the digest of each are those "
        "of the manifest",
    )


def compare(source: str, other: str, *, limit: int, as_json: bool) -> None:
    """Compares two caches bucket by bucket; exits with 1 if they differ."""
    with open_cache(source) as cache_a, open_cache(other) as cache_b:
        check_comparable(cache_a, cache_b)
        a, b = cache_a.read(), cache_b.read()
    differing = {name: held.differing(b.digests[name]) for name, held in a.digests.items()}
    num_differing = {name: int(buckets.size) for name, buckets in differing.items()}
    rows: list[Row] = [
        {
            "table": name,
            "bucket": int(bucket),
            "rows_a": int(a.digests[name].num_rows[bucket]),
            "rows_b": int(b.digests[name].num_rows[bucket]),
        }
        for name, buckets in differing.items()
        for bucket in buckets[:limit]
    ]
    is_equal = not any(num_differing.values())
    if as_json:
        facts = {"is_equal": is_equal, "a": a.facts(), "b": b.facts()}
        print_json(facts | {"num_differing": num_differing, "differing": rows})
    else:
        page = open_page()
        print_contents(page, a, "a: ")
        print_contents(page, b, "b: ")
        if is_equal:
            print_line(page, "equal")
        else:
            print_rows(page, f"buckets that differ, at most {limit} a table", rows)
            counts = ", ".join(f"{count:,} of {name}" for name, count in num_differing.items())
            print_line(page, f"different: {counts} of {NUM_BUCKETS:,} buckets")
    if not is_equal:
        raise typer.Exit(DIFFERENT)


def check_comparable(a: SavedCache | RunningCache, b: SavedCache | RunningCache) -> None:
    """Raises ConfigError unless both caches have the same tables."""
    if a.tables != b.tables:
        kinds = (
            ", ".join(f"{name} {spec.width} x {spec.storage}" for name, spec in tables.items())
            for tables in (a.tables, b.tables)
        )
        raise ConfigError(
            "two caches with other tables cannot be compared",
            where=f"{a.source} and {b.source}",
            got=" and ".join(kinds),
            expected="the same tables, width and storage type",
        )


def print_contents(page: Console, contents: Contents, letter: str = "") -> None:
    """Prints rows and digests by table and, of a running cache, how far its shards were."""
    facts = contents.facts()
    print_rows(page, f"{letter}{contents.source}", facts["tables"])
    if not contents.shards:
        return
    cut = cut_of(contents.shards)
    if cut is not None:
        print_line(page, f"every shard: {cut}")
        return
    print_rows(page, "shards", facts["shards"])
    print_line(page, "this is no consistent cut: the run went on while it was read")


def print_rows(page: Console, title: str, rows: Sequence[Row]) -> None:
    """Prints a table with a column for each key; nothing if there are no rows."""
    if not rows:
        return
    print_line(page, title)
    table = Table()
    for key, value in rows[0].items():
        is_text = isinstance(value, str | bool)
        table.add_column(key.replace("_", " "), justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(in_words(value) for value in row.values()))
    page.print(table)


def in_words(value: str | int | float | None) -> Text:
    match value:
        case None:
            return Text("")
        case bool():
            return Text("yes" if value else "no")
        case str():
            return Text(value, overflow="fold")
        case _:
            return Text(f"{value:,}")


def in_hex(digest: int) -> str:
    return f"{digest:016x}"


def ratio(num_bytes: int, num_rows: int) -> float | None:
    """Returns bytes a row, to a tenth; None where there are no rows."""
    return round(num_bytes / num_rows, 1) if num_rows else None


def open_page() -> Console:
    """Returns stdout, wide enough where it is a file or a pipe and has no edge."""
    page = Console()
    if not page.is_terminal:
        page.width = max(page.width, PAGE_WIDTH)
    return page


def print_line(page: Console, line: str) -> None:
    page.print(line, markup=False, highlight=False, soft_wrap=True)


def print_json(facts: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(facts, indent=1))
