"""Which items an event's target is ranked among; negatives of HR@k come from the same set.

``growing``: the items seen before the batch, and the target. ``training``: the items of the
training part. It is for models that can represent no others; an event whose target is none of them
is not served. Either set is a prefix of the catalogue, which is in order of first appearance.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from felrec_dist.data.dataset import PreparedDataset

Candidates = Literal["growing", "training"]


def num_candidate_items(candidates: Candidates, dataset: PreparedDataset, num_seen: int) -> int:
    """Returns how many items of the catalogue, the first ones, are candidates.

    Args:
        num_seen: items seen so far; those of the training part are among them.
    """
    return dataset.num_train_items if candidates == "training" else num_seen


def is_served(
    candidates: Candidates, dataset: PreparedDataset, item_index: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Returns (n,): whether the set may hold these targets."""
    if candidates == "training":
        return item_index < dataset.num_train_items
    return np.ones(len(item_index), dtype=np.bool_)
