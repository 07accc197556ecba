"""Your own data in ten minutes: from a CSV of clicks to recommendations.

    python examples/my_own_data.py
    python examples/my_own_data.py --csv clicks.csv --user user_id --item item_id --timestamp time

Settings may follow, as training.schedule.epochs=4. The cells run in any editor that knows ``# %%``.
"""

# %%
from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from cache_server import CacheClient, InProcessTransport
from felrec_dist.config import load_config
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource
from felrec_dist.data.synthetic import SyntheticConfig, synthesize
from felrec_dist.evaluation.report import read_report
from felrec_dist.training.checkpoint import read_checkpoint
from felrec_dist.training.trainer import NoProgress
from launch import local

parser = argparse.ArgumentParser()
parser.add_argument("--csv", type=Path, help="default: made-up clicks")
parser.add_argument("--user", default="user_id")
parser.add_argument("--item", default="item_id")
parser.add_argument("--timestamp", default="time")
parser.add_argument("--timestamp-unit", default="ms", choices=["s", "ms", "us", "iso"])
parser.add_argument("--out", type=Path, default=Path("runs/my_own_data"))
parser.add_argument("--num-events", type=int, default=30_000, help="of the made-up clicks")
arguments, settings = parser.parse_known_args()
arguments.out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# A CSV needs a user, an item and a time; ids may be numbers or text. Without one of yours, clicks
# are made up: six communities of taste, users and items that keep arriving.

# %%
csv = arguments.csv
if csv is None:
    made_up = SyntheticConfig(
        num_events=arguments.num_events,
        num_users=500,
        num_items=400,
        num_tastes=6,
        taste_strength=0.99,
        closedness=0.92,
    )
    events = pq.read_table(synthesize(arguments.out / "clicks.parquet", made_up))
    columns = {
        arguments.user: events["user"],
        arguments.item: [f"item {item}" for item in events["item"].to_pylist()],
        arguments.timestamp: events["timestamp"].cast(pa.int64()),
    }
    csv = arguments.out / "clicks.csv"
    pyarrow.csv.write_csv(pa.table(columns), csv)

# %% [markdown]
# Preparing sorts the events by time, splits them and indexes the histories. It is done once.

# %%
source = RawSource.csv(
    csv,
    user=arguments.user,
    item=arguments.item,
    timestamp=arguments.timestamp,
    timestamp_unit=arguments.timestamp_unit,
)
dataset = prepare(source, str(arguments.out / "data"), name="clicks", overwrite=True)
print(f"{dataset.num_events:,} events, {dataset.num_users:,} users, {dataset.num_items:,} items")

# %% [markdown]
# The config of the demo is one that learns from few events. A run that is started again goes on
# where it stopped; another folder begins anew.

# %%
config = load_config(
    str(files("configs") / "demo.yaml"),
    [
        f"data.url={dataset.url}",
        f"run.url={arguments.out / 'run'}",
        "cluster.num_workers=1",
        "training.schedule.epochs=2",
        *settings,
    ],
)
local.train(config, resume=True, progress=NoProgress())
report = read_report(config.run.url, config.evaluation.protocol)
for model, by_partition in report.rows.items():
    total = by_partition["total"]
    print(f"{model}: rank {total.normalized_rank:.3f}, HR@{report.k} {100 * total.hit_rate:.1f} %")

# %% [markdown]
# The cache of the checkpoint that was tested holds a vector of every user and item that occurred
# before the test. What a user is recommended are the items whose vectors point its way.

# %%
checkpoint = read_checkpoint(report.checkpoint_url, with_dense=False)
cache = CacheClient(InProcessTransport(config.cache_tables()))
cache.restore(checkpoint.cache_prefix, checkpoint.chain.parts, generation=1, step=0)


def top_items(user_index: int, num_items: int = 5) -> list[tuple[str, float]]:
    """Returns names and cosines of the items nearest to a user, from the best on."""
    rows = cache.fetch(0, {"user": dataset.users.ids[[user_index]], "item": dataset.items.ids})
    lengths = np.linalg.norm(rows["item"].rows, axis=1) * np.linalg.norm(rows["user"].rows)
    cosines = rows["item"].rows @ rows["user"].rows[0] / np.maximum(lengths, 1e-12)
    cosines[~rows["item"].found] = -np.inf  # they come only later
    names = dataset.items.names
    best = np.argsort(-cosines, kind="stable")[:num_items]
    return [
        (str(dataset.items.ids[i]) if names is None else names[i].as_py(), float(cosines[i]))
        for i in best
    ]


most_active = int(np.argmax(dataset.users.train_counts))
print(f"the user with most events, {dataset.users.ids[most_active]}, would get:")
for name, cosine in top_items(most_active):
    print(f"  {cosine:.3f}  {name}")
