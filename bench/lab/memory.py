"""A process that runs out of memory: the kernel ends it, in a memory cgroup whose limit is below the next page that it takes.

A process in its steady state may take none for long, so it is made to: who writes to a page of a library through /proc/PID/mem (what stands
there already) makes the process take a page of its own for it.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from bench.lab.processes import is_alive

# Of cgroups 1 and 2: folder of /sys/fs/cgroup, name of the limit.
VERSIONS = (("memory", "memory.limit_in_bytes"), ("", "memory.max"))
ROOT = Path("/sys/fs/cgroup")
LIMIT_BYTES = 4096  # what it has already counts for its former cgroup
PATIENCE_S = 0.2  # then the process is killed all the same
PAGES = 256  # more than the kernel reckons with in advance


def kill_for_memory(pid: int, name: str) -> str:
    """Who ended it: "kernel", or "signal" where the kernel did not. `name`: of a cgroup that nobody else uses."""
    group = None
    try:
        group = limited_group(name)
        if group:
            (group / "cgroup.procs").write_text(str(pid))
            take_pages(pid)
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


def take_pages(pid: int) -> None:
    """Makes a process take pages until it is ended for it."""
    places = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, rights, *_, path = line.split(maxsplit=5)
        if rights == "r-xp" and path.startswith("/"):
            first, end = (int(address, 16) for address in addresses.split("-"))
            places += range(first, end, 4096)
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for place in places[:PAGES]:
            if not is_alive(pid):
                return
            os.pwrite(memory.fileno(), os.pread(memory.fileno(), 1, place), place)


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
