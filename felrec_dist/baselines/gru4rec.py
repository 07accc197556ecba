"""GRU4Rec (Hidasi et al. 2016): GRUs that go on from event to event.

Before each of a user's events the GRUs read the item of the event before it, from the state in
which that one's step left them. The states of all users are the rows of the cache. A state that was
read is a constant: the gradient goes through one step. The input is a row of a table, which is what
a one-hot vector times a matrix gives; a second table holds the rows that the output is scored with.

What a user was doing before is exact to the event, in training (``sessions``) and in evaluation,
where the events of a batch that have a user in common go through the GRUs one after the other.
Items that training has not seen have no row: as inputs they are skipped.

Shape legend: b events of this rank, B events of the batch, M users with E inputs, m users with e
inputs of these on this rank, U all users, D width, H = number of layers * D, N negatives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cache_server import CacheClient, CacheCounters
from felrec_dist.baselines.bpr_mf import bpr_losses
from felrec_dist.baselines.config import GRU4RecConfig
from felrec_dist.baselines.sessions import SessionBatch, Sessions, occurrences
from felrec_dist.baselines.shuffled import draw_negatives
from felrec_dist.baselines.training import ITEM, USER, BaselineTraining
from felrec_dist.config import ExperimentConfig
from felrec_dist.data.dataset import Int64s, PreparedDataset, Span
from felrec_dist.data.stream import EventBatch, EventStream
from felrec_dist.training.representations import STORAGE_DTYPES, CacheTraffic, last_events
from felrec_dist.training.row_writer import RowWrite, RowWriter
from felrec_dist.training.world import World

INPUT = "input"
_NEVER = np.iinfo(np.int64).max
_READ_EVENTS = 1_000_000


class StackedGRU(nn.Module):
    """Layers of GRUs, one step at a time; the state of a user is one vector."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.GRUCell(width, width) for _ in range(num_layers))

    def forward(self, input_bD: Tensor, state_bH: Tensor) -> Tensor:
        """Returns the next state (b, H); its last D numbers are the output."""
        states = []
        for cell, state_bD in zip(self.cells, state_bH.chunk(len(self.cells), dim=1), strict=True):
            input_bD = cell(input_bD, state_bD)
            states.append(input_bD)
        return torch.cat(states, dim=1)


class UserStates:
    """The users' states in the cache; one that was never written is zero."""

    def __init__(self, client: CacheClient, config: ExperimentConfig, world: World) -> None:
        self._client = client
        self._storage = STORAGE_DTYPES[config.cache.storage]
        self._device = world.device
        # A client is not for several threads at once, and each shard has one writer.
        shards = range(world.rank, config.cache.num_shards, world.world_size)
        self._writer = RowWriter(client.sibling(), tuple(shards))

    def fetch(self, step: int, users_m: Int64s) -> Tensor:
        """Returns the states (m, H) of users, by key, as they are when ``step`` begins."""
        rows = self._client.fetch(step, {USER: users_m})[USER].rows
        return torch.from_numpy(rows).to(self._device, torch.float32)

    def write(self, step: int, users_M: Int64s, versions_M: Int64s, state_MH: Tensor) -> None:
        """Writes the states of a step, of all ranks' users; each rank calls it with the same."""
        write = RowWrite(users_M, versions_M, state_MH.detach().to(self._storage))
        self._writer.write(step, {USER: write})

    def begin(self, generation: int) -> None:
        """Follows a ``clear`` or ``restore`` of the cache."""
        self._writer.flush()
        for client in (self._client, self._writer.client):
            client.begin_generation(generation)

    def flush(self) -> None:
        """Waits until the shards have acknowledged every write."""
        self._writer.flush()

    def take_traffic(self) -> CacheTraffic:
        """Returns what moved since the last call."""
        fetched, written = self._client.counters, self._writer.client.counters
        self._client.counters, self._writer.client.counters = CacheCounters(), CacheCounters()
        return CacheTraffic(
            read_rows=fetched.fetched_rows,
            hit_rate=0.0,
            fetched_rows=fetched.fetched_rows,
            fetch_messages=fetched.fetch_messages,
            fetched_bytes=fetched.fetched_bytes,
            fetch_wait_s=fetched.fetch_wait_s,
            written_rows=written.written_rows,
            written_bytes=written.written_bytes,
            write_wait_s=written.write_wait_s,
        )

    def close(self) -> None:
        """Ends the writing thread."""
        self._writer.close()


