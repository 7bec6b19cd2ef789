"""Running the real program under the real mpirun, with a time limit that leaves nothing behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EVEN = ("--placement", "importance")


@dataclass(frozen=True)
class Finished:
    """How a run ended. `complaints` are the program's own lines on standard error that say what went wrong, without its warnings."""

    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        return [line for line in self.err.splitlines() if re.match("halo-mpi: (?!warning: )", line)]


def mpi_is_open_mpi() -> bool:
    """Whether the mpirun on the PATH is Open MPI's (else MPICH's)."""
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun on the PATH")
    return "Open MPI" in subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout


def mpi_tolerates() -> bool:
    """Whether the mpirun on the PATH goes on when a rank is killed, if it is told to: Open MPI's from 5 on."""
    return "Open MPI) 5" in subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout


def mpirun_options() -> list[str]:
    """What lets any number of ranks run on this machine, as root too."""
    return ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"] if mpi_is_open_mpi() else ["-bind-to", "none"]


def start(ranks: int, *program: str | Path, **popen) -> subprocess.Popen:
    """Start `mpirun -n ranks python program...` in a process group of its own."""
    command = ["mpirun", *mpirun_options(), "-n", str(ranks), sys.executable, *map(str, program)]
    return start_command(command, **popen)


def start_command(command: list, **popen) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(list(map(str, command)), env=environment, start_new_session=True, **{**pipes, **popen})


def finish(process: subprocess.Popen, timeout: float) -> Finished:
    """Wait for the end; a run that takes longer is a hang: it is killed and the test fails."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"hang: {' '.join(process.args)} did not end in {timeout} s\n{out.decode()}\n{err.decode()}")
    return Finished(process.returncode, out.decode(), err.decode())


def run(ranks: int, *program: str | Path, timeout: float = 90) -> Finished:
    """Run a program on some ranks to its end, e.g. run(3, "-m", "halo_mpi.generate", "--model", folder)."""
    return finish(start(ranks, *program), timeout)


def halo(ranks: int, command: str, *options: str | Path, timeout: float = 90) -> Finished:
    """Run a distributed command to its end; nothing that is measured decides who computes what, unless --placement says so."""
    if command in ("generate", "evaluate"):
        options = (*EVEN, *options)
    return run(ranks, "-m", f"halo_mpi.{command}", *options, timeout=timeout)


def succeed(finished: Finished) -> Finished:
    assert finished.code == 0, f"exit code {finished.code}\n{finished.out}\n{finished.err}"
    return finished


def report_of(ranks: int, command: str, folder: Path, *options: str | Path, timeout: float = 90) -> dict:
    """Run a distributed command that must succeed; its report."""
    path = folder / f"report-{command}-{ranks}.json"
    succeed(halo(ranks, command, *options, "--json", path, timeout=timeout))
    return json.loads(path.read_text())
