"""From an address to an array inside compiled code.

The index is many sub-tables and a table is many blocks, each its own allocation. A kernel reaches
all of them through one int64 array of their addresses; numba's typed lists would do it too, but
every process would compile them anew, for seconds.

Whoever passes an address keeps the array behind it alive: nothing here owns memory.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic


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
