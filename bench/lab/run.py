"""A command under mpirun or halo-mpirun in a lab: one rank per host, faults and events as the program marks its progress.

The marks are files in HALO_MPI_LAB_DIR. From rank 0: `progress`, with the lines measuring, generation-begin, token N, phase NAME
and generation-end; from every rank: rank-R.pid. From the lab: pace-R.json; `set` and `go`, once losses are as they should be, for which
the program waits after the first two; `calm`, once they are off, for which it waits after generation-end. A program that is started
again writes all its marks again, and may have fewer ranks.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time

from bench.lab.director import Director
from bench.lab.lab import Lab
from bench.lab.launch import environment, launch_line
from bench.lab.processes import command_of, end_processes, is_alive, read_pid

TICK_S = 0.01
INTERRUPT_S = 1.5  # after Ctrl-C: so long may mpirun take to end its ranks
ORPHANS_S = 2.0  # after the launcher ended: so long may what it started take to end
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

    def __init__(self, lab: Lab, command: list[str], marked: bool, mpirun_options: list[str], launcher: str = "mpirun",
                 fault_tolerant: bool = True):  # fmt: skip
        self.lab, self.command, self.marked = lab, command, marked
        self.director = Director(lab)
        self.exit_file = lab.folder / "exit-code"
        self.progress, self.read_bytes, self.tokens = lab.marks / "progress", 0, 0
        self.began_s: float | None = None
        self.ended_s: float | None = None
        self.starts = 0  # of the program: halo-mpirun may start it again
        self.longest_wait_s = 0.0  # for a token
        self.orphans: list[str] | None = None  # what a launcher that ended by itself left running
        self._last_token_at = 0.0
        self._pid_times: dict[str, int] = {}
        self._set_loss(not marked or lab.scenario.loss_during == "always")
        self.started = time.monotonic()
        self.launcher, self.fault_tolerant = launcher, fault_tolerant
        line = shlex.join(launch_line(lab, launcher, mpirun_options, fault_tolerant) + command)
        variables = {"HALO_MPI_LAB_DIR": str(lab.marks)}
        if launcher == "mpirun":  # halo-mpirun has a file of its own, and ends with the code in it
            variables["HALO_MPI_EXIT_FILE"] = str(self.exit_file)
        else:
            variables["TMPDIR"] = str(lab.folder)  # what it leaves there when it is killed goes with the lab
        self.mpirun = subprocess.Popen(
            [lab.agent, next(iter(lab.scenario.hosts)), f"exec {line}"],
            env={**environment(), **variables},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.director.launcher = self.mpirun.pid
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
        if code is not None:
            self.orphans = self._orphans()
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

    def _orphans(self) -> list[str]:
        deadline = time.monotonic() + ORPHANS_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _left(self) -> list[str]:
        """The commands that run on the hosts, but for the lab's own agents, which wait for hosts that are cut off."""
        commands = [command for pid in self.lab.processes() if (command := command_of(pid)) and is_alive(pid)]
        return [command for command in commands if not command.startswith(f"/bin/sh {self.lab.agent}")]

    def _own_code(self) -> int | None:
        try:
            return int(self.exit_file.read_text())
        except (OSError, ValueError):
            return None

    def _heed_ranks(self) -> None:
        """Ranks that have started or started again: the host of each."""
        for file in self.lab.marks.glob("rank-*.pid"):
            changed = file.stat().st_mtime_ns
            if self._pid_times.get(file.name) != changed and (pid := read_pid(file)):
                self._pid_times[file.name] = changed
                if host := self.lab.host_of(pid):
                    self.director.rank_is_on(int(file.stem.removeprefix("rank-")), host)

    def _heed_marks(self, now: float) -> None:
        self._heed_ranks()
        for line in self._new_lines():
            word, _, rest = line.partition(" ")
            if word == "token":
                self.tokens = int(rest)
                self.longest_wait_s = max(self.longest_wait_s, now - self._last_token_at)
                self._last_token_at = now
                self.director.token(self.tokens, now)
            elif word == "phase":
                self.director.phase(rest, now)
            elif line == "measuring":
                if self.lab.scenario.loss_during == "measuring":
                    self._set_loss(True)
                (self.lab.marks / "set").touch()
            elif line == "generation-begin":
                (self.lab.marks / "calm").unlink(missing_ok=True)
                self._set_loss(True)
                if not self.starts:
                    self.began_s, self._last_token_at = now - self.started, now
                self.starts += 1
                self.director.begin(now)
                (self.lab.marks / "go").touch()
            elif line == "generation-end":
                (self.lab.marks / "go").unlink(missing_ok=True)
                self.ended_s = now - self.started
                self.director.end(now)
                if self.lab.scenario.loss_during != "always":
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
