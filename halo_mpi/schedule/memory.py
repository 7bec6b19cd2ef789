"""Whether the memory of every host holds what its ranks need, found out before anything is loaded."""

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from halo_mpi.errors import MemoryBudgetError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int | None:
    """A number of bytes, as in 800M, 1.5G or 2GiB; None if it is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    return int(float(match[1]) * _UNITS[match[2].upper()]) if match else None


@dataclass(frozen=True, slots=True)
class Need:
    """What one rank needs and what its host has, in bytes."""

    rank: int
    host: str
    machine: str  # two hosts of one name are two machines
    weights: int  # that stay in memory, with the room for others
    cache: int
    resident: int  # already taken by the program itself
    available: int  # free on the host, shared by its ranks
    budget: int | None  # --memory, of weights and cache of one rank
    program: int  # what the program will take in the end, beside weights and cache


def available_bytes() -> int:
    """Memory that this process may still take: free on the host, and below the limits of its control groups."""
    free = psutil.virtual_memory().available
    for folder in _memory_groups():
        for limit_file, used_file, idle in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                limit, used = (folder / limit_file).read_text().strip(), int((folder / used_file).read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                if limit != "max":
                    free = min(free, int(limit) - used + int(statistics.get(idle, 0)))  # idle page cache is given back
            except (OSError, ValueError):
                continue  # the other version's files, or a group without a limit
    return max(0, free)


def free_bytes(ranks_on_host: int, program_bytes: int) -> int:
    """What one of so many ranks may take for weights and cache; `program_bytes`: what the program takes in the end."""
    program = max(0, program_bytes - psutil.Process().memory_info().rss)  # what it will take beside them
    return max(0, available_bytes() // ranks_on_host - program)


def _memory_groups() -> list[Path]:
    """This process's memory control group and those around it, of either version; none on other systems."""
    groups = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return groups
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = Path("/sys/fs/cgroup", controllers)
            group = root / path.lstrip("/")
            groups += [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
    return groups


def check_memory(needs: list[Need], context: int) -> None:
    """Raise MemoryBudgetError if a rank needs more than its `--memory`, or the ranks of a host together more than is free."""
    advice = f"use more ranks or hosts, a smaller model, or fewer --max-tokens (KV cache of {context} tokens)"
    for need in needs:
        total = need.weights + need.cache
        if need.budget is not None and total > need.budget:
            raise MemoryBudgetError(
                f"rank {need.rank} on {need.host} needs at least {-(-total // 2**20)} MiB ({_parts(need)}) but --memory allows "
                f"{mebibytes(need.budget)}; {advice}"
            )
    for machine in sorted({need.machine for need in needs}):
        here = [need for need in needs if need.machine == machine]
        programs = sum(max(0, need.program - need.resident) for need in here)
        total = sum(need.weights + need.cache for need in here) + programs
        free = min(need.available for need in here)
        if total > free:
            ranks = ", ".join(str(need.rank) for need in here)
            raise MemoryBudgetError(
                f"host {here[0].host} (rank {ranks}) needs {mebibytes(total)} (weights {mebibytes(sum(n.weights for n in here))}, "
                f"KV cache {mebibytes(sum(n.cache for n in here))}, programs {mebibytes(programs)}) "
                f"but has {mebibytes(free)} free; {advice}, or --memory, to read weights from disk at every token"
            )


def _parts(need: Need) -> str:
    return f"weights {mebibytes(need.weights)}, KV cache {mebibytes(need.cache)}"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
