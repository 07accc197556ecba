"""The sampled negatives of HR@k: one seeded stream, the same for any number of ranks, any model.

Shape legend: B events, M negatives.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


def batch_generator(seed: int, first_position: int) -> np.random.Generator:
    """Returns the random stream of the batch that begins at a position."""
    return np.random.default_rng([seed, first_position])


def draw_without_replacement(
    generator: np.random.Generator, num_seen: int | Int64s, targets_B: Int64s, num_negatives: int
) -> Int64s:
    """Returns (B, M) catalogue rows, distinct within an event and never its target.

    -1 stands where there are too few items.

    Floyd's algorithm (Bentley & Floyd, 1987), run for all events at once: uniform, and M draws an
    event however small the catalogue is.

    Args:
        generator: the batch's random stream.
        num_seen: rows 0..num_seen - 1 of the catalogue are candidates; one number, or (B,).
        targets_B: each event's catalogue row, possibly beyond the candidates.
        num_negatives: M.
    """
    num_events = len(targets_B)
    pool_B = num_seen - (targets_B < num_seen)
    drawn_BM = np.full((num_events, num_negatives), -1, dtype=np.int64)
    for m in range(num_negatives):
        # The m-th of M draws from a pool of P looks at its first P - M + m + 1 members.
        last_B = pool_B - num_negatives + m
        # A pool of fewer than M members is taken whole: its first draws are left out.
        is_drawn_B = last_B >= 0
        choice_B = generator.integers(0, np.maximum(last_B, 0) + 1)
        is_repeated_B = (drawn_BM[:, :m] == choice_B[:, None]).any(axis=1)
        choice_B = np.where(is_repeated_B, last_B, choice_B)
        drawn_BM[:, m] = np.where(is_drawn_B, choice_B, -1)
    # The pool is the candidates without the target: rows from the target on move up by one, which
    # are none where the target lies beyond the candidates.
    drawn_BM += drawn_BM >= targets_B[:, None]
    return drawn_BM


def draw_with_replacement(
    generator: np.random.Generator, num_seen: int | Int64s, num_events: int, num_negatives: int
) -> Int64s:
    """Returns (B, M) catalogue rows; repeats and the target may occur (``released``).

    Args:
        num_seen: of ``draw_without_replacement``; an event without candidates gets row 0.
    """
    stop = num_seen if isinstance(num_seen, int) else np.maximum(num_seen, 1)[:, None]
    return generator.integers(0, stop, size=(num_events, num_negatives))
