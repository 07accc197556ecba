"""The slow truth: a cache as one dictionary a table, and its digest in plain Python integers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cache_server.storage import Rows

_MASK = 2**64 - 1


class DictCache:
    """key -> (version, row); the highest version wins, an equal one repeats."""

    def __init__(self, width: int, dtype: str) -> None:
        self._zeros = np.zeros(width, dtype)
        self.rows: dict[int, tuple[int, Rows]] = {}

    def write(self, keys: Iterable[int], versions: Iterable[int], rows: Iterable[Rows]) -> None:
        for key, version, row in zip(keys, versions, rows, strict=True):
            if key not in self.rows or version > self.rows[key][0]:
                self.rows[int(key)] = (int(version), row.copy())

    def fetch(self, keys: Iterable[int]) -> tuple[Rows, NDArray[np.bool_]]:
        rows = [self.rows.get(int(key), (0, self._zeros))[1] for key in keys]
        found = [int(key) in self.rows for key in keys]
        shape = (len(rows), self._zeros.size)
        return np.array(rows, self._zeros.dtype).reshape(shape), np.array(found, np.bool_)

    def digest(self) -> int:
        return sum(row_hash(key, *self.rows[key]) for key in self.rows) & _MASK


def splitmix64(key: int) -> int:
    z = (key + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def row_hash(key: int, version: int, row: Rows) -> int:
    data = row.tobytes()
    data += bytes(-len(data) % 8)
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    prime = 0x9FB21C651E98DF25
    seed = splitmix64(splitmix64(key & _MASK) ^ version)
    lanes = [(seed + lane * prime) & _MASK for lane in range(4)]
    for j, word in enumerate(words):
        value = lanes[j % 4] ^ (word * prime & _MASK)
        rotated = ((value << 31) | (value >> 33)) & _MASK
        lanes[j % 4] = rotated * 0xD6E8FEB86659FD93 & _MASK
    for lane in lanes:
        seed = splitmix64(seed ^ lane)
    return seed
