"""The command ``felrec``: from raw events to tables of tested models, here or on a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from felrec_dist.errors import ConfigError, FelrecError
from launch.benchmark_cli import benchmark
from launch.cache_cli import cache_app
from launch.compare_cli import compare
from launch.recommend_cli import recommend
from launch.report_cli import report
from launch.scale_cli import scale
from launch.stopping import stoppable
from launch.submit_cli import submit
from launch.suite_cli import suite

if TYPE_CHECKING:
    from felrec_dist.config import ExperimentConfig

app = typer.Typer(
    name="felrec",
    help="Train FELRec: representations of users and items without an embedding layer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cache_app, name="cache")
app.command()(benchmark)
app.command()(compare)
app.command()(recommend)
app.command()(report)
app.command()(scale)
app.command()(submit)
app.command()(suite)

IdKind = Literal["int", "string"]
Unit = Literal["s", "ms", "us", "iso"]
FAILED = 1
REPORT_WIDTH = 124
EXTRA_PACKAGES = {
    "s3fs": "pip install 'felrec-dist[s3]'",
    "gcsfs": "pip install gcsfs",
    **dict.fromkeys(("jinja2", "matplotlib", "sklearn"), "pip install 'felrec-dist[report]'"),
    "ray": "pip install 'felrec-dist[ray]'; to train and evaluate without it, add --local",
}


def main() -> None:
    """Runs the command line; our own errors are printed without a trace."""
    console = Console(stderr=True)
    try:
        app()
    except FelrecError as error:
        _print_error(console, error)
        sys.exit(FAILED)
    except ImportError as error:
        package = next((name for name in EXTRA_PACKAGES if name in str(error)), None)
        if package is None:
            raise
        remedy = EXTRA_PACKAGES[package]
        _print_error(console, ConfigError(f"{package} is not installed", remedy=remedy))
        sys.exit(FAILED)


def _print_error(console: Console, error: FelrecError) -> None:
    console.print(f"[bold red]error:[/] {type(error).__name__}:", end=" ")
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)


@app.command()
def prepare(
    layout: Annotated[
        str,
        typer.Argument(
            help="ml-100k, ml-1m, ml-10m, ml-20m, ml-25m, ml-32m, twitch-100k, reddit, wikipedia, "
            "csv, parquet, or auto to tell by the file names"
        ),
    ],
    paths: Annotated[
        list[str],
        typer.Argument(help="raw files, folders, globs or .zip, local or fsspec URLs"),
    ],
    out: Annotated[str, typer.Option(help="folder of the prepared data set, any fsspec URL")],
    user: Annotated[str | None, typer.Option(help="column of users (csv, parquet)")] = None,
    item: Annotated[str | None, typer.Option(help="column of items (csv, parquet)")] = None,
    timestamp: Annotated[str | None, typer.Option(help="column of timestamps")] = None,
    timestamp_unit: Annotated[Unit | None, typer.Option(help="of the timestamps")] = None,
    delimiter: Annotated[str, typer.Option(help="between columns (csv)")] = ",",
    header: Annotated[bool, typer.Option(help="the first line names the columns (csv)")] = True,
    user_ids: Annotated[IdKind | None, typer.Option(help="default: tell by the values")] = None,
    item_ids: Annotated[IdKind | None, typer.Option(help="default: tell by the values")] = None,
    name: Annotated[str | None, typer.Option(help="for reports; default: the layout")] = None,
    validation_fraction: Annotated[
        str | None, typer.Option(help="of all events; default: 0.1, or as before with --append")
    ] = None,
    test_fraction: Annotated[
        str | None, typer.Option(help="of all events, the last ones; default: likewise")
    ] = None,
    memory_limit: Annotated[str, typer.Option(help="of the sort; the rest spills")] = "2GB",
    temp_dir: Annotated[str | None, typer.Option(help="where it spills")] = None,
    temp_limit: Annotated[
        str | None, typer.Option(help="what it may take there, as 200GB; default: 90 % of the free")
    ] = None,
    engine: Annotated[
        Literal["duckdb", "ray"], typer.Option(help="this machine, or Ray Data on a cluster")
    ] = "duckdb",
    append: Annotated[
        bool, typer.Option("--append", help="add later events to the data set at --out")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="replace a prepared data set at --out")] = False,
) -> None:
    """Turn raw interactions into a prepared data set, or add later ones to it.

    Run again after it was killed, it goes on after the last finished stage.
    """
    from felrec_dist.data.prepare import FRACTION
    from felrec_dist.data.prepare import append as append_events
    from felrec_dist.data.prepare import prepare as prepare_dataset
    from felrec_dist.data.sources import RawSource

    if append:
        _check_append(name=name, overwrite=overwrite, engine=engine)

    named = {"--user": user, "--item": item, "--timestamp": timestamp}
    if layout in ("csv", "parquet"):
        missing = [option for option, value in named.items() if value is None]
        if missing or user is None or item is None or timestamp is None:
            raise ConfigError(
                f"a {layout} file has columns of its own",
                where="felrec prepare",
                got=f"no {', '.join(missing)}",
                expected="--user, --item and --timestamp with the names of the columns",
            )
    elif any(value is not None for value in named.values()):
        raise ConfigError(
            f"the columns of {layout} are known",
            where="felrec prepare",
            got=", ".join(option for option, value in named.items() if value is not None),
            remedy="leave these options out, or prepare the file as csv or parquet",
        )
    if layout == "csv":
        assert user is not None and item is not None and timestamp is not None  # noqa: PT018
        if timestamp_unit is None:
            raise ConfigError(
                "text does not tell the unit of its timestamps",
                where="felrec prepare",
                expected="--timestamp-unit s, ms, us or iso",
            )
        source = RawSource.csv(
            *paths,
            user=user if header else _column_number(user),
            item=item if header else _column_number(item),
            timestamp=timestamp if header else _column_number(timestamp),
            timestamp_unit=timestamp_unit,
            delimiter=delimiter.replace("\\t", "\t"),
            has_header=header,
            user_ids=user_ids,
            item_ids=item_ids,
        )
    elif layout == "parquet":
        assert user is not None and item is not None and timestamp is not None  # noqa: PT018
        source = RawSource.parquet(
            *paths,
            user=user,
            item=item,
            timestamp=timestamp,
            timestamp_unit=timestamp_unit,
            user_ids=user_ids,
            item_ids=item_ids,
        )
    else:
        if len(paths) != 1:
            raise ConfigError(
                f"{layout} is one file, folder or .zip", where="felrec prepare", got=paths
            )
        source = (
            RawSource.detect(paths[0])
            if layout == "auto"
            else RawSource.from_name(layout, paths[0])
        )
    with _stages() as report, _cluster_of(engine):
        if append:
            dataset = append_events(
                source,
                out,
                validation_fraction=validation_fraction,
                test_fraction=test_fraction,
                memory_limit=memory_limit,
                temp_dir=temp_dir,
                temp_limit=temp_limit,
                progress=report,
            )
        else:
            dataset = prepare_dataset(
                source,
                out,
                name=name or source.layout,
                validation_fraction=FRACTION
                if validation_fraction is None
                else validation_fraction,
                test_fraction=test_fraction or FRACTION,
                memory_limit=memory_limit,
                temp_dir=temp_dir,
                temp_limit=temp_limit,
                overwrite=overwrite,
                engine=engine,
                progress=report,
            )
    split = dataset.split
    typer.echo(
        f"{dataset.url}: {dataset.num_events:,} events, {dataset.num_users:,} users, "
        f"{dataset.num_items:,} items; training {len(split.train):,}, "
        f"validation {len(split.validation):,}, test {len(split.test):,}"
    )


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="ml-25m, twitch-100k, reddit, ...")],
    out: Annotated[Path, typer.Option(help="folder for the file")] = Path("data/raw"),
) -> None:
    """Fetch a public data set from its publisher and check it."""
    from felrec_dist.data.download import PUBLIC_DATASETS
    from felrec_dist.data.download import download as fetch

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        path = fetch(
            name, out, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    typer.echo(f"{path}")
    typer.echo(f"read before use: {PUBLIC_DATASETS[name].page}")
    typer.echo(f"next: felrec prepare {name} {path} --out data/{name}")


@app.command()
def synthesize(
    out: Annotated[Path, typer.Argument(help="the Parquet file to write")],
    num_events: Annotated[int, typer.Option(help="exact")] = 100_000,
    num_users: Annotated[int, typer.Option(help="the population")] = 3_000,
    num_items: Annotated[int, typer.Option(help="the population")] = 5_000,
    seed: Annotated[int, typer.Option(help="the same seed, the same file")] = 0,
    num_tastes: Annotated[int, typer.Option(help="latent groups of items")] = 16,
    taste_strength: Annotated[float, typer.Option(help="how often taste decides, 0 to 1")] = 0.85,
    popularity_skew: Annotated[float, typer.Option(help="exponent of Zipf's law")] = 0.8,
    closedness: Annotated[float, typer.Option(help="of communities, 0 to 1")] = 0.0,
    days: Annotated[float, typer.Option(help="from the first event to the last")] = 365.0,
) -> None:
    """Write synthetic interactions: users and items keep arriving, popularity is skewed."""
    from felrec_dist.data.synthetic import SyntheticConfig
    from felrec_dist.data.synthetic import synthesize as write

    config = SyntheticConfig(
        num_events=num_events,
        num_users=num_users,
        num_items=num_items,
        seed=seed,
        num_tastes=num_tastes,
        taste_strength=taste_strength,
        popularity_skew=popularity_skew,
        closedness=closedness,
        days=days,
    )
    with _stages() as report:
        path = write(out, config, lambda done, total: report("generating", done, total))
    typer.echo(f"{path}")
    typer.echo(
        f"next: felrec prepare parquet {path} --user user --item item --timestamp timestamp "
        "--timestamp-unit ms --out data/synthetic"
    )


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="a YAML file; see configs/")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as training.seed=1")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="one process, the cache in process, no Ray")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(help="go on from the run's newest checkpoint, or refuse to if there is one"),
    ] = True,
) -> None:
    """Train, validate after each epoch, and test the best epoch.

    Run again, it goes on from the newest checkpoint of the run's folder.
    """
    from felrec_dist.config import load_config
    from launch.progress import TerminalProgress

    experiment = load_config(config, overrides or [])
    console = Console()
    with stoppable(console) as should_stop, TerminalProgress(console) as progress:
        if local:
            from launch import local as here

            here.train(experiment, resume=resume, progress=progress, should_stop=should_stop)
        else:
            from launch import on_ray

            on_ray.run(experiment, on_ray.Job(resume=resume), progress, should_stop)
    _print_report(console, experiment, experiment.evaluation.protocol)
    typer.echo(f"run folder: {experiment.run.url}")
    typer.echo(f"TensorBoard: tensorboard --logdir {experiment.run.url}/tensorboard")


@app.command()
def evaluate(
    config: Annotated[str, typer.Argument(help="the run's config.yaml, or the file in configs/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    checkpoint: Annotated[
        str, typer.Option(help="a folder such as <run>/checkpoints/epoch-0003")
    ] = "",
    protocol: Annotated[
        Literal["causal", "released"] | None, typer.Option(help="default: the config's")
    ] = None,
    reset: Annotated[
        bool,
        typer.Option("--reset", help="empty cache, training and validation replayed into it"),
    ] = False,
    zero: Annotated[
        bool, typer.Option("--zero", help="likewise, on another data set than the checkpoint's")
    ] = False,
    nn: Annotated[
        bool, typer.Option("--nn", help="average the scores of the 10 nearest of 16,384 users")
    ] = False,
    use_heads: Annotated[
        bool, typer.Option("--use-heads", help="compare behind the heads, as in training")
    ] = False,
    local: Annotated[bool, typer.Option("--local", help="one process, no Ray")] = False,
) -> None:
    """Test a checkpoint: its weights, and its cache as it was after the validation.

    Each variant leaves a report of its own, as test-causal-reset.json. The options stand for
    evaluation.cache=reset, evaluation.cache=zero, evaluation.nearest_users=10 and
    evaluation.use_heads=true.
    """
    from felrec_dist.config import load_config
    from launch.progress import TerminalProgress

    if not checkpoint:
        raise ConfigError(
            "no checkpoint is given", where="felrec evaluate", expected="--checkpoint FOLDER"
        )
    if reset and zero:
        raise typer.BadParameter("the data set is this one or another", param_hint="--reset --zero")
    variants = {
        "evaluation.cache=reset": reset,
        "evaluation.cache=zero": zero,
        "evaluation.nearest_users=10": nn,
        "evaluation.use_heads=true": use_heads,
    }
    asked = [override for override, is_asked in variants.items() if is_asked]
    experiment = load_config(config, [*(overrides or []), *asked])
    chosen = protocol or experiment.evaluation.protocol
    console = Console()
    with stoppable(console) as should_stop, TerminalProgress(console) as progress:
        if local:
            from launch import local as here

            here.evaluate(
                experiment,
                checkpoint_url=checkpoint,
                protocol=chosen,
                progress=progress,
                should_stop=should_stop,
            )
        else:
            from launch import on_ray

            job = on_ray.Job(checkpoint_url=checkpoint, protocol=chosen)
            on_ray.run(experiment, job, progress, should_stop)
    _print_report(console, experiment, chosen)


def _print_report(
    console: Console, experiment: ExperimentConfig, protocol: Literal["causal", "released"]
) -> None:
    from felrec_dist.evaluation.report import read_report, report_url
    from felrec_dist.evaluation.result import FULL_METRICS, metrics_table

    variant = experiment.evaluation.variant
    report = read_report(experiment.run.url, protocol, variant)
    if report.chance_loss is not None:
        console.print(
            f"training loss of this epoch {report.training_loss:.3f}, "
            f"chance {report.chance_loss:.3f}",
            highlight=False,
        )
    if not console.is_terminal:
        # A file or a pipe has no edge to cut figures off at.
        console.width = max(console.width, REPORT_WIDTH)
    title = f"test, {protocol} protocol, {report.candidates} candidates, epoch {report.epoch + 1}"
    caption = "rank: 0 best, 1 worst, 0.5 chance" + (
        "" if protocol == "causal" else "; most and recently popular: causal protocol"
    )
    console.print(metrics_table(title, report.rows, k=report.k, caption=caption))
    console.print(
        metrics_table(
            "the same among all candidates, without sampling",
            report.rows,
            k=report.k,
            metrics=FULL_METRICS,
        )
    )
    typer.echo(f"{report_url(experiment.run.url, protocol, variant)}.json, .parquet")


@contextmanager
def _cluster_of(engine: Literal["duckdb", "ray"]) -> Iterator[None]:
    """Joins the cluster of RAY_ADDRESS to prepare on, and says so at once if nobody answers."""
    if engine == "ray" and os.environ.get("RAY_ADDRESS"):
        from launch.on_ray import joined_ray

        with joined_ray():
            yield
    else:
        yield


def _check_append(*, name: str | None, overwrite: bool, engine: str) -> None:
    given = {"--name": name is not None, "--overwrite": overwrite, "--engine ray": engine == "ray"}
    if any(given.values()):
        raise ConfigError(
            "events are appended to a data set as it is, by DuckDB",
            where="felrec prepare --append",
            got=", ".join(option for option, is_given in given.items() if is_given),
            remedy="leave these options out",
        )


def _column_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            "a file without a header has no column names",
            where="felrec prepare --no-header",
            got=text,
            expected="a column number, from 0",
        ) from None


class _Stages:
    """A bar for each stage of a preparation."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, object] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=total)
        self.bar.update(self.tasks[stage], completed=done, total=total)  # type: ignore[arg-type]


@contextmanager
def _stages() -> Iterator[_Stages]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Stages(bar)
