"""One pass over a span: what it scores, writes and leaves does not depend on what is asked."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from felrec_dist.data.dataset import Span
from felrec_dist.data.stream import EventStream
from felrec_dist.evaluation.candidate_set import Candidates
from felrec_dist.evaluation.counts import TIE_TOLERANCE, RankCounts
from felrec_dist.evaluation.evaluator import EvaluationConfig, Protocol
from felrec_dist.evaluation.negatives import batch_generator, draw_with_replacement
from felrec_dist.training.metrics import RunLog
from felrec_dist.training.trainer import Trainer
from tests import tiny
from tests.data.oracle import prepare_rows
from tests.invariants.test_causality import BATCH, build, random_rows


def trained(folder: Path) -> Trainer:
    folder.mkdir()
    dataset = prepare_rows(random_rows(1), folder, validation_fraction="0.2", test_fraction="0.2")
    trainer = build(dataset, str(folder / "run"), "felrec-q", "causal")
    trainer.train_epoch(0, RunLog(str(folder / "run"), is_writer=False))
    return trainer


def rows_of_all(trainer: Trainer, step: int) -> list[bytes]:
    dataset = trainer.dataset
    fetched = trainer.client.fetch(step, {"user": dataset.users.ids, "item": dataset.items.ids})
    return [fetched[side].rows.tobytes() for side in ("user", "item")]


def test_protocols_share_one_pass(tmp_path: Path) -> None:
    asked: tuple[tuple[Protocol, ...], ...] = (("causal", "released"), ("causal",), ("released",))
    counts: dict[Protocol, list[RankCounts]] = {"causal": [], "released": []}
    caches = []
    for protocols in asked:
        trainer = trained(tmp_path / "-".join(protocols))
        span = trainer.dataset.split.validation
        results, step = tiny.felrec_of(trainer).evaluator.evaluate(
            span, trainer.steps_per_epoch, protocols
        )
        assert tuple(results) == protocols
        assert step == trainer.steps_per_epoch + -(-len(span) // BATCH)
        caches.append(rows_of_all(trainer, step))
        for protocol, result in results.items():
            counts[protocol].append(result.counts)
    assert caches[0] == caches[1] == caches[2]
    for together, alone in counts.values():
        for field in fields(RankCounts):
            np.testing.assert_array_equal(
                getattr(together, field.name), getattr(alone, field.name), err_msg=field.name
            )


def test_released_has_all_items_up_to_the_end_of_the_batch(tmp_path: Path) -> None:
    """And its negatives, drawn with repeats, may hold the target, which then ties with itself."""
    trainer = trained(tmp_path / "data")
    dataset, span = trainer.dataset, trainer.dataset.split.validation
    results, _ = tiny.felrec_of(trainer).evaluator.evaluate(
        span, trainer.steps_per_epoch, ["causal", "released"]
    )
    released, causal = results["released"].counts, results["causal"].counts
    events = 0
    for batch, _ in EventStream(dataset, span, BATCH).batches():
        before = int((dataset.items.first_positions < int(batch.position[0])).sum())
        after = int((dataset.items.first_positions < int(batch.position[0]) + len(batch)).sum())
        negatives_BM = draw_with_replacement(
            batch_generator(0, int(batch.position[0])), after, len(batch), 5
        )
        for target, negatives in zip(batch.item_index, negatives_BM, strict=True):
            assert released.num_candidates[events] == after
            assert causal.num_candidates[events] == before + (target >= before)
            assert released.negatives_tied[events] >= (negatives == target).sum()
            events += 1
    assert events == len(span)
    assert (released.num_candidates != causal.num_candidates).any()


def test_among_training_items_no_other_item_counts(tmp_path: Path) -> None:
    """Against the cache as it is after the last batch, which is what ``released`` scores."""
    trainer = trained(tmp_path / "data")
    dataset, span = trainer.dataset, trainer.dataset.split.validation
    tiny.felrec_of(trainer).evaluator.config = EvaluationConfig(
        candidates="training", num_negatives=5, k=2
    )
    step = trainer.steps_per_epoch
    results, step = tiny.felrec_of(trainer).evaluator.evaluate(span, step, ["causal", "released"])
    causal, released = results["causal"], results["released"]
    *_, (batch, _) = EventStream(dataset, span, BATCH).batches()
    num_train = dataset.num_train_items
    assert num_train < len(dataset.items)
    user_ids, user_of_event = np.unique(batch.user, return_inverse=True)
    rows = trainer.client.fetch(step, {"user": user_ids, "item": dataset.items.ids})
    users_BD = F.normalize(torch.from_numpy(rows["user"].rows)[user_of_event])
    items_ID = F.normalize(torch.from_numpy(rows["item"].rows))  # zero where there is none
    scores_BI = users_BD @ items_ID[:num_train].T
    generator = batch_generator(0, int(batch.position[0]))
    negatives_BM = draw_with_replacement(generator, num_train, len(batch), num_negatives=5)
    num_checked = 0
    first = len(span) - len(batch)
    for row, target in enumerate(batch.item_index.tolist()):
        event = first + row
        assert causal.is_served[event] == released.is_served[event] == (target < num_train)
        if target < num_train:
            num_checked += 1
            assert causal.counts.num_candidates[event] == num_train
            assert released.counts.num_candidates[event] == num_train
            above_I = scores_BI[row] > scores_BI[row, target] + TIE_TOLERANCE[scores_BI.dtype]
            assert released.counts.above[event] == int(above_I.sum())
            assert released.counts.negatives_above[event] == int(above_I[negatives_BM[row]].sum())
    assert 0 < num_checked < len(batch)


@pytest.mark.parametrize("candidates", ["growing", "training"])
def test_the_negatives_are_from_the_set_of_candidates(
    candidates: Candidates, tmp_path: Path
) -> None:
    """Asked for more than there are, they are all of them, and the counts those of the ranks."""
    trainer = trained(tmp_path / "data")
    split = trainer.dataset.split
    span = Span(split.validation.start, split.test.stop)
    evaluator = tiny.felrec_of(trainer).evaluator
    evaluator.config = EvaluationConfig(candidates=candidates, num_negatives=100)
    results, _ = evaluator.evaluate(span, trainer.steps_per_epoch, ["causal"])
    result = results["causal"]
    counts, is_served = result.counts, result.is_served
    assert counts.num_candidates.max() < 100
    assert is_served.sum() > BATCH
    np.testing.assert_array_equal(counts.negatives_above[is_served], counts.above[is_served])
    np.testing.assert_array_equal(counts.negatives_tied[is_served], counts.tied[is_served])


def test_the_model_goes_on_in_the_mode_it_was_in(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "data")
    assert tiny.felrec_of(trainer).model.training
    before = {
        name: value.clone() for name, value in tiny.felrec_of(trainer).model.state_dict().items()
    }

    def interrupt(num_events: int) -> None:
        assert num_events == BATCH
        assert not tiny.felrec_of(trainer).model.training
        raise KeyboardInterrupt("stopped by hand")

    span = trainer.dataset.split.validation
    with pytest.raises(KeyboardInterrupt, match="stopped by hand"):
        tiny.felrec_of(trainer).evaluator.evaluate(
            span, trainer.steps_per_epoch, on_batch=interrupt
        )
    assert tiny.felrec_of(trainer).model.training
    for name, value in tiny.felrec_of(trainer).model.state_dict().items():
        assert bool((value == before[name]).all()), f"evaluation changed {name}"
