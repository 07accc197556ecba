"""What workers and driver tell Ray's metrics, beside the shards (``cache_server/ray_metrics.py``).

Ray exports each under its name after ``ray_``, on the metrics port of each node.
``launch/grafana.json`` is a dashboard of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

# By the name that a number has in TensorBoard; what stands for * is a label.
GAUGES = {
    "loss/total": ("felrec_train_loss", "mean of the steps since the last report"),
    "speed/train(events per s)": ("felrec_train_events_per_second", "of all workers"),
    "cache/hot_tier_hits(%)": ("felrec_train_hot_tier_hits_percent", "of the ids that are read"),
    "cache/fetch_wait(ms per step)": ("felrec_train_fetch_wait_ms", "in a step, first worker"),
    "cache/write_wait(ms per step)": ("felrec_train_write_wait_ms", "in a step, first worker"),
    "time_share/*(%)": ("felrec_train_time_share_percent", "of a step, by phase"),
    "checkpoint/taken(unix s)": ("felrec_checkpoint_taken_seconds", "time of the newest"),
}
RECOVERIES = "felrec_run_recoveries"

# Ray adds the suffix of a counter.
EXPORTED = (*(name for name, _ in GAUGES.values()), f"{RECOVERIES}_total")

_LABEL = "phase"


class TrainingMetrics:
    """Gauges of a run, for one of its workers.

    Args:
        run: label, the run's folder.
    """

    def __init__(self, run: str) -> None:
        self._gauges: list[tuple[re.Pattern[str], Gauge]] = []
        for tag, (name, text) in GAUGES.items():
            gauge = Gauge(name, text, ("run", _LABEL) if "*" in tag else ("run",))
            gauge.set_default_tags({"run": run})
            pattern = re.escape(tag).replace(r"\*", f"(?P<{_LABEL}>.+)")
            self._gauges.append((re.compile(pattern), gauge))

    def measure(self, scalars: Mapping[str, float]) -> None:
        """Sets the gauges of those scalars that have one."""
        for tag, value in scalars.items():
            for pattern, gauge in self._gauges:
                if match := pattern.fullmatch(tag):
                    gauge.set(float(value), match.groupdict())


def count_recoveries(run: str) -> Counter:
    """Returns the counter of attempts after the first, for the driver."""
    counter = Counter(RECOVERIES, "attempts of a run after its first", ("run",))
    counter.set_default_tags({"run": run})
    return counter
