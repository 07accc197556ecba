"""What shard actors tell Ray's metrics; imports Ray, as ``ray_transport`` does.

Ray exports each under its name after ``ray_``, on the metrics port of each node.
"""

from __future__ import annotations

import threading
from contextlib import suppress

from ray.util.metrics import Counter, Gauge

from cache_server.errors import CacheTimeoutError
from cache_server.service import ServiceCounters, ShardService

INTERVAL_S = 2.0

GAUGES = {
    "felrec_cache_rows": "ids of a table in a shard",
    "felrec_cache_memory_bytes": "ids, versions and rows in memory",
    "felrec_cache_spilled_bytes": "rows in files of the spill tier",
}
"""By table."""

COUNTERS = {
    "felrec_cache_fetches": "fetches",
    "felrec_cache_fetched_rows": "rows asked for",
    "felrec_cache_fetch_wait_seconds": "time that fetches waited for writes they needed",
    "felrec_cache_fetch_seconds": "time that fetches read, without that wait",
    "felrec_cache_writes": "writes",
    "felrec_cache_written_rows": "rows received",
    "felrec_cache_write_wait_seconds": "time that writes waited for fetches under way",
    "felrec_cache_write_seconds": "time that writes stored, without that wait",
}
"""Of ``ServiceCounters``, in its order."""

# Ray adds the suffix of a counter.
EXPORTED = (*GAUGES, *(f"{name}_total" for name in COUNTERS))


class ShardMetrics:
    """Reports one shard to Ray now and then, in a thread of its own; a step pays nothing.

    Args:
        service: the shard's.
        run, shard: labels.
        interval_s: between two reports.
    """

    def __init__(
        self, service: ShardService, run: str, shard: int, interval_s: float = INTERVAL_S
    ) -> None:
        self._service = service
        self._interval_s = interval_s
        tags = {"run": run, "shard": str(shard)}
        self._gauges = {name: Gauge(name, text, (*tags, "table")) for name, text in GAUGES.items()}
        self._counters = [Counter(name, text, tuple(tags)) for name, text in COUNTERS.items()]
        for metric in (*self._gauges.values(), *self._counters):
            metric.set_default_tags(tags)
        self._reported = ServiceCounters()
        threading.Thread(target=self._report_for_ever, name="metrics", daemon=True).start()

    def _report_for_ever(self) -> None:
        is_over = threading.Event()  # the thread ends with the process
        while not is_over.wait(self._interval_s):
            # A snapshot holds the shard for long: then there is no news this time.
            with suppress(CacheTimeoutError):
                self._report()

    def _report(self) -> None:
        for table, stats in self._service.stats(self._interval_s).tables.items():
            sizes = (stats.num_rows, stats.nbytes, stats.spilled_bytes)
            for gauge, size in zip(self._gauges.values(), sizes, strict=True):
                gauge.set(size, {"table": table})
        counters = self._service.counters
        for counter, now, before in zip(self._counters, counters, self._reported, strict=True):
            if now > before:
                counter.inc(now - before)
        self._reported = counters
