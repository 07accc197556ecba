"""Sampled negatives: uniform, distinct, never the target, the same for everybody."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt
import pytest

from felrec_dist.evaluation.negatives import (
    batch_generator,
    draw_with_replacement,
    draw_without_replacement,
)


def draw(num_seen: int, targets: list[int], num_negatives: int) -> npt.NDArray[np.int64]:
    return draw_without_replacement(
        batch_generator(0, 5), num_seen, np.array(targets, dtype=np.int64), num_negatives
    )


@pytest.mark.parametrize("num_seen", [0, 1, 2, 5, 6, 7, 8, 40])
@pytest.mark.parametrize("num_negatives", [1, 6])
def test_as_many_distinct_negatives_as_there_are(num_seen: int, num_negatives: int) -> None:
    """Targets inside and beyond the candidates; a small catalogue is taken whole."""
    targets = [*range(num_seen), num_seen, num_seen + 3] * 5
    drawn_BM = draw(num_seen, targets, num_negatives)
    assert drawn_BM.shape == (len(targets), num_negatives)
    for target, row_M in zip(targets, drawn_BM.tolist(), strict=True):
        pool = set(range(num_seen)) - {target}
        drawn = [item for item in row_M if item != -1]
        assert set(drawn) <= pool
        assert len(drawn) == len(set(drawn)) == min(num_negatives, len(pool))


@pytest.mark.parametrize("target", [0, 2, 5, 9])
def test_every_set_is_equally_likely(target: int) -> None:
    """Chi-square over all 3-subsets of the pool of a catalogue of 6."""
    num_seen, num_negatives, num_draws = 6, 3, 40_000
    drawn_BM = draw(num_seen, [target] * num_draws, num_negatives)
    pool = [item for item in range(num_seen) if item != target]
    frequency = Counter(tuple(sorted(row)) for row in drawn_BM.tolist())
    assert set(frequency) == set(combinations(pool, num_negatives))
    expected = num_draws / comb(len(pool), num_negatives)
    chi_square = sum((count - expected) ** 2 / expected for count in frequency.values())
    freedom = len(frequency) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_every_item_is_equally_likely_in_a_large_catalogue() -> None:
    num_seen, num_events, num_negatives = 300, 4000, 100
    drawn_BM = draw(num_seen, [7] * num_events, num_negatives)
    counts_I = np.bincount(drawn_BM.ravel(), minlength=num_seen)
    assert counts_I[7] == 0
    share = num_negatives / (num_seen - 1)
    deviation_I = (np.delete(counts_I, 7) - num_events * share) / np.sqrt(
        num_events * share * (1 - share)
    )
    assert np.abs(deviation_I).max() < 5
    assert deviation_I.std() == pytest.approx(1.0, abs=0.2)


def test_the_stream_follows_from_seed_and_position() -> None:
    targets = np.arange(4)

    def drawn(seed: int, position: int) -> list[list[int]]:
        generator = batch_generator(seed, position)
        rows: list[list[int]] = draw_without_replacement(generator, 500, targets, 10).tolist()
        return rows

    assert drawn(0, 5) == drawn(0, 5)
    assert drawn(0, 5) != drawn(0, 6)
    assert drawn(0, 5) != drawn(1, 5)


def test_with_replacement_repeats_and_targets_occur() -> None:
    drawn_BM = draw_with_replacement(batch_generator(0, 0), 5, 2000, 20)
    assert drawn_BM.shape == (2000, 20)
    counts_I = np.bincount(drawn_BM.ravel())
    deviation_I = (counts_I - 8000) / np.sqrt(40_000 * 0.2 * 0.8)
    assert len(counts_I) == 5
    assert np.abs(deviation_I).max() < 5


def test_no_events() -> None:
    assert draw(10, [], 3).shape == (0, 3)
