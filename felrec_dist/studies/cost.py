"""What a training step costs on any number of workers, shards and rows: constants that a study
measures, and the equations between them.

W workers take slices of b = B / W events. A step reads u = rows_per_event(b) * b distinct rows on
each of them, of which m = miss(hot rows / rows of the cache) * u come from the S shards. Four kinds
of threads work beside each other, and the slowest sets the pace (seconds)::

    trainer    compute        step + b * event
               hot tier       u * row, and write_back_step + B * write_back_event: every rank sees
                              all write-backs
               collectives    5 log2(W) * latency + (W - 1) / W * (B * g + 2 * G) / bandwidth
    loader     reading        B * read_event: every rank cuts the same batches; b * history_event
               finding rows   u * plan_row, in the hot tier's index
               fetch          call + S * message + m * row_bytes / fetch_bandwidth
    writer     write           S / W * message + written_bytes / W / fetch_bandwidth
    shard      serve          (W + 1) * message: a fetch of each worker and the step's write;
                              (W * m + written) * row_bytes / S / fetch_bandwidth
    processors                (trainer without collectives + loader + writer) * W / cores

    step = the largest of these five

g is what an event adds to the all-gather of representations and projections, G the gradient: a
collective takes log2(W) rounds and moves (W - 1) / W of its bytes, an all-reduce both twice; beside
these two, FELRec-Q's heads gather the statistics of two BatchNorms, forward and backward. What they
cost is what steps of several workers take longer than their slice does on one. The
processors count because a shard, a loader or another worker may share a core with the trainer.

Memory: rows * cache_row_bytes / nodes; shards are spread over the nodes. A checkpoint: the shards
write side by side, checkpoint + rows * cache_row_bytes / min(S, cores) / checkpoint_bandwidth.

What it leaves out: imbalance between ranks and between shards, links that others share, collectives
that hide behind the backward pass, page faults of a growing cache. What depends on the data
(distinct rows of a slice, misses) is interpolated between measurements, and held beyond them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from felrec_dist.errors import InputError
from felrec_dist.studies.figures import CellFigures
from felrec_dist.training.hot_tier import SMALLEST_RESERVE

NUM_SIDES = 2
COLLECTIVES_A_STEP = 5  # an all-gather, an all-reduce that counts twice, two of BatchNorms


@dataclass(frozen=True)
class Constants:
    """What a machine and a model need; times in seconds, bandwidths inverted: seconds a byte.

    Attributes:
        compute_step_s, compute_event_s: encode, backward and optimizer.
        hot_row_s: to bring a distinct row to the encoder.
        write_back_step_s, write_back_event_s: to take a batch's rows into the hot tier.
        read_event_s: to read an event of the batch.
        history_event_s: to cut the histories of an event of the slice.
        plan_row_s: to look for a distinct row in the hot tier.
        call_s, message_s: of a fetch; of each message to a shard.
        fetch_byte_s: a byte from or to a shard.
        latency_s, network_byte_s: of a round of a collective; a byte between ranks.
        cache_row_bytes: memory of a row with key, version and index.
        checkpoint_s, checkpoint_byte_s: of a checkpoint; a byte of a shard.
    """

    compute_step_s: float
    compute_event_s: float
    hot_row_s: float
    write_back_step_s: float
    write_back_event_s: float
    read_event_s: float
    history_event_s: float
    plan_row_s: float
    call_s: float
    message_s: float
    fetch_byte_s: float
    latency_s: float
    network_byte_s: float
    cache_row_bytes: float
    checkpoint_s: float
    checkpoint_byte_s: float


@dataclass(frozen=True)
class Curve:
    """A measured function: linear between its points, held beyond them.

    Attributes:
        xs: increasing.
        ys: at each of them.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]

    def __call__(self, x: float) -> float:
        return float(np.interp(x, self.xs, self.ys))

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Curve:
        """Returns the medians of the points that have one x."""
        by_x: dict[float, list[float]] = {}
        for x, y in points:
            by_x.setdefault(x, []).append(y)
        xs = sorted(by_x)
        return cls(tuple(xs), tuple(float(np.median(by_x[x])) for x in xs))


