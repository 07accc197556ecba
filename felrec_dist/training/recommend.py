"""The first items of each user, as a checkpoint's weights and cache rank them.

A user stands where the checkpoint does: it has the history of all events before the checkpoint's
position, and items seen by then are candidates. One process.

Shape legend: U users, B users of a batch, I items, C rows of a block, k length of the lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cache_server import CacheClient
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import EVENT_COLUMNS, Catalogue, PreparedDataset, Span
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.errors import InputError
from felrec_dist.evaluation.candidates import BLOCK_SCORES
from felrec_dist.evaluation.top_k import TopK
from felrec_dist.training.checkpoint import Checkpoint, CheckpointStore, read_checkpoint
from felrec_dist.training.trainer import NoProgress, Progress, Trainer
from felrec_dist.training.world import World

Int64s = npt.NDArray[np.int64]
_READ_EVENTS = 65_536
_NAMED = 5


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        users: original ids as text; None for all users.
        k: length of each list.
        nearest_users: list other users, not items.
        exclude_seen: leave out the items that a user met before.
        skip_unknown: leave out users that are unknown, which is an error otherwise.
    """

    users: Sequence[str] | None
    k: int
    nearest_users: bool = False
    exclude_seen: bool = False
    skip_unknown: bool = False


def best_checkpoint(url: str) -> Checkpoint:
    """Returns the checkpoint in a folder, or that of a run's best epoch so far, else its newest.

    Raises:
        CheckpointError: there is none.
    """
    store = CheckpointStore(url)
    newest = store.latest()
    if newest is None:
        return read_checkpoint(url)
    best = read_checkpoint(newest, with_dense=False).position.best
    return read_checkpoint(newest if best is None else store.epoch_url(best.epoch))


def recommend(
    config: ExperimentConfig,
    client: CacheClient,
    world: World,
    checkpoint: Checkpoint,
    request: Request,
    progress: Progress | None = None,
) -> pa.Table:
    """Returns a row for each user and place of its list: ``user``, ``rank`` from 1, ``item`` (or
    ``neighbour``), ``score``; users in the order asked for, ids as in the raw data.

    Args:
        config, client: of the checkpoint's run, the cache empty.
        world: of a single process.
        checkpoint: of weights and cache.
        request: what is asked for.
        progress: who watches.

    Raises:
        InputError: a user is unknown.
        ConfigError: the model cannot do it.
        CheckpointError: the checkpoint does not fit the config's data set.
    """
    progress = progress or NoProgress()
    dataset = PreparedDataset.open(config.data.url)
    position = checkpoint.position.next_position
    step = checkpoint.position.cache_step
    with Trainer(config, dataset, client, world) as trainer:
        trainer.restore(checkpoint, generation=1)
        recommender = trainer.recommender
        last = _last_events(dataset, position, progress)
        last, is_known = _asked(dataset, last, request)
        num_seen = int(np.searchsorted(dataset.items.first_positions, position))
        if request.nearest_users:
            candidates, index = recommender.users_now(step, position)
        else:
            matrix = recommender.candidates_now(step, num_seen)
            candidates, index = matrix.rows_CD, np.arange(len(matrix.rows_CD))
        seen = _SeenItems(dataset) if request.exclude_seen else None
        progress.begin("recommending", len(last))
        found: list[tuple[Int64s, Tensor]] = []
        for start in range(0, len(last), config.data.batch_size):
            batch = last.take(slice(start, start + config.data.batch_size))
            users_BD, is_served_B = recommender.represent_now(batch, step)
            is_known[start : start + len(batch)] &= is_served_B
            excluded = None
            if request.nearest_users:
                excluded = _pairs([np.array([user]) for user in batch.user_index])
            elif seen is not None:
                excluded = _pairs(seen.of(batch))
            found.append(_first(users_BD, candidates, index, request.k, excluded))
            step += 1
            progress.advance(len(batch), {})
    _check_known(dataset, last, is_known, request, checkpoint)
    return _table(dataset, last.user_index, is_known, found, request)


def _last_events(dataset: PreparedDataset, position: int, progress: Progress) -> EventBatch:
    """Returns each user's last event before a position, users in the catalogue's order.

    A user without one has ``user_length`` -1.
    """
    offset, length = (np.full(dataset.num_users, -1, dtype=np.int64) for _ in range(2))
    progress.begin("reading the events", position)
    for batch, _ in EventStream(dataset, Span(0, position), _READ_EVENTS).batches():
        offset[batch.user_index] = batch.user_offset  # later assignments win
        length[batch.user_index] = batch.user_length
        progress.advance(len(batch), {})
    columns = {name: np.zeros(dataset.num_users, dtype=np.int64) for name in EVENT_COLUMNS}
    columns |= {"user": dataset.users.ids, "user_index": np.arange(dataset.num_users)}
    columns |= {"user_offset": offset, "user_length": length}
    return EventBatch(position=np.zeros_like(offset), **columns)


def _asked(
    dataset: PreparedDataset, last: EventBatch, request: Request
) -> tuple[EventBatch, npt.NDArray[np.bool_]]:
    """Returns the events of the users asked for, and whether each has one.

    Raises:
        InputError: a user is not of the data set.
    """
    if request.users is None:
        chosen = np.flatnonzero(last.user_length >= 0)
    else:
        chosen = _rows_of(dataset.users, request.users)
        unknown = [text for text, row in zip(request.users, chosen, strict=True) if row < 0]
        if unknown and not request.skip_unknown:
            raise _unknown(unknown, dataset.url, "of the data set")
        chosen = chosen[chosen >= 0]
    batch = last.take(chosen)
    is_known = batch.user_length >= 0
    return replace(
        batch,
        user_offset=np.maximum(batch.user_offset, 0),
        user_length=np.maximum(batch.user_length, 0),
    ), is_known


