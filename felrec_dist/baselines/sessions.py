"""Training in parallel sessions: each step takes one event of each of B different users.

A session is all that a user did in the training part. Its first event is only an input; each other
one is a target, and its input is the event before it. A user's events come in time order, so that
the state after the input before is known when a step begins.

The steps of an epoch. A schedule of n steps with B users each exists if and only if sessions cut to
n targets fill it (McNaughton's rule, 1959): laid one after the other around a circle of n places,
B rounds of it, no session comes twice to a place. n is the largest such number. It follows from the
lengths of the sessions alone, hence is known before an epoch begins and the same in all of them.
Each epoch draws the order of the sessions on the circle and the order of the places in time; a step
is then a random set of users, longer sessions more often, so that all of them end near the epoch's
end. Users drawn with equal chances would leave the longest sessions alone there, in short batches
or untrained. What is left out is the end of some of the longest sessions, the same in each epoch:
at most B - 1 events, unless a session is longer than the epoch has steps.

The order is a function of seed and epoch: every rank draws it, and takes its slice of each batch.

Shape legend: U users of the training part, B users of a batch, n steps of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.data.stream import EventStream
from felrec_dist.errors import ConfigError

Int64s = npt.NDArray[np.int64]
_READ_EVENTS = 1_000_000


@dataclass(frozen=True)
class SessionBatch:
    """One event of each of B users, of all ranks; the fields are (B,) int64.

    Attributes:
        step: training step of the epoch.
        user_index: catalogue rows, distinct.
        input_place, target_place: of the two items in the index of the users' items.
    """

    step: int
    user_index: Int64s
    input_place: Int64s

    @property
    def target_place(self) -> Int64s:
        return self.input_place + 1

    @property
    def versions(self) -> Int64s:
        """Of the states that the step writes: they grow with the steps, and stay below the number
        of training events.
        """
        return self.step * self.num_events + np.arange(self.num_events, dtype=np.int64)

    @property
    def next_position(self) -> int:
        """The first version of the next step: the cache's versions are no positions here."""
        return (self.step + 1) * self.num_events

    @property
    def num_events(self) -> int:
        return len(self.user_index)

    @property
    def events(self) -> str:
        first = ", ".join(map(str, self.user_index[:5]))
        return f"{self.num_events} events, of the users in catalogue rows {first}, ..."


class Sessions:
    """The training part's sessions and their order.

    Attributes:
        starts_U: where each user's items begin in the index of the users' items.
        num_targets_U: of each session.
        num_trained_U: how many of them an epoch trains, the first ones.
        steps_per_epoch: n.
    """

    def __init__(self, dataset: PreparedDataset, batch_size: int, seed: int) -> None:
        """
        Args:
            dataset, batch_size: of the run.
            seed: of the order.

        Raises:
            ConfigError: fewer users than a batch takes have two training events.
        """
        users = dataset.users
        num_users = dataset.num_train_users
        self.starts_U = np.empty(num_users, dtype=np.int64)
        for batch, _ in EventStream(dataset, dataset.split.train, _READ_EVENTS).batches():
            # The place of a user's last training event: all earlier ones lie before it.
            self.starts_U[batch.user_index] = batch.user_offset - batch.user_length
        self.num_targets_U = users.train_counts[:num_users] - 1
        self._batch_size = batch_size
        self._seed = seed
        num_long = np.count_nonzero(self.num_targets_U)
        if num_long < batch_size:
            raise ConfigError(
                "a batch needs more users than there are",
                where=dataset.url,
                got=f"data.batch_size = {batch_size}, {num_long} users with two training events",
                expected="at most as many events a batch as there are such users",
                remedy="set a smaller data.batch_size",
            )
        self.steps_per_epoch = _most_steps(self.num_targets_U, batch_size)
        self.num_trained_U = np.minimum(self.num_targets_U, self.steps_per_epoch)
        too_many = int(self.num_trained_U.sum()) - self.steps_per_epoch * batch_size
        longest = np.argsort(-self.num_trained_U, kind="stable")[:too_many]
        self.num_trained_U[longest] -= 1

    def batches(self, epoch: int, first_step: int) -> Iterator[SessionBatch]:
        """Yields an epoch's batches from a step on."""
        generator = np.random.default_rng([self._seed, epoch])
        num_steps, batch_size = self.steps_per_epoch, self._batch_size
        users = generator.permutation(len(self.num_trained_U))
        on_circle = np.repeat(users, self.num_trained_U[users]).reshape(batch_size, num_steps)
        users_nB = on_circle.T[generator.permutation(num_steps)]
        ordinals_nB = occurrences(users_nB.ravel()).reshape(num_steps, batch_size)
        for step in range(first_step, num_steps):
            yield SessionBatch(
                step=step,
                user_index=users_nB[step],
                input_place=self.starts_U[users_nB[step]] + ordinals_nB[step],
            )


def _most_steps(lengths: Int64s, batch_size: int) -> int:
    """Returns the largest n with sum(min(lengths, n)) >= n * batch_size."""
    low, high = 1, int(lengths.sum()) // batch_size
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(lengths, middle).sum() >= middle * batch_size:
            low = middle
        else:
            high = middle - 1
    return low


def occurrences(ids: Int64s) -> Int64s:
    """Returns how many equal ids come before each one; ids are 0 or above."""
    order = np.argsort(ids, kind="stable")
    # Of the sorted ids, where the equal ones begin; the last number is the end.
    starts = np.flatnonzero(np.diff(ids[order], prepend=-1, append=-1))
    before = np.empty_like(ids)
    before[order] = np.arange(len(ids)) - np.repeat(starts[:-1], np.diff(starts))
    return before
