"""Processes of this machine, as /proc tells of them."""

from __future__ import annotations

import os
from pathlib import Path


def _alive() -> list[tuple[int, int, int, str]]:
    """Pid, parent, session and command line of each process that is no zombie."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                words = stat.with_name("cmdline").read_text().replace("\0", " ").strip()
                found.append((int(stat.parent.name), int(parent), int(session), words))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def processes_in(session: int) -> list[str]:
    """Command lines of the processes of a session: what a stopped run left behind."""
    return [words[:80] for _, _, of, words in _alive() if of == session]


def actors(class_name: str, ancestor: int | None = None) -> list[int]:
    """Pids of the Ray actors of a class whose Ray a process started, by default this one."""
    parents, titles = {}, {}
    for pid, parent, _, words in _alive():
        parents[pid], titles[pid] = parent, words
    ancestor = os.getpid() if ancestor is None else ancestor

    def descends(pid: int) -> bool:
        while pid in parents and pid != ancestor:
            pid = parents[pid]
        return pid == ancestor

    # The title of an actor is ray::Class, with .method while it runs one.
    return sorted(
        pid
        for pid, title in titles.items()
        if title.partition(".")[0] == f"ray::{class_name}" and descends(pid)
    )


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    return any(pid == other for other, *_ in _alive())