@dataclass(frozen=True)
class Workload:
    """What the data and the model ask for, as measured.

    Attributes:
        rows_per_event: distinct rows that a slice reads for each of its events, by its events.
        miss_share: of the distinct rows that had to be fetched, by the hot tier's share of the
            rows of its side.
        written_per_event: rows written for each event of a batch, by its events.
        gathered_bytes: what an event adds to the all-gather.
        gradient_bytes: what an all-reduce averages.
        row_bytes: of a fetched row, with its key.
    """

    rows_per_event: Curve
    miss_share: Curve
    written_per_event: Curve
    gathered_bytes: float
    gradient_bytes: float
    row_bytes: float


@dataclass(frozen=True)
class Layout:
    """A run to predict.

    Attributes:
        num_workers, num_shards, batch_size: W, S, B.
        hot_rows: of each side.
        cache_rows: both sides together.
        cores: of all nodes.
        num_nodes: that the shards are spread over.
    """

    num_workers: int
    num_shards: int
    batch_size: int
    hot_rows: int
    cache_rows: int
    cores: int
    num_nodes: int = 1


@dataclass(frozen=True)
class Prediction:
    """What the model says of a layout.

    Attributes:
        layout: the run.
        terms_s: seconds of a step, for each of the five by what takes them.
        shard_memory_bytes: of the cache, on each node.
        checkpoint_s: seconds that all ranks stand still.
    """

    layout: Layout
    terms_s: Mapping[str, Mapping[str, float]]
    shard_memory_bytes: float
    checkpoint_s: float

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return max(sum(terms.values()) for terms in self.terms_s.values())

    @property
    def events_per_s(self) -> float:
        """Of all workers."""
        return self.layout.batch_size / self.step_s

    @property
    def limit(self) -> str:
        """What binds: the slowest of the five, and what takes most of its time."""
        kind = max(self.terms_s, key=lambda kind: sum(self.terms_s[kind].values()))
        terms = self.terms_s[kind]
        return f"{kind}: {max(terms, key=lambda name: terms[name])}"


@dataclass(frozen=True)
class CostModel:
    """The equations with their constants."""

    constants: Constants
    workload: Workload

    def assuming(self, assumed: Mapping[str, float]) -> CostModel:
        """Returns the model of another machine: constants by name, the others as measured."""
        return replace(self, constants=Constants(**{**asdict(self.constants), **assumed}))

    def predict(self, layout: Layout) -> Prediction:
        """Returns what a layout costs."""
        c, w = self.constants, self.workload
        num_workers, num_shards = layout.num_workers, layout.num_shards
        slice_events = layout.batch_size / num_workers
        read_rows = w.rows_per_event(slice_events) * slice_events
        hot_share = _hot_share(layout.hot_rows, layout.cache_rows)
        missed_rows = read_rows * w.miss_share(hot_share)
        written_rows = w.written_per_event(layout.batch_size) * layout.batch_size
        rounds = math.log2(num_workers)
        between = (num_workers - 1) / num_workers
        moved_bytes = layout.batch_size * w.gathered_bytes + 2 * w.gradient_bytes
        trainer = {
            "compute": c.compute_step_s + slice_events * c.compute_event_s,
            "reading the hot tier": read_rows * c.hot_row_s,
            "writing the batch to the hot tier": c.write_back_step_s
            + layout.batch_size * c.write_back_event_s,
        }
        collectives = (
            COLLECTIVES_A_STEP * rounds * c.latency_s + between * moved_bytes * c.network_byte_s
        )
        loader = {
            "reading the batch": layout.batch_size * c.read_event_s,
            "cutting histories": slice_events * c.history_event_s,
            "finding rows": read_rows * c.plan_row_s,
            "fetching": (c.call_s + num_shards * c.message_s) * bool(missed_rows)
            + missed_rows * w.row_bytes * c.fetch_byte_s,
        }
        writer = {
            "sending rows": max(1.0, num_shards / num_workers) * c.message_s
            + written_rows / min(num_workers, num_shards) * w.row_bytes * c.fetch_byte_s
        }
        served_rows = num_workers * missed_rows + written_rows
        shard = {
            "serving rows": (num_workers * bool(missed_rows) + 1) * c.message_s
            + served_rows / num_shards * w.row_bytes * c.fetch_byte_s
        }
        busy = {**trainer, **loader, **writer}
        cache_bytes = layout.cache_rows * c.cache_row_bytes
        return Prediction(
            layout,
            {
                "trainer": {**trainer, "collectives": collectives},
                "loader": loader,
                "writer": writer,
                "shard": shard,
                "processors": {
                    name: seconds * num_workers / layout.cores for name, seconds in busy.items()
                },
            },
            shard_memory_bytes=cache_bytes / layout.num_nodes,
            checkpoint_s=c.checkpoint_s
            + cache_bytes / min(num_shards, layout.cores) * c.checkpoint_byte_s,
        )


