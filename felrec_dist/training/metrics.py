"""What a run tells TensorBoard; names carry units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.utils.tensorboard import SummaryWriter

from cache_server import ShardStats
from felrec_dist.evaluation.result import Metrics


class RunLog:
    """Scalars of one run; ranks other than the first write nothing.

    Args:
        run_url: the run's folder.
        is_writer: whether this rank writes.
        steps_done: of a run that goes on; what it logged after them, before it was stopped, is
            hidden.
    """

    def __init__(self, run_url: str, *, is_writer: bool, steps_done: int = 0) -> None:
        self.folder = f"{run_url.rstrip('/')}/tensorboard"
        # Steps are counted from 1 here: a scalar stands at the number of steps that were done.
        purge_step = steps_done + 1 if steps_done else None
        self._writer = SummaryWriter(self.folder, purge_step=purge_step) if is_writer else None

    def steps(
        self,
        global_step: int,
        *,
        user_loss: float,
        item_loss: float,
        chance_loss: float | None,
        learning_rate: float,
        gradient_norm: float,
        events_per_s: float,
        phase_seconds: Mapping[str, float],
        loader_seconds: Mapping[str, float],
        num_steps: int,
        hit_rate: float,
    ) -> None:
        """Logs means over the steps since the last call.

        ``wait`` is the trainer's wait for data and rows; the loader's phases run beside the others.
        """
        scalars = {
            "loss/total": user_loss + item_loss,
            "loss/user": user_loss,
            "loss/item": item_loss,
            "optimizer/learning_rate": learning_rate,
            "optimizer/gradient_norm": gradient_norm,
            "speed/train(events per s)": events_per_s,
            "cache/hot_tier_hits(%)": 100.0 * hit_rate,
        }
        if chance_loss is not None:
            scalars["loss/user_below_chance(nats)"] = chance_loss - user_loss
            scalars["loss/item_below_chance(nats)"] = chance_loss - item_loss
        total = sum(phase_seconds.values())
        for phase, seconds in phase_seconds.items():
            if phase != "score":  # a phase of evaluation
                scalars[f"time_share/{phase}(%)"] = 100.0 * seconds / max(total, 1e-9)
        for phase, seconds in loader_seconds.items():
            scalars[f"loader/{phase}(ms per step)"] = 1000.0 * seconds / num_steps
        self._write(scalars, global_step)

    def cache(self, global_step: int, shards: Sequence[ShardStats]) -> None:
        """Logs rows and bytes of each table and shard."""
        self._write(
            {
                f"cache/{table}/{name}/shard_{shard.shard}": value
                for shard in shards
                for table, stats in shard.tables.items()
                for name, value in (("size(rows)", stats.num_rows), ("size(bytes)", stats.nbytes))
            },
            global_step,
        )

    def evaluation(
        self, part: str, global_step: int, metrics: Mapping[str, Metrics], *, k: int
    ) -> None:
        """Logs normalized rank (0 best, 1 worst) and HR@k of each partition that has events."""
        self._write(
            {
                f"{part}/{name}/{partition}": value
                for partition, m in metrics.items()
                if m.num_events
                for name, value in (
                    ("rank(0..1)", m.normalized_rank),
                    (f"HR@{k}(%)", 100.0 * m.hit_rate),
                )
            },
            global_step,
        )

    def _write(self, scalars: Mapping[str, float], global_step: int) -> None:
        if self._writer is not None:
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, global_step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
