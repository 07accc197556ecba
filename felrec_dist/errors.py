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
    └── TrainingError (RuntimeError)
        └── NonFiniteLossError     the loss is NaN or infinite
"""

from __future__ import annotations

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
    "ShardLostError",
    "SnapshotError",
    "TrainingError",
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


class TrainingError(FelrecError, RuntimeError):
    """Training cannot go on."""


class NonFiniteLossError(TrainingError):
    """The loss of a step is NaN or infinite."""
