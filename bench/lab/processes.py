"""Processes of the lab's hosts, as /proc tells of them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from bench.lab.system import LabError, pids_in

RANK = b"OMPI_COMM_WORLD_RANK="


def rank_of(pid: int) -> int | None:
    """The number of the rank that a process belongs to, by its environment."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(variable[len(RANK) :]) for variable in variables if variable.startswith(RANK)), None)


def program_of(pid: int) -> str:
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name
    except OSError:
        return ""


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def network_of(pid: int) -> int | None:
    """The inode of the network namespace that a process stands in."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None


def read_pid(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def process_fields(pid: int) -> list[str]:
    """Fields of proc_pid_stat(5) from the third on: state, parent, ...; of a process that has ended: that it is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X"] + ["0"] * 49


def parent_of(pid: int) -> int:
    return int(process_fields(pid)[1])


def started_at(pid: int) -> str:
    """In clock ticks since the machine's start; with the pid, unique."""
    return process_fields(pid)[19]


def is_alive(pid: int) -> bool:
    return process_fields(pid)[0] not in "ZX"


def end_processes(namespace: str) -> None:
    deadline = time.monotonic() + 10
    while pids := [pid for pid in pids_in(namespace) if is_alive(pid)]:
        if time.monotonic() > deadline:
            raise LabError(f"processes {pids} in {namespace} do not end")
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.02)
