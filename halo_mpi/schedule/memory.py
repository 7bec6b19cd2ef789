"""Whether the memory of every host holds what its ranks need, found out before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from halo_mpi.errors import MemoryBudgetError

BASE_BYTES = 320 * 2**20  # interpreter, torch and MPI of one rank: 284 to 324 MB (rss_bytes - weights_bytes in reports)


@dataclass(frozen=True, slots=True)
class Need:
    """What one rank needs and what its host has, in bytes."""

    rank: int
    host: str
    weights: int
    cache: int
    available: int  # free on the host, shared by its ranks
    budget: int | None  # --memory, of weights and cache of one rank


def available_bytes() -> int:
    """Memory that this process may still take: free on the host, and below the limit of its control group."""
    free = psutil.virtual_memory().available
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit = Path(limit_file).read_text().strip()
            if limit != "max":
                free = min(free, int(limit) - int(Path(used_file).read_text()))
        except (OSError, ValueError):
            continue  # no such control group on this machine
    return max(0, free)


def check_memory(needs: list[Need], context: int) -> None:
    """Raise MemoryBudgetError if a rank's share is over its `--memory`, or the ranks of a host together over what is free."""
    advice = f"use more ranks or hosts, a smaller model, or fewer --max-tokens (KV cache of {context} tokens)"
    for need in needs:
        total = need.weights + need.cache
        if need.budget is not None and total > need.budget:
            raise MemoryBudgetError(
                f"rank {need.rank} on {need.host} needs {_megabytes(total)} ({_parts(need)}) but --memory allows "
                f"{_megabytes(need.budget)}; {advice}"
            )
    for host in sorted({need.host for need in needs}):
        here = [need for need in needs if need.host == host]
        total = sum(need.weights + need.cache + BASE_BYTES for need in here)
        free = min(need.available for need in here)
        if total > free:
            ranks = ", ".join(str(need.rank) for need in here)
            raise MemoryBudgetError(
                f"host {host} (rank {ranks}) needs {_megabytes(total)} (weights {_megabytes(sum(n.weights for n in here))}, "
                f"KV cache {_megabytes(sum(n.cache for n in here))}, programs {_megabytes(BASE_BYTES * len(here))}) "
                f"but has {_megabytes(free)} free; {advice}"
            )


def _parts(need: Need) -> str:
    return f"weights {_megabytes(need.weights)}, KV cache {_megabytes(need.cache)}"


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
