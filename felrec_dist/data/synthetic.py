"""Synthetic interactions that behave like real ones, of any number, in bounded memory.

What is modelled, and what a trainer can learn from it:

- *tastes*: an item belongs to one taste and leans to a second; a user has a few tastes, a session
  is mostly about one of them. So recent history tells what comes next.
- *popularity*: a Zipf law; items appear throughout the time span, are most popular then, and fade.
- *users* arrive throughout as well, come in sessions, differ a hundredfold in activity, and leave.
  So the last part of the data holds users and items that the first part has never seen.
- *time*: a daily rhythm, bursts, and some equal timestamps.
- *repeats* are neither sought nor avoided: a fifth of the events by default.

The probability that an event of user u at time t is item j is::

    taste_strength * sum over tastes k of P(k | u, session) P(j | k, t)
    + (1 - taste_strength) * P(j | t)

where P(j | k, t) is proportional to the popularity of j at t times its affinity to k, and P(j | t)
to its popularity alone.

Time is cut into slots of equally many events. Popularity and activity are constant within a slot,
so a slot is drawn by a few vectorised look-ups in cumulative sums. Memory holds the population, one
slot, and one row group of the file: it grows with users and items, not with events.

With the defaults the normalized rank of the last tenth (``causal`` candidates) is 0.30 by counts so
far, 0.22 by recent counts, 0.11 by recent counts within the tastes of a user's last 20 items, and
0.07 for the true probabilities; 27 % of these events are of new users, 26 % of new items.

U users, I items, S sessions of a slot, E events of a slot.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from felrec_dist.errors import ConfigError, StorageError

Progress = Callable[[int, int], None]
"""Called with the events written so far and the events in all."""

SCHEMA = pa.schema([("user", pa.int64()), ("item", pa.int64()), ("timestamp", pa.int64())])

# Fixed, because the same seed must give the same events on machines of any size.
MIN_SLOTS = 256
SLOT_EVENTS = 1 << 18
ROW_GROUP_EVENTS = 1 << 20

START_MS = 1_672_531_200_000  # 2023-01-01T00:00:00Z
DAY_MS = 86_400_000
# Users and items that are there when the data begins; the others arrive evenly over the span.
INITIAL_SHARE = 0.3
# Log-normal spread of the activity and of the active time of a user, and of that of an item.
ACTIVITY_SIGMA = 0.9
ACTIVE_DAYS_SIGMA = 0.8
# What an item keeps of its popularity for good.
EVERGREEN_SHARE = 0.03
TASTES_PER_USER = 3
# Of the sessions of a user in open communities, those of the first, second and third taste.
OPEN_TASTE_SHARES = (0.5, 0.3, 0.2)
OPEN_SECOND_AFFINITY = 0.15
# Within a session, how often an event follows the session's taste and not the user's mixture.
SESSION_FOCUS = 0.8
MEAN_SESSION_EVENTS = 5.0
MEAN_GAP_MS = 150_000.0
EQUAL_TIMESTAMP_SHARE = 0.05
# The rate of events is 1 + RHYTHM cos(2 pi (hour - PEAK_HOUR) / 24).
RHYTHM = 0.7
PEAK_HOUR = 20.0

_USER_SALT = 0x1D8E_4E27_C47D_124F
_ITEM_SALT = 0x5851_F42D_4C95_7F2D


@dataclass(frozen=True)
class SyntheticConfig:
    """What to generate.

    Attributes:
        num_events: exact.
        num_users: the population; who is rarely active may have no event.
        num_items: likewise.
        seed: of everything but the ids.
        days: the span of time.
        num_tastes: latent groups of items.
        taste_strength: how often taste decides on the item: 0 never, 1 always.
        popularity_skew: exponent of the Zipf law of popularity; 0 makes all items equal.
        user_active_days: after which a user's activity has fallen to 1 / e (median over users).
        item_active_days: after which an item's popularity has fallen to 1 / e (median over items).
        closedness: of the communities around the tastes. 0: a user has three tastes and an item
            leans to a second one; 1: users and items have one only, as if tastes were languages.
    """

    num_events: int = 100_000
    num_users: int = 3_000
    num_items: int = 5_000
    seed: int = 0
    days: float = 365.0
    num_tastes: int = 16
    taste_strength: float = 0.85
    popularity_skew: float = 0.8
    user_active_days: float = 270.0
    item_active_days: float = 180.0
    closedness: float = 0.0

    @property
    def taste_shares(self) -> tuple[float, ...]:
        """The shares of a user's first, second and third taste in its sessions; they sum to 1."""
        first, *others = ((1 - self.closedness) * share for share in OPEN_TASTE_SHARES)
        return (first + self.closedness, *others)

    @property
    def second_affinity(self) -> float:
        """How much an item belongs to its second taste; the rest is its first."""
        return (1 - self.closedness) * OPEN_SECOND_AFFINITY

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            wanted = int if isinstance(field.default, int) else (int, float)
            if isinstance(value, bool) or not isinstance(value, wanted):
                self._refuse(field.name, "a whole number" if wanted is int else "a number")
            if not math.isfinite(value):
                self._refuse(field.name, "finite")
        for name in ("num_events", "num_users", "num_items", "num_tastes"):
            if not 1 <= getattr(self, name) < 1 << 40:
                self._refuse(name, "from 1 to 2**40 - 1")
        if self.num_tastes > 1 << 15:
            self._refuse("num_tastes", "at most 32768")
        if not 0 <= self.seed < 1 << 63:
            self._refuse("seed", "from 0 to 2**63 - 1")
        for name in ("days", "user_active_days", "item_active_days"):
            if not 0.001 <= getattr(self, name) <= 36_500:
                self._refuse(name, "from 0.001 to 36500 (a hundred years)")
        if not 0 <= self.taste_strength <= 1:
            self._refuse("taste_strength", "from 0 to 1")
        if not 0 <= self.closedness <= 1:
            self._refuse("closedness", "from 0 to 1")
        if not 0 <= self.popularity_skew <= 4:
            self._refuse("popularity_skew", "from 0 to 4")

    def _refuse(self, name: str, rule: str) -> None:
        raise ConfigError(
            f"A synthetic data set cannot have this {name}",
            where=f"SyntheticConfig.{name}",
            got=repr(getattr(self, name)),
            expected=rule,
            remedy=f"set {name} to a value that is {rule}",
        )


