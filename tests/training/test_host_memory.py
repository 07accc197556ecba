"""Memory that the tensors of one step freed serves those of the next."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from felrec_dist.training import host_memory

# Steps of tensors of 36 MB and more: prints the pages that the system gave for the last five.
PROGRAM = """
import resource, sys
import torch
from felrec_dist.training.host_memory import keep_freed_memory

done = keep_freed_memory() if sys.argv[1] == "keep" else None
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(size) for size in (10_000_000, 16_000_000, 9_000_000)]
    tensors.append(2 * tensors[0])
    del tensors
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(done, sum(faults[-5:]))
"""


def run(mode: str, **variables: str) -> tuple[str, int]:
    environment = {name: v for name, v in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    answer, faults = done.stdout.split()
    return answer, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_the_system_gives_no_new_pages() -> None:
    _, without = run("leave")
    answer, kept = run("keep")
    assert answer == "True"
    assert kept < without / 20


def test_who_sets_the_variables_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not host_memory.keep_freed_memory()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not host_memory._set(-4, 0)
