"""From an address to an array inside compiled code, and to what lies there ahead of its use.

The index is many sub-tables and a table is many blocks, each its own allocation. A kernel reaches
all of them through one int64 array of their addresses; numba's typed lists would do it too, but
every process would compile them anew, for seconds.

Whoever passes an address keeps the array behind it alive: nothing here owns memory.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LINE_BYTES = 64
"""Of a processor's cache."""


@intrinsic
def int32_pointer(typingctx: Any, address: Any) -> Any:
    """The address, as a pointer to int32 for ``numba.carray``."""
    return types.CPointer(types.int32)(types.int64), _to_pointer


@intrinsic
def int64_pointer(typingctx: Any, address: Any) -> Any:
    """The address, as a pointer to int64 for ``numba.carray``."""
    return types.CPointer(types.int64)(types.int64), _to_pointer


@intrinsic
def uint64_pointer(typingctx: Any, address: Any) -> Any:
    """The address, as a pointer to uint64 for ``numba.carray``."""
    return types.CPointer(types.uint64)(types.int64), _to_pointer


def _to_pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.inttoptr(args[0], context.get_value_type(signature.return_type))


@intrinsic
def _touch_line(typingctx: Any, address: Any) -> Any:
    """Asks the processor for the line at an address, without waiting; no address is wrong."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(32)
        pointer = builder.inttoptr(args[0], cgutils.voidptr_t)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number]),
            "llvm.prefetch.p0",
        )
        # To be read, as near as can be, data.
        builder.call(function, [pointer, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), emit


@njit(nogil=True, cache=True, inline="always")
def touch(address, nbytes):  # type: ignore[no-untyped-def]
    """Asks the processor for memory that will be read soon.

    Reads in no order wait for memory one after the other; several that are asked for wait together.
    """
    for offset in range(0, nbytes, LINE_BYTES):
        _touch_line(address + offset)
