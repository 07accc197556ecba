"""A fixed vector for each id: what it reads as where the cache has nothing to say.

The cache of the paper starts from zeros, so an entity without history carries no identity. A random
sign vector gives it one without a parameter: vectors of different ids are nearly orthogonal (random
projections).

Shape legend: M ids, D width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cache_server.hashing import mix64


def identity_rows(
    ids_M: npt.NDArray[np.int64], width: int, *, salt: int
) -> npt.NDArray[np.float32]:
    """Returns (M, D) of +1 and -1: a pure function of id and salt, the same in every process.

    Args:
        ids_M: keys.
        width: D.
        salt: keeps the users' vectors apart from the items'.
    """
    num_words = -(-width // 64)
    seeds_M = mix64(mix64(ids_M).view(np.int64) + salt).view(np.int64)
    words_Mw = seeds_M[:, None] + np.arange(1, num_words + 1, dtype=np.int64)
    bits = np.unpackbits(mix64(words_Mw.ravel()).view(np.uint8)).reshape(len(ids_M), 64 * num_words)
    return (2.0 * bits[:, :width] - 1.0).astype(np.float32)
