"""From MovieLens-100K to a report: both variants of FELRec beside popularity, as one HTML page.

    python examples/movielens_to_report.py                      downloads 5 MB from GroupLens
    python examples/movielens_to_report.py --ratings u.data     takes a file that is there

One epoch of each takes about a minute on two cores; settings may follow, as
training.schedule.epochs=10. Read GroupLens' terms before you use the data.
"""

# %%
from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from felrec_dist.config import load_config
from felrec_dist.data.dataset import MANIFEST, PreparedDataset
from felrec_dist.data.download import download
from felrec_dist.data.prepare import prepare
from felrec_dist.data.sources import RawSource
from felrec_dist.evaluation.compare import ReportedRun, compare, to_text
from felrec_dist.reporting.page import render
from felrec_dist.reporting.runs import read_runs
from felrec_dist.training.trainer import NoProgress
from launch import local

parser = argparse.ArgumentParser()
parser.add_argument("--ratings", type=Path, help="u.data, its folder, or the .zip")
parser.add_argument("--out", type=Path, default=Path("runs/movielens_to_report"))
arguments, settings = parser.parse_known_args()

# %% [markdown]
# Download what is not there, and prepare it: sorted, split by time, histories indexed.

# %%
data = arguments.out / "data"
if (data / MANIFEST).exists():
    dataset = PreparedDataset.open(data)
else:
    ratings = arguments.ratings or download("ml-100k", arguments.out)
    dataset = prepare(RawSource.from_name("ml-100k", ratings), str(data), name="ml-100k")
print(dataset)

# %% [markdown]
# Train and test. One epoch is enough to see what happens, not for figures to quote.

# %%
runs = []
for variant in ("q", "p"):
    config = load_config(
        str(files("configs") / f"ml-100k_{variant}.yaml"),
        [
            f"data.url={dataset.url}",
            f"run.url={arguments.out / variant}",
            "cluster.num_workers=1",
            "training.schedule.epochs=1",
            "training.schedule.warmup_epochs=0",
            *settings,
        ],
    )
    local.train(config, resume=True, progress=NoProgress())
    runs.append(config.run.url)

# %% [markdown]
# The same figures as a table here, and as a page for the browser. `felrec compare` and
# `felrec report` do this from the command line.

# %%
print(to_text(compare([ReportedRun.read(run, "causal") for run in runs]), ["rank", "hr"]))
page = arguments.out / "report.html"
page.write_text(render(read_runs(runs, "causal")), encoding="utf-8")
print(page)
