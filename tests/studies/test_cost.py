"""The cost model finds the constants of a machine that is known, and counts as one does by hand."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from felrec_dist.errors import InputError
from felrec_dist.studies.cost import Constants, CostModel, Curve, Layout, Workload, calibrate, check
from felrec_dist.training.hot_tier import SMALLEST_RESERVE
from tests.studies.cells import GATHERED_BYTES, KEY_BYTES, ROW_BYTES, TRUTH, figures

MEASURED = {
    "plain": figures(),
    "larger batch": figures(batch_size=1024),
    "smaller batch": figures(batch_size=256),
    "more shards": figures(num_shards=3),
    "all resident": figures(hot_rows=500_000),
    "half resident": figures(hot_rows=250_000, cache_rows=1_000_000),
    "small cache": figures(cache_rows=1000, num_shards=2),
    "two workers": figures(num_workers=2),
    "four workers": figures(num_workers=4, batch_size=4096),
}


def test_constants_of_a_known_machine_are_found() -> None:
    model = calibrate(list(MEASURED.values()))
    assert asdict(model.constants) == pytest.approx(asdict(TRUTH), rel=1e-6)
    workload = model.workload
    assert workload.rows_per_event(1024) == pytest.approx(3.0)
    assert workload.written_per_event(10**6) == pytest.approx(1.5)
    assert workload.gathered_bytes == pytest.approx(GATHERED_BYTES)
    assert workload.row_bytes == pytest.approx(ROW_BYTES + KEY_BYTES)
    shares = [workload.miss_share(share) for share in (0.0, 0.1, 0.5, 0.75, 1.0)]
    assert shares == pytest.approx([1.0, 0.9, 0.5, 0.25, 0.0])


def test_cells_that_were_left_out_are_predicted() -> None:
    # Of one worker: its collectives cost nothing, whatever the others say of them.
    alone = {name: cell for name, cell in MEASURED.items() if cell.num_workers == 1}
    checks = check(alone)
    assert [one.name for one in checks] == list(alone)
    for one in checks:
        assert one.measured_s == alone[one.name].step_s
        assert one.error == pytest.approx(0.0, abs=1e-6), one.name
    plain = MEASURED["plain"]
    twice = {phase: 2 * seconds for phase, seconds in plain.phase_s.items()}
    slow = replace(plain, events_per_s=plain.events_per_s / 2, phase_s=twice)
    [found] = [one for one in check({**alone, "plain": slow}) if one.name == "plain"]
    assert found.error == pytest.approx(-0.5)
    assert check({"a": figures(), "b": figures()}) == []


def test_a_block_that_is_not_full_is_no_rows_memory() -> None:
    small = figures(cache_rows=10, cache_bytes=1_000_000)
    assert calibrate([small, figures()]).constants.cache_row_bytes == pytest.approx(160.0)


def test_nothing_negative_is_fitted() -> None:
    """A larger batch that took less time is noise, not a machine that gives time back."""
    fast = figures(batch_size=1024)
    fast = replace(fast, phase_s={**fast.phase_s, "encode": 1e-3, "backward": 1e-3})
    constants = calibrate([figures(), fast]).constants
    assert constants.compute_event_s == 0.0
    assert constants.compute_step_s > 0.0
    assert min(asdict(constants).values()) >= 0.0


def test_no_cell_no_model() -> None:
    with pytest.raises(InputError, match=r"nothing to fit(.*\n)*.*one finished cell"):
        calibrate([])


WORKLOAD = Workload(
    rows_per_event=Curve((128.0,), (2.0,)),
    miss_share=Curve((0.0, 1.0), (1.0, 0.0)),
    written_per_event=Curve((512.0,), (1.0,)),
    gathered_bytes=100.0,
    gradient_bytes=1_000.0,
    row_bytes=10.0,
)
NOTHING = Constants(**dict.fromkeys(asdict(TRUTH), 0.0))


@pytest.mark.parametrize(
    ("constants", "step_s", "limit"),
    [
        # 4 workers, 2 shards, B = 512, b = 128, u = 256, m = 64, 512 rows written.
        ({"compute_step_s": 1.0, "compute_event_s": 0.25}, 1 + 128 / 4, "compute"),
        ({"hot_row_s": 0.5}, 128.0, "reading the hot tier"),
        ({"write_back_step_s": 2.0}, 2.0, "writing the batch to the hot tier"),
        ({"write_back_event_s": 0.5}, 256.0, "writing the batch to the hot tier"),
        ({"latency_s": 1.0}, 5 * 2.0, "collectives"),
        ({"network_byte_s": 1.0}, 3 / 4 * (512 * 100 + 2 * 1000), "collectives"),
        ({"read_event_s": 1.0}, 512.0, "reading the batch"),
        ({"history_event_s": 1.0}, 128.0, "cutting histories"),
        ({"plan_row_s": 1.0}, 256.0, "finding rows"),
        ({"call_s": 1.0}, 1.0, "fetching"),
        # Four fetches and a write keep a shard busy for longer than one worker waits.
        ({"message_s": 1.0}, 5.0, "serving rows"),
        # A shard serves half of 4 * 64 read and 512 written rows; two writers send 256 each.
        ({"fetch_byte_s": 1.0}, (4 * 64 + 512) / 2 * 10, "serving rows"),
    ],
)
def test_every_term_as_by_hand(constants: dict[str, float], step_s: float, limit: str) -> None:
    model = CostModel(NOTHING, WORKLOAD).assuming(constants)
    layout = Layout(4, 2, 512, 150_000 - SMALLEST_RESERVE, cache_rows=400_000, cores=1000)
    prediction = model.predict(layout)
    assert prediction.step_s == pytest.approx(step_s)
    assert prediction.events_per_s == pytest.approx(512 / step_s)
    assert prediction.limit.partition(": ")[2] == limit
    # On fewer cores than there is work, the work takes its time.
    busy_s = (
        sum(sum(prediction.terms_s[kind].values()) for kind in ("trainer", "loader", "writer"))
        - prediction.terms_s["trainer"]["collectives"]
    )
    on_one = model.predict(replace(layout, cores=1))
    assert on_one.step_s == pytest.approx(max(step_s, 4 * busy_s))


def test_memory_and_checkpoint_as_by_hand() -> None:
    model = CostModel(NOTHING, WORKLOAD).assuming(
        {"cache_row_bytes": 200.0, "checkpoint_s": 3.0, "checkpoint_byte_s": 1e-9}
    )
    prediction = model.predict(Layout(64, 16, 512, 0, 10**10, cores=768, num_nodes=8))
    assert prediction.shard_memory_bytes == 200.0 * 10**10 / 8
    assert prediction.checkpoint_s == pytest.approx(3.0 + 200.0 * 10 / 16)


def test_what_is_assumed_replaces_what_was_measured() -> None:
    model = CostModel(TRUTH, WORKLOAD).assuming({"latency_s": 7.0})
    assert model.constants == replace(TRUTH, latency_s=7.0)
    assert model.workload == WORKLOAD
