"""The tree of errors. Catch ``FelrecError`` for all of them.

::

    FelrecError                    cache_server.errors
    ├── InputError (ValueError)    the user's mistake: fix the input and run again
    │   ├── ConfigError            a config value or key
    │   ├── RawDataError           a raw file that cannot be prepared
    │   ├── DatasetError           a prepared data set that cannot be read
    │   └── CheckpointError        a checkpoint that is missing, incomplete or of another run
    ├── CacheError (RuntimeError)  cache_server.errors
    │   ├── CacheTimeoutError (TimeoutError)
    │   ├── ShardLostError
    │   └── SnapshotError
    ├── DownloadError (OSError)    a public data set that cannot be fetched
    ├── StorageError (OSError)     a storage that is full, not writable or not reached
    └── TrainingError (RuntimeError)
        ├── NonFiniteLossError     the loss is NaN or infinite
        ├── RunStoppedError        somebody asked the run to stop
        └── WorkerFailedError      a worker died, or raised what nobody foresaw
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cache_server.errors import (
    CacheError,
    CacheTimeoutError,
    FelrecError,
    ShardLostError,
    SnapshotError,
)

__all__ = [
    "CacheError",
    "CacheTimeoutError",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "DownloadError",
    "FelrecError",
    "InputError",
    "NonFiniteLossError",
    "RawDataError",
    "RunStoppedError",
    "ShardLostError",
    "SnapshotError",
    "StorageError",
    "TrainingError",
    "WorkerFailedError",
]


class InputError(FelrecError, ValueError):
    """The input is wrong; nothing was changed."""


class ConfigError(InputError):
    """A config value breaks a rule, or a key is unknown."""


class RawDataError(InputError):
    """A raw interaction file cannot be prepared."""


class DatasetError(InputError):
    """A prepared data set is missing, damaged, or of another schema version."""


class CheckpointError(InputError):
    """A checkpoint is missing, incomplete, or belongs to another run."""


class DownloadError(FelrecError, OSError):
    """A public data set cannot be fetched, or its content is not what was published."""


class StorageError(FelrecError, OSError):
    """A storage refuses: full, not writable, not reachable."""


class TrainingError(FelrecError, RuntimeError):
    """Training cannot go on."""


class NonFiniteLossError(TrainingError):
    """The loss of a step is NaN or infinite."""


class RunStoppedError(TrainingError):
    """The run was asked to stop and did, at a step's end."""


class WorkerFailedError(TrainingError):
    """A worker's process died, or raised an error that is none of ours."""


@contextmanager
def storage_errors(what: str, url: str) -> Iterator[None]:
    """Turns whatever the storage's library raises in the body into a ``StorageError``.

    Args:
        what: what could not be done, one sentence.
        url: where.
    """
    try:
        yield
    except FelrecError:
        raise
    except Exception as error:  # each storage has errors of its own
        raise StorageError(
            what,
            where=url,
            got=f"{type(error).__name__}: {error}",
            remedy="check the address, the rights, the connection and the free space",
        ) from error
