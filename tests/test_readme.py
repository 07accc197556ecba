"""The commands of the README that a newcomer types for their own data do what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_your_own_data(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("## Your own data")[1]
    found = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert found is not None
    commands = found.group(1)
    assert commands.count("felrec ") == 3
    write_clicks(tmp_path / "clicks.csv")
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "most popular" in done.stdout
    assert "released protocol" in done.stdout
    for file in ("config.yaml", "evaluation/test-causal.parquet", "evaluation/test-released.json"):
        assert (tmp_path / "runs/clicks" / file).exists()


def test_every_path_it_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\]\((docs/[^)]+)\)", text))
    named |= set(re.findall(r"`((?:configs|felrec_dist|launch|docs)/[\w/.-]+)`", text))
    named |= {folder.rstrip("/") for folder in re.findall(r"^\| `([a-z_]+/)`", text, re.MULTILINE)}
    assert len(named) > 8
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert not missing


def write_clicks(path: Path) -> None:
    generator = np.random.default_rng(0)
    num_events = 3_000
    users = generator.zipf(1.4, num_events) % 200
    items = generator.zipf(1.3, num_events) % 100
    times = np.sort(generator.integers(1_600_000_000, 1_700_000_000, num_events))
    rows = "\n".join(f"{u},{i},{t}" for u, i, t in zip(users, items, times, strict=True))
    path.write_text(f"user_id,item_id,time\n{rows}\n")