class GRU4RecTraining(BaselineTraining[SessionBatch]):
    """The GRUs, the two tables of items, and the states in the cache."""

    chance_loss: float | None = math.log(2.0)

    def __init__(
        self,
        config: ExperimentConfig,
        dataset: PreparedDataset,
        client: CacheClient,
        world: World,
    ) -> None:
        assert isinstance(config.model, GRU4RecConfig)
        self.num_negatives = config.model.num_negatives
        self.starts_anew = config.model.sessions == "released"
        torch.manual_seed(config.training.seed)
        super().__init__(
            config,
            dataset,
            client,
            world,
            model=StackedGRU(config.model.width, config.model.num_layers),
            num_rows=dict.fromkeys((INPUT, ITEM), dataset.num_train_items),
            width=config.model.width,
        )
        self.states = UserStates(client, config, world)
        self.sessions = Sessions(dataset, config.data.batch_size, config.training.seed)
        self.steps_per_epoch = self.sessions.steps_per_epoch
        segments = [np.asarray(segment) for segment in dataset.neighbours("user")]
        self._items_of_users = segments[0] if len(segments) == 1 else np.concatenate(segments)
        self._rows_by_key = np.argsort(dataset.items.ids)
        self._keys = dataset.items.ids[self._rows_by_key]
        self._first_inputs_U: Int64s = np.empty(0, dtype=np.int64)

    @contextmanager
    def batches(self, epoch: int, first_step: int) -> Iterator[Iterator[SessionBatch]]:
        yield self.sessions.batches(epoch, first_step)

    def losses(self, batch: SessionBatch, epoch: int) -> tuple[Tensor, Tensor]:
        """The sum over the batch is minimised, as in BPR-MF; the states go on."""
        generator = np.random.default_rng([self.config.training.seed, epoch, batch.step])
        target_B = self._items_at(batch.target_place)
        negatives_BN = draw_negatives(
            generator, target_B, self.dataset.num_train_items, self.num_negatives
        )
        mine = self.world.mine
        users_B = self.dataset.users.ids[batch.user_index]
        state_bH = self.states.fetch(batch.step, users_B[mine])
        vectors = self.tables.lookup(
            self.rows_of(
                {
                    INPUT: self._items_at(batch.input_place[mine]),
                    ITEM: np.column_stack([target_B[mine], negatives_BN[mine]]),
                }
            )
        )
        state_bH = self.forward(vectors[INPUT], state_bH)
        scores_b1N = torch.einsum("bd,bnd->bn", self._output(state_bH), vectors[ITEM]).tanh()
        losses_bN = bpr_losses(scores_b1N[:, 0], scores_b1N[:, 1:])
        (state_BH,) = self.exchange.gather_batch([state_bH.detach()], batch.num_events)
        self.states.write(batch.step, users_B, batch.versions, state_BH)
        return self.world.world_size * losses_bN.sum(), losses_bN.mean()[None]

    def begin_span(self, span: Span, step: int) -> int:
        """Sees where sessions begin, and lets those that training left behind catch up."""
        self._first_inputs_U = self._first_inputs(span)
        if self.starts_anew or span.start != self.dataset.split.train.stop:
            return step
        sessions = self.sessions
        # A session's last item is read when the next event comes.
        behind = np.flatnonzero(sessions.num_trained_U < sessions.num_targets_U)
        for start in range(0, len(behind), self.config.data.batch_size):
            users = behind[start : start + self.config.data.batch_size]
            done_M = sessions.num_trained_U[users]
            missed_M = sessions.num_targets_U[users] - done_M
            slots = np.repeat(np.arange(len(users)), missed_M)
            places = (sessions.starts_U[users] + done_M)[slots] + occurrences(slots)
            self._go_on(
                step,
                users,
                slots,
                self._items_at(places),
                is_new_M=done_M == 0,
                versions_M=np.full(len(users), span.start - 1),
            )
            step += 1
        return step

    def represent_batch(self, batch: EventBatch, step: int) -> Tensor:
        """A candidate's score is the product with the output: tanh would not change an order.

        The output of a session without input is zero: all candidates tie.
        """
        served = np.flatnonzero(self._has_input(batch))
        users, slots = np.unique(batch.user_index[served], return_inverse=True)
        last_M = served[last_events(batch.user_index[served])]
        is_first = batch.user_length[served] - 1 == self._first_inputs_U[batch.user_index[served]]
        is_new_M = np.zeros(len(users), dtype=np.bool_)
        is_new_M[slots[is_first]] = True
        versions_M = np.empty(len(users), dtype=np.int64)
        versions_M[np.searchsorted(users, batch.user_index[last_M])] = batch.position[last_M]
        output_eD = self._go_on(
            step,
            users,
            slots,
            self._items_at(batch.user_offset[served] - 1),
            is_new_M=is_new_M,
            versions_M=versions_M,
        )
        user_BD = output_eD.new_zeros(len(batch), self.tables.width)
        user_BD[torch.from_numpy(served).to(user_BD.device)] = output_eD
        return user_BD

    def _has_input(self, batch: EventBatch) -> npt.NDArray[np.bool_]:
        """Whether the user has an earlier item that the training part has."""
        return np.asarray(batch.user_length > self._first_inputs_U[batch.user_index])

    def begin(self, generation: int, step: int) -> None:
        self.states.begin(generation)

    def flush(self) -> None:
        self.states.flush()

    def take_traffic(self) -> CacheTraffic:
        return self.states.take_traffic()

    def close(self) -> None:
        self.states.close()
        super().close()

    def _go_on(
        self,
        step: int,
        users_M: Int64s,
        slots_E: Int64s,
        items_E: Int64s,
        *,
        is_new_M: npt.NDArray[np.bool_],
        versions_M: Int64s,
    ) -> Tensor:
        """Reads E inputs, each user's one after the other, and writes the states behind them.

        Every rank takes a part of the users, with all their inputs: no rank waits for another
        between two of them.

        Args:
            step: of the cache.
            users_M: catalogue rows, distinct.
            slots_E: which of these has the input; a user's inputs are in time order.
            items_E: catalogue rows; one without a vector leaves the state as it is.
            is_new_M: the user's state is zero, whatever the cache holds.
            versions_M: of the states that are written.

        Returns:
            The outputs (E, D) after each input, on all ranks.
        """
        keys_M = self.dataset.users.ids[users_M]
        world = self.world
        mine = np.flatnonzero(slots_E % world.world_size == world.rank)
        # The k-th inputs of all users, then the next ones.
        wave_e = occurrences(slots_E[mine])
        order = np.argsort(wave_e, kind="stable")
        mine, num_in_wave = mine[order], np.bincount(wave_e)
        is_known_e = items_E[mine] < self.dataset.num_train_items
        rows_e = np.where(is_known_e, items_E[mine], 0)
        with self.clock("encode"):
            state_mH = self.states.fetch(step, keys_M[world.mine])
            state_mH[torch.from_numpy(is_new_M[world.mine]).to(state_mH.device)] = 0.0
            input_eD = self.tables.lookup(self.rows_of({INPUT: rows_e}))[INPUT]
            mine_e = torch.from_numpy(mine).to(state_mH.device)
            slot_e = torch.from_numpy(slots_E[mine] // world.world_size).to(state_mH.device)
            known_e1 = torch.from_numpy(is_known_e).to(state_mH.device)[:, None]
            output_ED = input_eD.new_zeros(len(slots_E), self.tables.width)
            start = 0
            for end in np.cumsum(num_in_wave).tolist():
                wave = slice(start, end)
                before = state_mH[slot_e[wave]]
                after = self.model(input_eD[wave], before)
                state_mH[slot_e[wave]] = after = torch.where(known_e1[wave], after, before)
                output_ED[mine_e[wave]] = self._output(after)
                start = end
        with self.clock("exchange"):
            output_ED = self.exchange.sum(output_ED)  # each row is zero on all ranks but one
            (state_MH,) = self.exchange.gather_batch([state_mH], len(users_M))
        with self.clock("write_back"):
            self.states.write(step, keys_M, versions_M, state_MH)
        return output_ED

    def _output(self, state_bH: Tensor) -> Tensor:
        return state_bH[:, -self.tables.width :]

    def _items_at(self, places: Int64s) -> Int64s:
        """Returns catalogue rows of the items in places of the index of the users' items."""
        return self._rows_by_key[np.searchsorted(self._keys, self._items_of_users[places])]

    def _first_inputs(self, span: Span) -> Int64s:
        """Returns how many events each user has before the first input of its session.

        A function of the data alone: what the cache holds does not tell it.
        """
        train = self.dataset.split.train
        session = span if self.starts_anew else Span(train.stop, span.stop)
        first_U = np.full(self.dataset.num_users, _NEVER)
        for batch, _ in EventStream(self.dataset, session, _READ_EVENTS).batches():
            known = batch.item_index < self.dataset.num_train_items
            np.minimum.at(first_U, batch.user_index[known], batch.user_length[known])
        if not self.starts_anew:
            first_U[: self.dataset.num_train_users] = 0
        return first_U
