"""A process that runs out of memory: the kernel ends it, in a memory cgroup whose limit is below the next page that it takes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from bench.lab.processes import is_alive

VERSIONS = (
    ("memory", "memory.limit_in_bytes"),
    ("", "memory.max"),
)  # cgroups 1 and 2: folder of /sys/fs/cgroup, name of the limit
ROOT = Path("/sys/fs/cgroup")
LIMIT_BYTES = 4096  # what it has already counts for its former cgroup
PATIENCE_S = 1.0  # a process that takes no page is killed all the same


def kill_for_memory(pid: int, name: str) -> str:
    """Who ended it: "kernel", or "signal" where the kernel did not. `name`: of a cgroup that nobody else uses."""
    group = None
    try:
        group = limited_group(name)
        if group:
            (group / "cgroup.procs").write_text(str(pid))
            deadline = time.monotonic() + PATIENCE_S
            while is_alive(pid) and time.monotonic() < deadline:
                time.sleep(0.005)
    except OSError:
        pass  # this machine lets nobody do that
    by = "signal" if is_alive(pid) else "kernel"
    if by == "signal":
        os.kill(pid, signal.SIGKILL)
    remove(group, pid)
    return by


def limited_group(name: str) -> Path | None:
    """A new memory cgroup, if this machine has any."""
    for folder, limit in VERSIONS:
        if folder and not (ROOT / folder / "cgroup.procs").exists():
            continue
        group = ROOT / folder / name
        group.mkdir()
        if not (group / limit).exists():
            group.rmdir()
            continue
        (group / limit).write_text(str(LIMIT_BYTES))
        return group
    return None


def remove(group: Path | None, pid: int) -> None:
    """Its cgroup goes once the process has left it."""
    deadline = time.monotonic() + PATIENCE_S
    while group and group.exists() and time.monotonic() < deadline:
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.005)
