"""What a checkpoint's cache holds, to be looked at: a map of users and items, and the similarities
around one interaction.

Users and items lie in one space, in which a model scores a pair by the cosine. All vectors are
those of the cache as the test found it.

Shape legend: M users and items of the map, R rows and C columns of the similarities, N history
length, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache_server.contents import snapshot_rows
from felrec_dist.data.dataset import Catalogue, PreparedDataset
from felrec_dist.data.histories import HistoryReader
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.errors import InputError
from felrec_dist.reporting.runs import Run
from felrec_dist.training.representations import ITEM, USER

Floats = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

MAPPED = 500
"""Users, and as many items, on a map: more hide one another on a phone."""
SHOWN_SLOTS = 24
"""Of a history, the most recent ones."""

_SEED = 0
_PERPLEXITY = 30.0
_FEWEST = 10
_READ_EVENTS = 65_536


@dataclass(frozen=True)
class Map:
    """Users and items in the plane, near where their vectors point the same way.

    Attributes:
        places_M2: float64.
        is_user_M: bool; the others are items.
        num_events_M: int64, events of each before the test.
    """

    places_M2: Floats
    is_user_M: npt.NDArray[np.bool_]
    num_events_M: Int64s


@dataclass(frozen=True)
class Similarities:
    """Around one interaction, the cosine of every item of the user with every user of the item.

    Attributes:
        cosines_RC: float64. Rows are the user's items before it, oldest first, then its own item;
            columns the item's users before it, oldest first, then its own user. The last of the
            last row is the interaction itself. NaN where the cache holds no vector.
        event_id: of the interaction.
        user, item: their names, or their ids where these are numbers.
    """

    cosines_RC: Floats
    event_id: int
    user: str
    item: str


def read_map(run: Run, dataset: PreparedDataset) -> Map:
    """Returns t-SNE of up to ``MAPPED`` users and as many items, drawn evenly from those that occur
    before the test; users and items are placed together.

    Raises:
        InputError: there are too few to place.
        CheckpointError, SnapshotError, DatasetError, StorageError: a file cannot be read.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    generator = np.random.default_rng(_SEED)
    indices, counts = {}, {}
    for side, catalogue in ((USER, dataset.users), (ITEM, dataset.items)):
        counts[side] = catalogue.train_counts + catalogue.validation_counts
        known = np.flatnonzero(counts[side])
        drawn = generator.choice(known, min(MAPPED, len(known)), replace=False)
        indices[side] = np.sort(drawn)
    units, found = _unit_rows(
        run, {USER: dataset.users.ids[indices[USER]], ITEM: dataset.items.ids[indices[ITEM]]}
    )
    units_MD = np.concatenate([units[side][found[side]] for side in (USER, ITEM)])
    if len(units_MD) < _FEWEST:
        raise InputError(
            "the cache holds too little for a map",
            where=run.url,
            got=f"{len(units_MD)} users and items",
            expected=f"{_FEWEST} or more",
        )
    tsne = TSNE(
        metric="cosine",
        init="pca",
        perplexity=min(_PERPLEXITY, (len(units_MD) - 1) / 3),
        random_state=_SEED,
    )
    # Its threads wait for one another without sleeping: ten times slower where cores are shared.
    with threadpool_limits(1):
        places_M2 = np.asarray(tsne.fit_transform(units_MD), np.float64)
    return Map(
        places_M2,
        np.repeat([True, False], [int(found[side].sum()) for side in (USER, ITEM)]),
        np.concatenate([counts[side][indices[side][found[side]]] for side in (USER, ITEM)]),
    )


def read_similarities(run: Run, dataset: PreparedDataset, event_id: int | None) -> Similarities:
    """Returns the similarities around an event of the test part.

    Args:
        run: a FELRec.
        dataset: of its test.
        event_id: None for the first event with full histories on both sides, or else that with the
            longest ones.

    Raises:
        InputError: there is no such event in the test part.
        CheckpointError, SnapshotError, DatasetError, StorageError: a file cannot be read.
    """
    assert run.config is not None
    num_slots = min(SHOWN_SLOTS, run.config.felrec.encoder.history_length)
    event = _event(dataset, event_id, num_slots)
    items, users = HistoryReader(dataset, num_slots).read(event)
    # Slot 0 is the most recent one.
    item_keys = np.append(items.ids_BN[0, : items.lengths_B[0]][::-1], event.item)
    user_keys = np.append(users.ids_BN[0, : users.lengths_B[0]][::-1], event.user)
    units, found = _unit_rows(run, {USER: user_keys, ITEM: item_keys})
    cosines_RC = units[ITEM] @ units[USER].T
    cosines_RC[~found[ITEM]] = np.nan
    cosines_RC[:, ~found[USER]] = np.nan
    return Similarities(
        cosines_RC,
        int(event.event_id[0]),
        _name(dataset.users, int(event.user_index[0])),
        _name(dataset.items, int(event.item_index[0])),
    )


def _unit_rows(
    run: Run, keys: Mapping[str, Int64s]
) -> tuple[dict[str, Floats], dict[str, npt.NDArray[np.bool_]]]:
    """Returns unit vectors (M, D) by side, zeros where the cache has none, and where it has one."""
    assert run.config is not None
    checkpoint = run.checkpoint()
    if checkpoint.dataset_digest != run.report.dataset_digest:
        raise InputError(
            "the test began with another cache than the checkpoint's",
            where=checkpoint.url,
            got=f"data set {checkpoint.dataset_digest[:16]}",
            expected=run.report.dataset_digest[:16],
        )
    tables = run.config.cache_tables()
    rows = snapshot_rows(checkpoint.cache_prefix, checkpoint.chain.parts, tables, keys)
    units = {}
    for side, fetched in rows.items():
        vectors_MD = fetched.rows.astype(np.float64)
        lengths_M1 = np.linalg.norm(vectors_MD, axis=1, keepdims=True)
        units[side] = vectors_MD / np.maximum(lengths_M1, 1e-12)
    return units, {side: fetched.found for side, fetched in rows.items()}


def _event(dataset: PreparedDataset, event_id: int | None, num_slots: int) -> EventBatch:
    """Returns a batch of one."""
    best: EventBatch | None = None
    fewest_of_best = -1
    for batch, _ in EventStream(dataset, dataset.split.test, _READ_EVENTS).batches():
        if event_id is not None:
            found = np.flatnonzero(batch.event_id == event_id)
            if len(found):
                return batch.take(found[:1])
            continue
        fewest = np.minimum(np.minimum(batch.user_length, batch.item_length), num_slots)
        place = int(fewest.argmax())
        if fewest[place] > fewest_of_best:
            best, fewest_of_best = batch.take(slice(place, place + 1)), int(fewest[place])
        if fewest_of_best == num_slots:
            break
    if best is None:
        raise InputError(
            "there is no such event in the test part",
            where=dataset.url,
            got=f"event {event_id}",
            expected="an event_id of evaluation/test-*.parquet",
        )
    return best


def _name(catalogue: Catalogue, index: int) -> str:
    return str(catalogue.ids[index] if catalogue.names is None else catalogue.names[index])
