"""Reading a run's cache from Python: vectors of users and items, without the model.

    python examples/reading_a_cache.py runs/demo

The run was trained on this machine or anywhere: any fsspec URL will do.
"""

# %%
from __future__ import annotations

import argparse
from collections import Counter

import fsspec
import numpy as np
import pyarrow as pa

from cache_server import CacheClient, InProcessTransport
from cache_server.contents import snapshot_contents
from felrec_dist.config import parse_config
from felrec_dist.data.dataset import PreparedDataset
from felrec_dist.training.checkpoint import CheckpointStore, read_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("run", nargs="?", default="runs/demo", help="the folder of a run")
arguments, _ = parser.parse_known_args()

# %% [markdown]
# A checkpoint's manifest says where the run stood and which files its cache is made of. Reading it
# verifies sizes and SHA-256; nothing is unpickled.

# %%
newest = CheckpointStore(arguments.run).latest()
if newest is None:
    raise SystemExit(f"{arguments.run} holds no checkpoint")
checkpoint = read_checkpoint(newest, with_dense=False)
config = parse_config(checkpoint.config, where=checkpoint.url)
print(f"{checkpoint.url}: epoch {checkpoint.position.epoch}, {config.model.variant}")
for part in checkpoint.chain.parts:
    kind = "all rows" if part.since is None else f"rows written since position {part.since}"
    print(f"  {part.path}: {part.num_rows:,} {part.table} rows, {part.nbytes:,} bytes, {kind}")

# %% [markdown]
# Digests of whole tables: two caches are equal if these are, whatever their numbers of shards.

# %%
tables = config.cache_tables()
contents = snapshot_contents(checkpoint.cache_prefix, checkpoint.chain.parts, tables)
for name, digests in contents.items():
    print(f"  {name}: {digests.total_rows:,} rows, digest {digests.digest:016x}")

# %% [markdown]
# The cache itself, restored into one shard in this process. Rows are fetched by key; keys are the
# ids of the raw data, or, where those are text, the indices of the catalogue.

# %%
cache = CacheClient(InProcessTransport(tables))
cache.restore(checkpoint.cache_prefix, checkpoint.chain.parts, generation=1, step=0)
dataset = PreparedDataset.open(config.data.url)
items = cache.fetch(0, {"item": dataset.items.ids})["item"]
print(f"{int(items.found.sum()):,} of {len(dataset.items):,} items, {items.rows.shape[1]} numbers")

# %% [markdown]
# Which items are neighbours? Cosines of the most popular one with all others.

# %%
present = np.flatnonzero(items.found)
units = items.rows[present] / np.linalg.norm(items.rows[present], axis=1, keepdims=True)
popular = int(np.argmax(dataset.items.train_counts[present]))
cosines = units @ units[popular]
nearest = np.argsort(-cosines, kind="stable")[1:6]
print(f"nearest to item {dataset.items.ids[present[popular]]}:")
for place in nearest:
    print(f"  {cosines[place]:.3f}  item {dataset.items.ids[present[place]]}")

# %% [markdown]
# Every file is Arrow IPC (docs/snapshots.md): any Arrow reader opens it without this package. The
# version of a row is the position of the event that wrote it, so versions tell how old rows are.

# %%
age: Counter[str] = Counter()
for part in checkpoint.chain.parts:
    with fsspec.open(f"{checkpoint.cache_prefix}/{part.path}", "rb") as file:
        versions = pa.ipc.open_file(file).read_all()["version"].to_numpy()
    behind = checkpoint.position.next_position - versions
    age["rows"] += versions.size
    age["written in the last tenth of the events"] += int(
        (behind <= dataset.num_events // 10).sum()
    )
print(dict(age))
