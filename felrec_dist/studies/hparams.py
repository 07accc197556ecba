"""A study for TensorBoard's HParams tab: settings and final figures of each cell."""

from __future__ import annotations

from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard.summary import hparams, scalar

from felrec_dist.studies.config import Cell
from felrec_dist.studies.figures import CellFigures
from felrec_dist.training.metrics import EventFile


def write_hparams(url: str, cell: Cell, figures: CellFigures) -> None:
    """Writes a finished cell as one session of the study's experiment.

    Args:
        url: a folder of the cell's own, below the one that TensorBoard is given.
        cell: its settings are the hyperparameters.
        figures: its metrics.

    Raises:
        StorageError: it cannot be written.
    """
    metrics = {
        "final/speed(events per s)": figures.events_per_s,
        "final/step(ms)": 1000 * figures.step_s,
        "final/validation_rank(0..1)": figures.validation_rank,
        "final/hot_tier_hits(%)": 100 * figures.hit_rate,
        "final/fetched(bytes per step)": figures.fetched_bytes,
        "final/written(bytes per step)": figures.written_bytes,
        "final/gathered(bytes per step)": figures.gathered_bytes,
        "final/cache_size(rows)": figures.cache_rows,
        "final/cache_size(bytes)": figures.cache_bytes,
        "final/checkpoint(s)": figures.checkpoint_s,
    }
    settings = {key: str(value) if value is None else value for key, value in cell.settings.items()}
    file = EventFile(url)
    file.add([Event(summary=summary) for summary in hparams(settings, metrics)])
    file.add([Event(summary=scalar(tag, value)) for tag, value in metrics.items()])
    file.write()