@dataclass(frozen=True)
class Population:
    """The hidden truth behind the events; times are fractions of the events, from 0 to 1.

    Attributes:
        user_keys: (U,) int64, the ids in the file.
        user_arrival: (U,) float64.
        user_lifetime: (U,) float64, of the exponential decay.
        user_log_activity: (U,) float64.
        user_tastes: (U, TASTES_PER_USER) int16, the most liked first; a taste may stand twice.
        item_keys: (I,) int64, the ids in the file.
        item_release: (I,) float64.
        item_lifetime: (I,) float64.
        item_popularity: (I,) float64, at release.
        item_tastes: (I, 2) int16, the one it belongs to and the one it leans to.
    """

    user_keys: NDArray[np.int64]
    user_arrival: NDArray[np.float64]
    user_lifetime: NDArray[np.float64]
    user_log_activity: NDArray[np.float64]
    user_tastes: NDArray[np.int16]
    item_keys: NDArray[np.int64]
    item_release: NDArray[np.float64]
    item_lifetime: NDArray[np.float64]
    item_popularity: NDArray[np.float64]
    item_tastes: NDArray[np.int16]

    def activity(self, now: float) -> NDArray[np.float64]:
        """Of each user at time ``now``, (U,), up to a factor."""
        age = now - self.user_arrival
        log_activity = self.user_log_activity - age / self.user_lifetime
        log_activity[age < 0] = -np.inf
        # Relative to the most active, or all would be 0 where lifetimes are short.
        return np.exp(log_activity - log_activity.max())

    def popularity(self, now: float) -> NDArray[np.float64]:
        """Of each item at time ``now``, (I,)."""
        age = now - self.item_release
        fresh = np.exp(-np.maximum(age, 0.0) / self.item_lifetime)
        faded = EVERGREEN_SHARE + (1 - EVERGREEN_SHARE) * fresh
        return np.where(age < 0, 0.0, self.item_popularity * faded)


