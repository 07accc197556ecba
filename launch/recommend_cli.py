"""``felrec recommend``: lists of items, or of nearest users, from a checkpoint."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import fsspec
import typer
from rich.console import Console

from felrec_dist.errors import ConfigError, storage_errors

if TYPE_CHECKING:
    import pyarrow as pa

Form = Literal["csv", "json", "parquet"]


def recommend(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="a run's folder, of which the best epoch counts, or a checkpoint's; any URL",
        ),
    ],
    users: Annotated[
        str | None, typer.Option(help="ids as in the raw data, as 5,17; default: all users")
    ] = None,
    users_file: Annotated[
        str | None, typer.Option(help="a file with one id a line, any fsspec URL")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="length of each list")] = 10,
    nearest_users: Annotated[
        bool, typer.Option("--nearest-users", help="list the most similar users, not items")
    ] = False,
    exclude_seen: Annotated[
        bool, typer.Option("--exclude-seen", help="leave out items that the user met before")
    ] = False,
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="leave out users that are unknown")
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="file to write to, any fsspec URL; default: stdout")
    ] = None,
    form: Annotated[
        Form | None, typer.Option("--format", help="default: by the end of --out, else csv")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="the data set of the run, where it was moved")
    ] = None,
) -> None:
    """List the first items of users: as they are at the checkpoint, among the items seen by then.

    One process, no Ray.
    """
    chosen = form or _form_of(out)
    if out is None and chosen == "parquet":
        raise ConfigError(
            "Parquet is for files",
            where="felrec recommend",
            got="--format parquet without --out",
            remedy="give --out FILE.parquet, or another format",
        )
    if nearest_users and exclude_seen:
        raise typer.BadParameter("no items are listed", param_hint="--nearest-users --exclude-seen")

    from felrec_dist.storage import write_whole
    from felrec_dist.training.recommend import Request
    from launch import local
    from launch.progress import TerminalProgress

    request = Request(
        users=_users(users, users_file),
        k=k,
        nearest_users=nearest_users,
        exclude_seen=exclude_seen,
        skip_unknown=skip_unknown,
    )
    with TerminalProgress(Console(stderr=True)) as progress:
        table = local.recommend(source, request, data_url=data, progress=progress)
    content = _WRITERS[chosen](table)
    if out is None:
        sys.stdout.write(content.decode())
    else:
        write_whole(out, content, "the recommendations cannot be written")
        typer.echo(f"{out}: {table.num_rows:,} rows")


def _form_of(out: str | None) -> Form:
    if out is None:
        return "csv"
    for form in _WRITERS:
        if out.endswith(f".{form}"):
            return form
    raise ConfigError(
        "the name of the file does not tell its format",
        where="felrec recommend --out",
        got=out,
        expected="a name that ends in .csv, .json or .parquet",
        remedy="rename it, or give --format",
    )


def _users(users: str | None, users_file: str | None) -> list[str] | None:
    """Returns the ids asked for, each once; None for all."""
    if users is not None and users_file is not None:
        raise typer.BadParameter("give one of them", param_hint="--users --users-file")
    if users is not None:
        texts = users.split(",")
    elif users_file is not None:
        with (
            storage_errors("the file of users cannot be read", users_file),
            fsspec.open(users_file, "rt") as file,
        ):
            texts = file.read().splitlines()
    else:
        return None
    asked = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not asked:
        raise ConfigError(
            "no users are given",
            where=users_file or "felrec recommend --users",
            expected="ids as they stand in the raw data",
            remedy="leave the option out for all users",
        )
    return asked


def _to_csv(table: pa.Table) -> bytes:
    import pyarrow.csv

    content = io.BytesIO()
    options = pyarrow.csv.WriteOptions(quoting_style="needed")
    pyarrow.csv.write_csv(table, content, options)
    return content.getvalue()


def _to_json(table: pa.Table) -> bytes:
    """A list of users, each with its list."""
    column = table.column_names[2]
    lists: dict[Any, dict[str, Any]] = {}
    for row in table.to_pylist():
        of_user = lists.setdefault(row["user"], {"user": row["user"], f"{column}s": []})
        of_user[f"{column}s"].append({column: row[column], "score": row["score"]})
    return (json.dumps(list(lists.values()), indent=1) + "\n").encode()


def _to_parquet(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()


_WRITERS: Mapping[Form, Callable[[pa.Table], bytes]] = {
    "csv": _to_csv,
    "json": _to_json,
    "parquet": _to_parquet,
}
