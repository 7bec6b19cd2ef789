"""The machine that a rank runs on, and its part of it."""

import os
import platform
import resource
import socket
import sys
from importlib.metadata import version
from pathlib import Path

from mpi4py import MPI

from halo_mpi.wire.exchange import broadcast, gather, name_hosts


def this_machine() -> str:
    """The host's name and what tells it from others of that name: boards from one image may all have the same."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot_id = ""
    return f"{socket.gethostname()} {boot_id}"


def share_cores(comm: MPI.Comm, threads: int | None) -> tuple[list[str], int, int]:
    """Every rank's host, how many ranks are on this one, and this rank's threads: `threads`, or its part of the cores (collective)."""
    machines = broadcast(comm, gather(comm, this_machine()))
    here = machines.count(this_machine())
    hosts = [machine.partition(" ")[0] for machine in machines]
    name_hosts(comm, hosts)
    return hosts, here, threads or max(1, _cores() // here)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """The most memory, in bytes, that this process has had resident so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # getrusage(2): KiB but on macOS


def survives_ends() -> bool:
    """Whether the other ranks go on when one's process ends: Open MPI started with `--with-ft ulfm`."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "yes")


def mpi_name() -> str:
    """For example "Open MPI 5.0.11"."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def machine_name() -> str:
    return f"{platform.machine()}, {_cores()} cores, Python {platform.python_version()}, torch {version('torch')}"