def _check_known(
    dataset: PreparedDataset,
    last: EventBatch,
    is_known: npt.NDArray[np.bool_],
    request: Request,
    checkpoint: Checkpoint,
) -> None:
    if request.users is not None and not request.skip_unknown and not is_known.all():
        names = _ids(dataset.users, last.user_index[~is_known]).to_pylist()
        raise _unknown([str(name) for name in names], checkpoint.url, "known to this model by then")


def _unknown(users: Sequence[str], where: str, expected: str) -> InputError:
    more = f" and {len(users) - _NAMED} more" if len(users) > _NAMED else ""
    return InputError(
        "a user is unknown",
        where=where,
        got=", ".join(users[:_NAMED]) + more,
        expected=f"users {expected}",
        remedy="give users as they stand in the raw data, or add --skip-unknown",
    )


def _rows_of(catalogue: Catalogue, users: Sequence[str]) -> Int64s:
    """Returns (U,) catalogue rows, -1 for ids that it does not have."""
    if catalogue.names is not None:
        rows = pc.index_in(pa.array(users, pa.string()), catalogue.names)
        return np.asarray(rows.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int64)
    row_of = {str(key): row for row, key in enumerate(catalogue.ids.tolist())}
    return np.array([row_of.get(text, -1) for text in users], dtype=np.int64)


class _SeenItems:
    """All items of a user up to its last event."""

    def __init__(self, dataset: PreparedDataset) -> None:
        self._segments = [np.asarray(segment) for segment in dataset.neighbours("user")]
        self._first = np.cumsum([0, *(len(segment) for segment in self._segments)])
        self._order = np.argsort(dataset.items.ids)
        self._keys = dataset.items.ids[self._order]

    def of(self, last: EventBatch) -> list[Int64s]:
        """Returns the catalogue rows of each user's items."""
        found = []
        for offset, length in zip(last.user_offset, last.user_length, strict=True):
            number = int(np.searchsorted(self._first, offset, side="right")) - 1
            stop = offset - self._first[number] + 1
            keys = self._segments[number][stop - length - 1 : stop]
            found.append(np.unique(self._order[np.searchsorted(self._keys, keys)]))
        return found


def _pairs(excluded: Sequence[Int64s]) -> tuple[Int64s, Int64s]:
    """Returns events and what each of them leaves out, in the order of the latter."""
    events = np.repeat(np.arange(len(excluded)), [len(rows) for rows in excluded])
    rows = np.concatenate(excluded)
    order = np.argsort(rows, kind="stable")
    return events[order], rows[order]


def _first(
    users_BD: Tensor,
    candidates_CD: Tensor,
    index_C: Int64s,
    k: int,
    excluded: tuple[Int64s, Int64s] | None,
) -> tuple[Int64s, Tensor]:
    """Returns the catalogue rows (B, k) of the first candidates, -1 for none, and their scores.

    Args:
        users_BD, candidates_CD: their products are the scores.
        index_C: catalogue rows of the candidates.
        k: length of the lists.
        excluded: of ``_pairs``.
    """
    device = users_BD.device
    top = TopK(len(users_BD), k, device)
    place_of = np.full(index_C.max(initial=-1) + 1, -1, dtype=np.int64)
    place_of[index_C] = np.arange(len(index_C))
    is_left_out = None
    block = max(1, BLOCK_SCORES[device.type] // max(1, len(users_BD)))
    if excluded is not None:
        is_there = excluded[1] < len(place_of)
        places = place_of[excluded[1][is_there]]
        is_left_out = excluded[0][is_there][places >= 0], places[places >= 0]
    for start in range(0, len(candidates_CD), block):
        stop = min(len(candidates_CD), start + block)
        is_candidate = None
        if is_left_out is not None:
            events, places = is_left_out
            is_here = (start <= places) & (places < stop)
            left_out = np.zeros((len(users_BD), stop - start), dtype=np.bool_)
            left_out[events[is_here], places[is_here] - start] = True
            is_candidate = torch.from_numpy(~left_out).to(device)
        scores_BC = users_BD @ candidates_CD[start:stop].T
        top.add(scores_BC, torch.from_numpy(index_C[start:stop]).to(device), is_candidate)
    index_Bk = top.index_Bk().cpu().numpy()
    places_Bk = torch.from_numpy(np.where(index_Bk < 0, 0, place_of[index_Bk])).to(device)
    return index_Bk, torch.einsum("bd,bkd->bk", users_BD, candidates_CD[places_Bk]).cpu()


def _table(
    dataset: PreparedDataset,
    user_index: Int64s,
    is_known: npt.NDArray[np.bool_],
    found: Sequence[tuple[Int64s, Tensor]],
    request: Request,
) -> pa.Table:
    k = request.k
    index_Uk = np.concatenate([index for index, _ in found]) if found else np.empty((0, k), int)
    scores_Uk = np.concatenate([s.numpy() for _, s in found]) if found else np.empty((0, k))
    is_there_Uk = (index_Uk >= 0) & is_known[:, None]
    users, places = np.nonzero(is_there_Uk)
    column, catalogue = (
        ("neighbour", dataset.users) if request.nearest_users else ("item", dataset.items)
    )
    return pa.table(
        {
            "user": _ids(dataset.users, user_index[users]),
            "rank": places + 1,
            column: _ids(catalogue, index_Uk[is_there_Uk]),
            "score": scores_Uk[is_there_Uk].astype(np.float64),
        }
    )


def _ids(catalogue: Catalogue, rows: Int64s) -> Any:
    """Returns ids as they stand in the raw data."""
    return pa.array(catalogue.ids[rows]) if catalogue.names is None else catalogue.names.take(rows)