def draw_population(config: SyntheticConfig) -> Population:
    """The users and items of ``config``; the same that ``synthesize`` uses."""
    random = _stream(config, 0)
    # Small tastes and large ones.
    taste_share = 1.0 / (np.arange(config.num_tastes) + config.num_tastes / 2)
    taste_share /= taste_share.sum()

    def tastes(count: int, width: int) -> NDArray[np.int16]:
        draws = random.choice(config.num_tastes, size=(count, width), p=taste_share)
        return draws.astype(np.int16)

    ranks = random.permutation(config.num_items)
    return Population(
        user_keys=_scramble(config.num_users, _USER_SALT),
        user_arrival=_arrivals(random, config.num_users),
        user_lifetime=_lifetimes(random, config.num_users, config.user_active_days / config.days),
        user_log_activity=random.normal(0.0, ACTIVITY_SIGMA, config.num_users),
        user_tastes=tastes(config.num_users, TASTES_PER_USER),
        item_keys=_scramble(config.num_items, _ITEM_SALT),
        item_release=_arrivals(random, config.num_items),
        item_lifetime=_lifetimes(random, config.num_items, config.item_active_days / config.days),
        item_popularity=np.power(1.0 + ranks.astype(np.float64), -config.popularity_skew),
        item_tastes=tastes(config.num_items, 2),
    )


def synthesize(
    out_path: str | os.PathLike[str],
    config: SyntheticConfig,
    progress: Progress | None = None,
) -> Path:
    """Write one Parquet file of raw events and return its path.

    Columns ``user``, ``item`` (arbitrary positive 63-bit ids, not dense) and ``timestamp``
    (milliseconds since 1970), all int64, in time order. The file appears under its name only when
    it is complete. The same config gives the same bytes on the same versions of NumPy and pyarrow.

    Args:
        out_path: of the file; its folder is made where it is missing.
        config: what to generate.
        progress: called after each row group.

    Raises:
        StorageError: the file cannot be written.
    """
    target = Path(out_path)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")
    written = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The file says how it was made.
        schema = SCHEMA.with_metadata({"felrec_dist.synthetic": json.dumps(asdict(config))})
        with pq.ParquetWriter(
            part, schema, compression="zstd", use_dictionary=["user", "item"]
        ) as writer:
            for group in _row_groups(config):
                writer.write_table(pa.table(group, schema=schema))
                written += len(group["user"])
                if progress is not None:
                    progress(written, config.num_events)
        assert written == config.num_events, (written, config.num_events)
        os.replace(part, target)
    except OSError as error:
        raise StorageError(
            "The synthetic events cannot be written.",
            where=str(target),
            got=f"{type(error).__name__}: {error}",
            expected="the name of a file in a folder with enough space",
            remedy="make space, or name another file",
        ) from error
    finally:
        if part.exists():
            part.unlink()
    return target


_Columns = dict[str, NDArray[np.int64]]


def _row_groups(config: SyntheticConfig) -> Iterator[_Columns]:
    """The events in time order, ``ROW_GROUP_EVENTS`` at a time, the last group shorter."""
    held: list[_Columns] = []
    num_held = 0
    for slot in _in_order(_slots(config)):
        held.append(slot)
        num_held += len(slot["user"])
        while num_held >= ROW_GROUP_EVENTS:
            joined = _join(held)
            yield {name: column[:ROW_GROUP_EVENTS] for name, column in joined.items()}
            held = [{name: column[ROW_GROUP_EVENTS:] for name, column in joined.items()}]
            num_held -= ROW_GROUP_EVENTS
    if num_held:
        yield _join(held)


def _in_order(slots: Iterator[tuple[int, _Columns]]) -> Iterator[_Columns]:
    """Merge slots into time order: a session may end after the next slot has begun.

    Takes each slot with the time in milliseconds before which it has no event.
    """
    waiting: _Columns | None = None
    for begin_ms, slot in slots:
        if waiting is None:
            waiting = slot
        else:
            ready = int(np.searchsorted(waiting["timestamp"], begin_ms))
            yield {name: column[:ready] for name, column in waiting.items()}
            rest = {name: column[ready:] for name, column in waiting.items()}
            waiting = _join([rest, slot])
        order = np.argsort(waiting["timestamp"], kind="stable")
        waiting = {name: column[order] for name, column in waiting.items()}
    assert waiting is not None
    yield waiting


