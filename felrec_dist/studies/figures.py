"""What a cell's run measured, read from its TensorBoard log and its newest checkpoint."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from felrec_dist.config import ExperimentConfig
from felrec_dist.errors import InputError, storage_errors
from felrec_dist.training.checkpoint import CheckpointStore, read_checkpoint
from felrec_dist.training.clock import LOADER_PHASES, STEP_PHASES

TRAINING_PHASES = tuple(phase for phase in STEP_PHASES if phase != "score")


@dataclass(frozen=True)
class CellFigures:
    """Medians over the readings of a run's log after the warm-up; a reading is a mean over steps.

    Attributes:
        num_workers, num_shards, batch_size, hot_rows: of the config.
        cores: of the machine, all nodes together.
        events_per_s: of all ranks.
        phase_s: of a step, by phase of ``STEP_PHASES``; the first rank's.
        loader_s: of a step, by phase of ``LOADER_PHASES``, beside the others; the first rank's.
        read_rows: distinct rows that the slices of a step read, all ranks.
        hit_rate: share of them that the hot tier held.
        fetched_rows, fetch_messages, fetched_bytes: of a step, all ranks.
        fetch_wait_s: of a step, that a loader waited for shards.
        written_rows, written_bytes: of a step, all ranks.
        gathered_bytes: of a step, what came to a rank from another one, all ranks.
        cache_rows, cache_bytes: when the training ended, both sides.
        checkpoint_s: of the checkpoint after the validation.
        validation_rank: of the best epoch; 0 best, 0.5 chance.
        gradient_bytes: what the ranks average at a step.
        row_bytes: of a row alone.
    """

    num_workers: int
    num_shards: int
    batch_size: int
    hot_rows: int
    cores: int
    events_per_s: float
    phase_s: Mapping[str, float]
    loader_s: Mapping[str, float]
    read_rows: float
    hit_rate: float
    fetched_rows: float
    fetch_messages: float
    fetched_bytes: float
    fetch_wait_s: float
    written_rows: float
    written_bytes: float
    gathered_bytes: float
    cache_rows: int
    cache_bytes: int
    checkpoint_s: float
    validation_rank: float
    gradient_bytes: int
    row_bytes: int

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.batch_size / self.events_per_s

    @property
    def slice_events(self) -> float:
        """Events of a rank's slice."""
        return self.batch_size / self.num_workers


def read_figures(config: ExperimentConfig, *, warmup_steps: int, cores: int) -> CellFigures:
    """Reads what a finished run left in its folder.

    Args:
        config: of the run.
        warmup_steps: readings up to this step do not count.
        cores: of the machine.

    Raises:
        InputError: the log holds no reading after the warm-up, or lacks a figure.
        CheckpointError, StorageError: it cannot be read.
    """
    url = f"{config.run.url}/tensorboard"
    with storage_errors("the log of a run cannot be read", url):
        log = EventAccumulator(url, size_guidance={"scalars": 0})
        log.Reload()
        scalars = {
            tag: {event.step: float(event.value) for event in log.Scalars(tag)}
            for tag in log.Tags()["scalars"]
        }

    def values(tag: str) -> list[float]:
        found = [value for step, value in scalars.get(tag, {}).items() if step > warmup_steps]
        if not found:
            raise InputError(
                "a run's log holds no reading after the warm-up",
                where=url,
                got=f"{tag} at steps {list(scalars.get(tag, {}))}",
                expected=f"one after step {warmup_steps}",
                remedy="give the cell more events, or lower warmup_steps or run.log_every_steps",
            )
        return found

    def typical(tag: str) -> float:
        return statistics.median(values(tag))

    def size(unit: str) -> int:
        tags = [tag for tag in scalars if tag.startswith("cache/") and f"/size({unit})/" in tag]
        return round(sum(values(tag)[-1] for tag in tags))

    latest = CheckpointStore(config.run.url).latest()
    if latest is None:
        raise InputError("a run has no checkpoint", where=config.run.url)
    checkpoint = read_checkpoint(latest)
    assert checkpoint.position.best is not None  # it is after a validation
    events_per_s = typical("speed/train(events per s)")
    step_s = config.data.batch_size / events_per_s
    return CellFigures(
        num_workers=config.cluster.num_workers,
        num_shards=config.cache.num_shards,
        batch_size=config.data.batch_size,
        hot_rows=config.cache.hot_rows,
        cores=cores,
        events_per_s=events_per_s,
        phase_s={
            phase: typical(f"time_share/{phase}(%)") / 100 * step_s for phase in TRAINING_PHASES
        },
        loader_s={phase: typical(f"loader/{phase}(ms per step)") / 1000 for phase in LOADER_PHASES},
        read_rows=typical("cache/read(rows per step)"),
        hit_rate=typical("cache/hot_tier_hits(%)") / 100,
        fetched_rows=typical("cache/fetched(rows per step)"),
        fetch_messages=typical("cache/fetch_messages(per step)"),
        fetched_bytes=typical("cache/fetched(bytes per step)"),
        fetch_wait_s=typical("cache/fetch_wait(ms per step)") / 1000,
        written_rows=typical("cache/written(rows per step)"),
        written_bytes=typical("cache/written(bytes per step)"),
        gathered_bytes=typical("exchange/gathered(bytes per step)"),
        cache_rows=size("rows"),
        cache_bytes=size("bytes"),
        checkpoint_s=typical("checkpoint/save(s)"),
        validation_rank=checkpoint.position.best.validation_rank,
        # Of what is in the model, buffers are queues and running statistics.
        gradient_bytes=sum(
            checkpoint.model[name].nbytes
            for name in {name.partition(":")[0] for name in checkpoint.optimizer}
        ),
        row_bytes=max(table.row_bytes for table in config.cache_tables().values()),
    )
