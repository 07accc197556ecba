"""The snippets of docs/snapshots.md read a chain as they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.cache_server.test_snapshot_chains import NUM_KEYS, write_chain

DOCS = Path(__file__).parents[2] / "docs" / "snapshots.md"


def test_files_are_read_without_the_cache(tmp_path: Path) -> None:
    write_chain(tmp_path / "cache", 1)
    for step, name in enumerate("abc"):
        (tmp_path / "cache" / str(step)).rename(tmp_path / "cache" / name)
    section = DOCS.read_text().split("## Reading them elsewhere")[1]
    snippets = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(snippets) == 2
    done = subprocess.run(
        [sys.executable, "-c", "".join(snippets)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one_file, whole_chain = done.stdout.strip().split("\n\n")
    assert re.findall(r"│ +(\d+) │ +(\d+) │ \[-?\d", one_file) == [
        (str(position), str(position)) for position in (59, 58, 57)
    ]
    # 60 users, of which the first delta wrote 5 again, and 5 new ones.
    assert re.findall(r"│ +(\d+) │", whole_chain) == [str(NUM_KEYS + 5)]