@dataclass(frozen=True)
class Check:
    """A cell that was run, and what the model of the other cells says of it."""

    name: str
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Relative: 0.1 is a step predicted 10 % too long."""
        return self.predicted_s / self.measured_s - 1.0


def calibrate(cells: Sequence[CellFigures]) -> CostModel:
    """Fits the constants to measured cells, each cell's relative error counting alike.

    What a worker does on its own is fitted to the cells with the fewest workers, where the least
    else uses the machine; collectives to those with two or more.

    Raises:
        InputError: there is no cell.
    """
    if not cells:
        raise InputError(
            "there is nothing to fit the cost model to",
            expected="one finished cell at least",
            remedy="look at what the cells failed with",
        )
    fewest = min(cell.num_workers for cell in cells)
    alone = [cell for cell in cells if cell.num_workers == fewest]
    together = [cell for cell in cells if cell.num_workers > 1]
    compute_step_s, compute_event_s = _fit(
        [
            (cell.phase_s["encode"] + cell.phase_s["backward"], 1.0, cell.slice_events)
            for cell in alone
        ]
    )
    [hot_row_s] = _fit([(cell.phase_s["rows"], _read_rows(cell)) for cell in alone])
    write_back_step_s, write_back_event_s = _fit(
        [(cell.phase_s["write_back"], 1.0, cell.batch_size) for cell in alone]
    )
    [read_event_s] = _fit([(cell.loader_s["data"], cell.batch_size) for cell in alone])
    [history_event_s] = _fit([(cell.loader_s["histories"], cell.slice_events) for cell in alone])
    [plan_row_s] = _fit(
        [(max(0.0, cell.loader_s["fetch"] - cell.fetch_wait_s), _read_rows(cell)) for cell in alone]
    )
    call_s, message_s, fetch_byte_s = _fit(
        [
            (
                cell.fetch_wait_s,
                1.0,
                cell.fetch_messages / cell.num_workers,
                cell.fetched_bytes / cell.num_workers,
            )
            for cell in alone
            if cell.fetched_rows
        ]
        or [(0.0, 1.0, 0.0, 0.0)]
    )
    latency_s, network_byte_s = _fit(
        [
            (
                # Most of them wait within the encoder's passes.
                cell.phase_s["exchange"]
                + max(
                    0.0,
                    cell.phase_s["encode"]
                    + cell.phase_s["backward"]
                    - compute_step_s
                    - cell.slice_events * compute_event_s,
                ),
                COLLECTIVES_A_STEP * math.log2(cell.num_workers),
                cell.gathered_bytes / cell.num_workers
                + 2 * (cell.num_workers - 1) / cell.num_workers * cell.gradient_bytes,
            )
            for cell in together
        ]
        or [(0.0, 1.0, 0.0)]
    )
    checkpoint_s, checkpoint_byte_s = _fit(
        [
            (cell.checkpoint_s, 1.0, cell.cache_bytes / min(cell.num_shards, cell.cores))
            for cell in cells
        ]
    )
    constants = Constants(
        compute_step_s=compute_step_s,
        compute_event_s=compute_event_s,
        hot_row_s=hot_row_s,
        write_back_step_s=write_back_step_s,
        write_back_event_s=write_back_event_s,
        read_event_s=read_event_s,
        history_event_s=history_event_s,
        plan_row_s=plan_row_s,
        call_s=call_s,
        message_s=message_s,
        fetch_byte_s=fetch_byte_s,
        latency_s=latency_s,
        network_byte_s=network_byte_s,
        # A cache grows by blocks: a small one is mostly a block that is not full.
        cache_row_bytes=min(cell.cache_bytes / max(1, cell.cache_rows) for cell in cells),
        checkpoint_s=checkpoint_s,
        checkpoint_byte_s=checkpoint_byte_s,
    )
    return CostModel(constants, _workload(cells))


def check(cells: Mapping[str, CellFigures]) -> list[Check]:
    """Predicts every cell from all the others; none where there are fewer than three.

    Args:
        cells: by name.
    """
    if len(cells) < 3:
        return []
    checks = []
    for name, cell in cells.items():
        others = [other for other_name, other in cells.items() if other_name != name]
        predicted = calibrate(others).predict(layout_of(cell))
        checks.append(Check(name, cell.step_s, predicted.step_s))
    return checks


def layout_of(cell: CellFigures) -> Layout:
    """Returns the layout of a cell that was run."""
    return Layout(
        num_workers=cell.num_workers,
        num_shards=cell.num_shards,
        batch_size=cell.batch_size,
        hot_rows=cell.hot_rows,
        cache_rows=cell.cache_rows,
        cores=cell.cores,
    )


def _workload(cells: Sequence[CellFigures]) -> Workload:
    points = [(_hot_share(c.hot_rows, c.cache_rows), 1.0 - c.hit_rate) for c in cells]
    # Nothing is resident in a hot tier that is nothing to its cache.
    misses = Curve.of([*points, (0.0, 1.0)])
    sent = [c.fetched_bytes / c.fetched_rows for c in cells if c.fetched_rows]
    row_bytes = float(np.median(sent or [c.row_bytes for c in cells]))
    received = [
        cell.gathered_bytes / (cell.num_workers - 1) / cell.batch_size
        for cell in cells
        if cell.num_workers > 1
    ]
    return Workload(
        rows_per_event=Curve.of([(c.slice_events, _read_rows(c) / c.slice_events) for c in cells]),
        # More room never misses more, whatever the noise.
        miss_share=Curve(misses.xs, tuple(np.minimum.accumulate(misses.ys).tolist())),
        written_per_event=Curve.of([(c.batch_size, c.written_rows / c.batch_size) for c in cells]),
        # One worker gathers nothing; two send a representation and a projection of either side.
        gathered_bytes=float(np.median(received)) if received else 2.0 * NUM_SIDES * row_bytes,
        gradient_bytes=float(max(cell.gradient_bytes for cell in cells)),
        row_bytes=row_bytes,
    )


def _hot_share(hot_rows: int, cache_rows: int) -> float:
    """The hot tiers' share of the rows; a tier has some slots beside its capacity."""
    return min(1.0, NUM_SIDES * (hot_rows + SMALLEST_RESERVE) / max(1, cache_rows))


def _read_rows(cell: CellFigures) -> float:
    """Distinct rows that a rank reads in a step."""
    return cell.read_rows / cell.num_workers


def _fit(rows: Sequence[tuple[float, ...]]) -> list[float]:
    """Least squares of relative errors without negative constants.

    Args:
        rows: of each measurement its value, then what each constant is multiplied with.
    """
    table = np.array(rows, dtype=np.float64)
    weights = 1.0 / np.maximum(table[:, 0], 1e-9)
    values, factors = table[:, 0] * weights, table[:, 1:] * weights[:, None]
    # Factors of a kind are counts or bytes: scaled, so that none drowns in rounding.
    scales = np.maximum(np.abs(factors).max(axis=0), 1e-30)
    chosen = np.flatnonzero(np.abs(factors).max(axis=0) > 0.0)
    constants = np.zeros(factors.shape[1])
    while len(chosen):
        found, *_ = np.linalg.lstsq(factors[:, chosen] / scales[chosen], values, rcond=1e-8)
        if (found >= 0.0).all():
            constants[chosen] = found / scales[chosen]
            break
        chosen = np.delete(chosen, int(found.argmin()))
    fitted: list[float] = constants.tolist()
    return fitted
