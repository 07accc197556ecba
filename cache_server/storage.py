"""How rows are kept: the storage types, and the conversion to and from the type that the model
computes in.

bfloat16 has no NumPy type; its 16 bits are kept in uint16. Conversion happens in the client, so
that narrow rows travel.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cache_server.errors import CacheError

StorageType = Literal["float64", "float32", "float16", "bfloat16"]
STORAGE_TYPES: Final[tuple[str, ...]] = get_args(StorageType)

Rows: TypeAlias = NDArray[Any]
"""Rows in a storage type or a compute type."""

_STORED_AS = {
    "float64": "float64",
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "uint16",
}

_BF16_SHIFT = np.uint32(16)
_BF16_HALF_LESS_ONE = np.uint32(0x7FFF)
_BF16_QUIET_NAN = np.uint32(0x0040)
_ONE = np.uint32(1)
_FLOAT32_INFINITY = np.uint32(0x7F800000)
_FLOAT32_WITHOUT_SIGN = np.uint32(0x7FFFFFFF)


def stored_dtype(storage: StorageType) -> np.dtype[Any]:
    """The NumPy type whose bits are stored."""
    return np.dtype(_STORED_AS[storage])


def compute_dtype(storage: StorageType) -> np.dtype[Any]:
    """The type rows have outside of the cache: float64 for float64, else float32."""
    return np.dtype("float64" if storage == "float64" else "float32")


def encode(rows: Rows, storage: StorageType) -> Rows:
    """Rows of floats (M, D) as they are stored; rounds to nearest even.

    Raises:
        CacheError: a finite value is too large for float16, which would store infinity.
    """
    rows = np.ascontiguousarray(rows)
    if storage == "bfloat16":
        return _float32_to_bfloat16(rows.astype(np.float32, copy=False).view(np.uint32))
    try:
        with np.errstate(over="raise"):
            return rows.astype(stored_dtype(storage), copy=False)
    except FloatingPointError as error:
        raise CacheError(
            f"A representation does not fit the cache's storage type {storage}.",
            got=f"largest magnitude {np.nanmax(np.abs(rows))}",
            expected=f"at most {np.finfo(stored_dtype(storage)).max}",
            remedy="Store bfloat16, which has the range of float32, or float32.",
        ) from error


def decode(rows: Rows, storage: StorageType) -> Rows:
    """Stored rows (M, D) in the compute type, writable; the array itself where no conversion is
    needed.
    """
    if storage != "bfloat16" and rows.dtype == compute_dtype(storage) and rows.flags.writeable:
        return rows
    out = np.empty(rows.shape, compute_dtype(storage))
    if storage == "bfloat16":
        _bfloat16_to_float32(rows, out.view(np.uint32))
    else:
        out[...] = rows
    return out


@njit(nogil=True, cache=True)
def _float32_to_bfloat16(bits):  # type: ignore[no-untyped-def]
    out = np.empty(bits.shape, np.uint16)
    for i in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            word = np.uint32(bits[i, j])
            if (word & _FLOAT32_WITHOUT_SIGN) > _FLOAT32_INFINITY:
                # Rounding could carry a NaN's mantissa into the exponent or away.
                rounded = (word >> _BF16_SHIFT) | _BF16_QUIET_NAN
            else:
                odd = (word >> _BF16_SHIFT) & _ONE
                rounded = (word + _BF16_HALF_LESS_ONE + odd) >> _BF16_SHIFT
            out[i, j] = np.uint16(rounded)
    return out


@njit(nogil=True, cache=True)
def _bfloat16_to_float32(rows, out):  # type: ignore[no-untyped-def]
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            out[i, j] = np.uint32(rows[i, j]) << _BF16_SHIFT
