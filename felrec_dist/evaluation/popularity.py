"""How popular what a model recommends is: the items of the first places of each event's list.

Lists are those of the events served, among the candidates that the model ranks; a target that was
not seen before is in none. Popularity is the number of events in the training part, whose items
make ten groups of equal size, the most popular first; items that came later are a group apart.

Shape legend: B events of a batch, k length of the lists, I items of the catalogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.evaluation.candidate_set import Candidates, num_candidate_items

Int64s = npt.NDArray[np.int64]
NUM_GROUPS = 10


@dataclass
class Exposure:
    """Counts in how many lists each item is.

    Attributes:
        k: length of the lists.
        counts_I: by catalogue row.
        num_lists: so far.
    """

    k: int
    counts_I: Int64s
    num_lists: int = 0

    @classmethod
    def of_none(cls, dataset: PreparedDataset, k: int) -> Exposure:
        return cls(k, np.zeros(len(dataset.items), dtype=np.int64))

    def add(self, items_Bk: Int64s, is_served_B: npt.NDArray[np.bool_]) -> None:
        """Takes the lists of a batch: catalogue rows, -1 for none."""
        items = items_Bk[is_served_B]
        self.counts_I += np.bincount(items[items >= 0], minlength=len(self.counts_I))
        self.num_lists += len(items)

    def to_json(
        self, dataset: PreparedDataset, candidates: Candidates, num_seen: int
    ) -> dict[str, Any]:
        """Returns k, number of lists, shares by group, Gini coefficient and coverage.

        Args:
            dataset: tells the popularity.
            candidates, num_seen: what could be recommended by the end.
        """
        total = max(1, int(self.counts_I.sum()))
        num_train = dataset.num_train_items
        train_counts = dataset.items.train_counts[:num_train]
        # Equally popular items are in the order of the catalogue.
        groups = np.array_split(np.argsort(-train_counts, kind="stable"), NUM_GROUPS)
        num_items = num_candidate_items(candidates, dataset, num_seen)
        counts = self.counts_I[:num_items]
        return {
            "k": self.k,
            "num_lists": self.num_lists,
            "num_items": num_items,
            "deciles": [float(self.counts_I[group].sum() / total) for group in groups],
            "new_items": float(self.counts_I[num_train:].sum() / total),
            "gini": gini(counts),
            "coverage": float((counts > 0).mean()),
        }


def gini(counts: Int64s) -> float:
    """Returns the Gini coefficient: 0 if all items are in equally many lists, towards 1 if few are
    in all.
    """
    num_items, total = len(counts), counts.sum()
    if not total:
        return 0.0
    places = np.arange(1, num_items + 1)
    weighted = float((places * np.sort(counts)).sum())
    return 2.0 * weighted / (num_items * float(total)) - (num_items + 1) / num_items