def _slots(config: SyntheticConfig) -> Iterator[tuple[int, _Columns]]:
    population = draw_population(config)
    shelves = _Shelves.of(population, config)
    clock = _Clock.over(config.days)
    num_slots = max(
        1,
        # Fewer slots where they would be too short for whole sessions.
        min(MIN_SLOTS, config.num_events // 64),
        math.ceil(config.num_events / SLOT_EVENTS),
    )
    for slot in range(num_slots):
        first = config.num_events * slot // num_slots
        last = config.num_events * (slot + 1) // num_slots
        begin, end = slot / num_slots, (slot + 1) / num_slots
        random = _stream(config, 1 + slot)
        columns = _draw_slot(config, population, shelves, clock, random, begin, end, last - first)
        yield int(clock.milliseconds(np.array([begin]))[0]), columns


def _draw_slot(
    config: SyntheticConfig,
    population: Population,
    shelves: _Shelves,
    clock: _Clock,
    random: np.random.Generator,
    begin: float,
    end: float,
    num_events: int,
) -> _Columns:
    """``num_events`` events of the sessions that start from ``begin`` to ``end``, unordered."""
    lengths_S = _session_lengths(random, num_events)
    num_sessions = len(lengths_S)
    user_S = _pick(np.cumsum(population.activity(begin)), random.random(num_sessions))
    taste_S = _draw_tastes(random, config, population, user_S)
    start_S = clock.milliseconds(begin + (end - begin) * random.random(num_sessions))

    session_E = np.repeat(np.arange(num_sessions), lengths_S)
    user_E = user_S[session_E]
    taste_E = taste_S[session_E]
    wanders_E = random.random(num_events) >= SESSION_FOCUS
    taste_E[wanders_E] = _draw_tastes(random, config, population, user_E[wanders_E])
    # Events that taste does not decide take the range of all tastes together.
    taste_E[random.random(num_events) >= config.taste_strength] = config.num_tastes
    item_E = shelves.draw(population.popularity(begin), taste_E, random.random(num_events))

    gap_E = np.floor(random.exponential(MEAN_GAP_MS, num_events)).astype(np.int64)
    gap_E[random.random(num_events) < EQUAL_TIMESTAMP_SHARE] = 0
    first_S = np.cumsum(lengths_S) - lengths_S
    since_E = np.cumsum(gap_E)
    timestamp_E = start_S[session_E] + since_E - since_E[first_S][session_E]
    return {
        "user": population.user_keys[user_E],
        "item": population.item_keys[item_E],
        "timestamp": timestamp_E,
    }


@dataclass(frozen=True)
class _Shelves:
    """Every item twice, under the taste it belongs to and the one it leans to, taste by taste.

    Attributes:
        item: (2 I,) int64, index of the item.
        affinity: (2 I,) float64; the two of an item sum to 1: all shelves together give P(j | t).
        bounds: (num_tastes + 1,) int64, where each taste's shelf begins.
    """

    item: NDArray[np.int64]
    affinity: NDArray[np.float64]
    bounds: NDArray[np.int64]

    @classmethod
    def of(cls, population: Population, config: SyntheticConfig) -> _Shelves:
        taste = population.item_tastes.ravel()
        order = np.argsort(taste, kind="stable")
        return cls(
            item=order // 2,
            affinity=np.array([1 - config.second_affinity, config.second_affinity])[order % 2],
            bounds=np.searchsorted(taste[order], np.arange(config.num_tastes + 1)),
        )

    def draw(
        self,
        popularity: NDArray[np.float64],
        taste: NDArray[np.int64],
        chance: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        """An item for each taste, (E,); taste ``num_tastes`` means all of them.

        A taste that has no item yet stands for all as well.
        """
        cumulative = np.cumsum(popularity[self.item] * self.affinity)
        edges = np.concatenate(([0.0], cumulative))[self.bounds]
        low = np.append(edges[:-1], 0.0)
        high = np.append(edges[1:], cumulative[-1])
        empty = high <= low
        low[empty], high[empty] = 0.0, cumulative[-1]
        return self.item[_pick(cumulative, chance, low[taste], high[taste])]


@dataclass(frozen=True)
class _Clock:
    """Turns the fraction of events that have happened into the time of day.

    Attributes:
        fractions: (G,) float64, increasing, from 0 to 1.
        times_ms: (G,) float64, since 1970.
    """

    fractions: NDArray[np.float64]
    times_ms: NDArray[np.float64]

    @classmethod
    def over(cls, days: float) -> _Clock:
        # A point each quarter of an hour draws the daily rhythm; short spans get a hundred points.
        day = np.linspace(0.0, days, max(100, math.ceil(days * 96)) + 1)
        angle = 2 * np.pi * (day - PEAK_HOUR / 24)
        events = day + RHYTHM / (2 * np.pi) * (np.sin(angle) - np.sin(angle[0]))
        return cls(fractions=events / events[-1], times_ms=START_MS + day * DAY_MS)

    def milliseconds(self, fractions: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.interp(fractions, self.fractions, self.times_ms).astype(np.int64)


def _session_lengths(random: np.random.Generator, num_events: int) -> NDArray[np.int64]:
    """Lengths that sum to ``num_events``, (S,); the last session is cut."""
    drawn = np.empty(0, dtype=np.int64)
    while drawn.sum() < num_events:
        count = int(num_events / MEAN_SESSION_EVENTS * 1.1) + 16
        drawn = np.concatenate([drawn, random.geometric(1 / MEAN_SESSION_EVENTS, count)])
    ends = np.cumsum(drawn)
    num_sessions = int(np.searchsorted(ends, num_events)) + 1
    lengths = drawn[:num_sessions].copy()
    lengths[-1] -= ends[num_sessions - 1] - num_events
    return lengths


def _draw_tastes(
    random: np.random.Generator,
    config: SyntheticConfig,
    population: Population,
    user: NDArray[np.int64],
) -> NDArray[np.int64]:
    """One of the tastes of each user, (E,)."""
    choice = _pick(np.cumsum(config.taste_shares), random.random(len(user)))
    return population.user_tastes[user, choice].astype(np.int64)


def _pick(
    cumulative: NDArray[np.float64],
    chance: NDArray[np.float64],
    low: NDArray[np.float64] | float = 0.0,
    high: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    """Index i with probability weight[i] / sum, within the range [low, high) of the sums.

    Never one of weight 0: ``low + chance (high - low)`` may round up to ``high``, which belongs to
    whatever comes next.
    """
    above = np.broadcast_to(cumulative[-1], chance.shape) if high is None else high
    point = np.minimum(low + chance * (above - low), np.nextafter(above, -np.inf))
    return np.searchsorted(cumulative, point, side="right")


def _arrivals(random: np.random.Generator, count: int) -> NDArray[np.float64]:
    """When each of ``count`` arrives, a fraction of the span; the first is there from the start."""
    arrivals = (random.random(count) - INITIAL_SHARE) / (1 - INITIAL_SHARE)
    arrivals[0] = 0.0
    return np.maximum(arrivals, 0.0)


def _lifetimes(random: np.random.Generator, count: int, median: float) -> NDArray[np.float64]:
    return median * np.exp(random.normal(0.0, ACTIVE_DAYS_SIGMA, count))


def _scramble(count: int, salt: int) -> NDArray[np.int64]:
    """``count`` distinct arbitrary 63-bit keys: a bijection of 0, 1, ..., so none collides."""
    mask = np.uint64((1 << 63) - 1)
    keys = np.arange(count, dtype=np.uint64) + np.uint64(salt)
    for factor, shift in ((0x9E37_79B9_7F4A_7C15, 31), (0xBF58_476D_1CE4_E5B9, 29)):
        keys = (keys * np.uint64(factor)) & mask  # odd factors have an inverse modulo 2**63
        keys ^= keys >> np.uint64(shift)
    return keys.astype(np.int64)


def _stream(config: SyntheticConfig, number: int) -> np.random.Generator:
    """Random numbers of their own for the population (0) and each slot (from 1)."""
    return np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(number,)))


def _join(parts: list[_Columns]) -> _Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in SCHEMA.names}
