"""Storage types and their rounding, against torch where it has an opinion."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cache_server.errors import CacheError
from cache_server.storage import (
    STORAGE_TYPES,
    StorageType,
    compute_dtype,
    decode,
    encode,
    stored_dtype,
)

# Halfway cases to even and to odd, the edges of the range, signed zeros, subnormals.
AWKWARD = np.array(
    [
        [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 1.005859375],
        [3.3895314e38, 3.4e38, -3.4e38, np.inf, -np.inf, 1e-45],
        [1.1754944e-38, -1e-40, 65504.0, 0.1, -1 / 3, 2.0**-133],
    ],
    np.float32,
)


def random_bits() -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 2**32, (4000, 7), np.uint32)
    return bits.view(np.float32)


@pytest.mark.parametrize("rows", [AWKWARD, random_bits()], ids=["awkward", "any bits"])
def test_bfloat16_rounds_as_torch_does(rows: np.ndarray) -> None:
    stored = encode(rows, "bfloat16")
    expected = torch.from_numpy(rows.copy()).to(torch.bfloat16)
    number = ~np.isnan(rows)
    assert stored.dtype == np.uint16
    expected_bits = expected.view(torch.uint16).numpy()
    assert np.array_equal(stored[number], expected_bits[number])
    decoded = decode(stored, "bfloat16")
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, expected.to(torch.float32).numpy(), equal_nan=True)


def test_every_nan_stays_nan_in_bfloat16() -> None:
    # Mantissa bits in the lower half only, or all ones: truncated infinite, rounded a zero.
    bits = np.array([[0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001, 0x7FC00000]], np.uint32)
    decoded = decode(encode(bits.view(np.float32), "bfloat16"), "bfloat16")
    assert np.isnan(decoded).all()
    assert np.array_equal(np.signbit(decoded), np.signbit(bits.view(np.float32)))


def test_float16_rounds_as_torch_does() -> None:
    rows = np.random.default_rng(1).standard_normal((500, 3)).astype(np.float32)
    expected = torch.from_numpy(rows).to(torch.float16).numpy()
    assert np.array_equal(encode(rows, "float16"), expected)


def test_float16_refuses_what_would_become_infinite() -> None:
    rows = np.array([[1.0, -70000.0]], np.float32)
    with pytest.raises(CacheError, match=r"does not fit(?s:.*)70000(?s:.*)65504(?s:.*)bfloat16"):
        encode(rows, "float16")
    infinite = np.array([[np.inf, np.nan]], np.float32)
    assert np.array_equal(encode(infinite, "float16"), infinite.astype(np.float16), equal_nan=True)


@pytest.mark.parametrize("storage", STORAGE_TYPES)
def test_what_was_stored_comes_back_unchanged(storage: StorageType) -> None:
    rows = np.random.default_rng(2).standard_normal((50, 5)).astype(compute_dtype(storage))
    stored = encode(rows, storage)
    assert stored.dtype == stored_dtype(storage)
    decoded = decode(stored, storage)
    assert decoded.dtype == compute_dtype(storage)
    assert decoded.flags.writeable
    assert np.array_equal(encode(decoded, storage), stored)
    tolerance = {"float64": 0, "float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[storage]
    assert np.allclose(decoded, rows, rtol=tolerance, atol=0)


@pytest.mark.parametrize("storage", STORAGE_TYPES)
def test_read_only_rows_decode_to_writable_ones(storage: StorageType) -> None:
    stored = encode(np.ones((2, 3), np.float32), storage)
    stored.flags.writeable = False
    decoded = decode(stored, storage)
    decoded += 1
    assert decoded.tolist() == [[2, 2, 2], [2, 2, 2]]
