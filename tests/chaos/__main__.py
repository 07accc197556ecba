"""``make chaos``: kills processes of trainings until the time is over, and prints a table."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from felrec_dist.errors import FelrecError
from tests.chaos.kills import EPOCHS, KINDS, Kill, Killer, experiment, prepare_events, train
from tests.ray_sessions import ray_session
from tests.runs import differences
from tests.tiny import BATCH


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="in a run")
    parser.add_argument("--runs", type=int, default=3, help="each with a seed of its own")
    parser.add_argument("--minutes", type=float, default=60.0, help="limit for all of it")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--merciless", action="store_true", help="kill while runs recover, too")
    options = parser.parse_args()

    page = Console(width=120)
    deadline = time.monotonic() + 60.0 * options.minutes
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    dataset = prepare_events(folder, options.kills)
    num_steps = EPOCHS * (len(dataset.split.train) // BATCH)
    undisturbed = experiment(dataset.url, str(folder / "undisturbed"))
    kills: list[Kill] = []
    num_equal = 0
    with ray_session():
        train(undisturbed, timeout_s=deadline - time.monotonic())
        seeds = range(options.seed, options.seed + options.runs)
        for seed in seeds:
            killed = experiment(dataset.url, str(folder / f"killed-{seed}"))
            killer = Killer(
                killed, num_steps, options.kills, seed, options.kinds, options.merciless
            )
            began = time.monotonic()
            try:
                with killer:
                    train(killed, killer, timeout_s=max(0.0, deadline - began))
                found = differences(undisturbed.run.url, killed.run.url)
            except FelrecError as error:
                found = [str(error)]
            kills += killer.kills
            num_equal += not found
            page.print(
                f"seed {seed}: {num_steps} steps, {len(killer.kills)} kills and "
                f"{killer.num_more} while it recovered, {killer.num_lost} times back, "
                f"{time.monotonic() - began:.0f} s, "
                + ("; ".join(found) if found else "equal to the run that nothing happened to")
            )
            if time.monotonic() > deadline:
                break
    page.print(_table(kills))
    if num_equal < len(seeds):
        page.print(f"{num_equal} of {len(seeds)} runs ended equal; {folder} is kept")
        return 1
    shutil.rmtree(folder)
    return 0


def _table(kills: Sequence[Kill]) -> Table:
    table = Table("killed", title="seconds after a kill -9")
    for name in ("kills", "noticed, median", "max", "training again, median", "max"):
        table.add_column(name, justify="right")
    kinds = [kind for kind in KINDS if any(kill.kind == kind for kill in kills)]
    for name, of_kind in [(kind, [kind]) for kind in kinds] + [("all", kinds)]:
        some = [kill for kill in kills if kill.kind in of_kind]
        noticed = [kill.noticed_s for kill in some]
        recovered = [kill.recovered_s for kill in some if kill.recovered_s is not None]
        cells = [f(s) for s in (noticed, recovered) if s for f in (statistics.median, max)]
        table.add_row(name, f"{len(some)}", *(f"{cell:.1f}" for cell in cells))
    return table


if __name__ == "__main__":
    sys.exit(main())
