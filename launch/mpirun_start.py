"""For halo-mpirun: one start of mpirun, followed to its end; the signals that come meanwhile, and what it leaves behind."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpirun_hosts import EXIT_FAILED, LaunchError
from mpirun_output import TEXT

EXIT_TERMINATED = 143
EXIT_FILE = "HALO_MPI_EXIT_FILE"  # rank 0 writes the program's exit code into the file of this name
AGAIN_FILE = "HALO_MPI_AGAIN_FILE"  # made before the program is asked to end because it will be started again
INTERRUPT_S = 1.2  # after Ctrl-C: so long may mpirun take to end its ranks before they are killed
LINGER_S = 5.0  # after rank 0 is done: so long may mpirun wait for the other ranks (a host that is cut off never ends)
ROOT_GONE_S = 2.0  # after rank 0 was killed: so long may the others take to notice
LOOK_S = 0.5  # how often it is looked whether rank 0 lives
# So long MPI may take to start once rank 0 waits for the others, in a run's first start and its next ones. A Pi needs 10 s to read Python
# and MPI from an SD card; who is given up too soon has them in memory the next time.
MPI_STARTS_S = 30.0, 60.0, 120.0
# mpirun names its session's folder in /tmp by its process id alone, and a later one that gets the same id cannot start while that
# of a killed one is left. Each run has a place of its own for it, which goes with the run (Open MPI 5's name and Open MPI 4's).
SESSION_PLACES = ("PRTE_MCA_prte_local_tmpdir_base", "OMPI_MCA_orte_local_tmpdir_base")
MPIRUN_STARTS = "mpirun"  # stages of a start, written here for a program of halo_mpi, and by it (halo_mpi/engine/stage.py)
MPI_STARTS, SOMEBODY_MISSING = "mpi", "lost"
RANK = re.compile(rb"(?:OMPI_COMM_WORLD_RANK|PMI_RANK)=(\d+)")


class Wishes:
    """What the user asked for by signals. SIGTERM: an end in order, within `grace_s`. Ctrl-C, SIGHUP, SIGTERM again: an end at once."""

    def __init__(self, grace_s):
        self.grace_s = grace_s
        self.interrupted_at = []  # the moments
        self.terminated_at = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if number == signal.SIGTERM and self.terminated_at is None:
            self.terminated_at = time.monotonic()
        else:
            self.interrupted_at.append(time.monotonic())

    @property
    def any(self):
        return bool(self.interrupted_at) or self.terminated_at is not None


@dataclass
class End:
    """How a start ended: mpirun's exit code, the program's own if rank 0 left one, and whether that was not rank 0's doing, since
    it was still alive or mpirun was killed."""

    code: int
    own_code: int | None
    innocent: bool
    began: float  # time.time()
    wanted: frozenset = frozenset()  # why it was asked to end by `wanted` of Start.follow
    stage: str = ""  # of the program, as rank 0 told it; empty: the work has begun, or it is none of halo_mpi
    hung: str = ""  # what kept MPI from starting
    shown: bool = False  # some output

    @property
    def somebody_missing(self):
        """Whether the program says that it cannot go on without ranks that are gone, or MPI did not start for want of them."""
        return bool(self.hung) or self.stage == SOMEBODY_MISSING


class Start:
    """mpirun under way. `checkpoint`: where the program keeps its text, if it does; while it writes there, rank 0 must be alive."""

    def __init__(self, line, environment, exit_file, checkpoint, output, wishes, most_s=MPI_STARTS_S[0]):
        self._exit_file, self._checkpoint, self._output, self._wishes = exit_file, checkpoint, output, wishes
        self._stage_file = exit_file.with_name(exit_file.name + "-stage")
        self._seen, self._gone_at, self._looked_at, self._root_is_gone = {}, None, 0.0, False
        self._most_s, self._mpi_starts_s, self._hung = most_s, 0.0, ""
        self._began = time.time()
        self._shown = output.shown
        output.open(Path(environment[TEXT]) if TEXT in environment else None)
        places = dict.fromkeys(SESSION_PLACES, str(exit_file.parent))
        self._again_file = exit_file.with_name(exit_file.name + "-again")
        if is_halo(line):
            self._stage_file.write_text(MPIRUN_STARTS)
        variables = {**places, **os.environ, **environment, EXIT_FILE: str(exit_file), AGAIN_FILE: str(self._again_file)}
        try:
            self._mpirun = subprocess.Popen(line, env=variables, stdout=subprocess.PIPE, bufsize=0)
        except OSError as error:
            raise LaunchError(f"{line[0]} cannot be started: {error.strerror}", EXIT_FAILED) from None
        output.follow(self._mpirun.stdout)

    @property
    def mark(self):
        """What all processes of this start have in their environment."""
        return f"{EXIT_FILE}={self._exit_file}"

    def follow(self, wanted: Callable[[float], frozenset] = lambda began: frozenset()):
        """Wait for mpirun's end, pass signals on, and end whatever does not end by itself. What `wanted` returns, once it is not empty,
        is a reason to ask the program to end, so that it can be started again."""
        wishes, done_at, kill_at, interrupts, asked_at, killed, why = self._wishes, None, None, 0, None, False, frozenset()
        while True:
            try:
                code = self._mpirun.wait(timeout=0.1)
                break
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            if self._output.closed and not wishes.interrupted_at:
                wishes.interrupted_at.append(now)
            if asked_at is None and not wishes.any and done_at is None and (why := wanted(self._began)):
                asked_at = now
                self._again_file.touch()
                self._mpirun.send_signal(signal.SIGUSR1)
            if wishes.terminated_at and asked_at is None:
                asked_at = now
                self._mpirun.send_signal(signal.SIGUSR1)  # which it passes on to the ranks; of SIGTERM it ends them itself
            grace_over = asked_at and now - max(asked_at, wishes.terminated_at or 0) > wishes.grace_s
            if len(wishes.interrupted_at) > interrupts or grace_over and kill_at is None:
                interrupts = len(wishes.interrupted_at)
                kill_at = kill_at or now + INTERRUPT_S
                self._mpirun.send_signal(signal.SIGINT)
            if done_at is None and exit_code_in(self._exit_file) is not None:
                done_at = now
            overdue = kill_at and now > kill_at or done_at and now - done_at > LINGER_S
            if overdue or done_at is None and self._is_lost(now):
                killed = True
                self._kill_all()
        innocent = 0 in self._local_ranks() or code < 0 and not killed
        self._kill_all()  # ranks that mpirun left behind
        self._output.drain()
        innocent = innocent and not self._root_is_gone
        own_code, stage = exit_code_in(self._exit_file), text_in(self._stage_file)
        if stage == MPIRUN_STARTS and not (innocent or self._hung or self._root_is_gone):
            stage = ""  # mpirun itself failed
        return End(
            code if code >= 0 else 128 - code,
            own_code,
            innocent,
            self._began,
            why,
            stage,
            self._hung,
            self._output.shown != self._shown,
        )

    def _is_lost(self, now):
        """Whether rank 0 has ended in the middle of a text, or of its start, without a word, or MPI does not start.

        Looked for only once there is something of either.
        """
        passed_s, stage = now - self._looked_at, text_in(self._stage_file)
        if passed_s < LOOK_S or not stage and (self._checkpoint is None or not self._checkpoint.exists()):
            return False
        self._looked_at = now
        if stage == MPI_STARTS:
            self._mpi_starts_s += min(passed_s, 2 * LOOK_S)  # not the time in which this process was stopped
            if self._mpi_starts_s > self._most_s:
                self._hung = f"MPI did not start in {self._most_s:.0f} s"
                return True
        gone = self._gone(stage in (MPIRUN_STARTS, MPI_STARTS))
        self._gone_at = (self._gone_at or now) if gone else None
        if not gone or now - self._gone_at <= ROOT_GONE_S:
            return False
        self._root_is_gone = 0 in gone
        if not self._root_is_gone:
            self._hung = f"rank {min(gone)} ended while MPI started"
        return True

    def _gone(self, all_needed):
        """Those of the ranks on this computer that were there and are no more: of all, or of rank 0 alone."""
        if not all_needed and any(map(is_alive, self._seen.get(0, ()))):
            return set()
        ranks = self._local_ranks()
        gone = self._seen.keys() - ranks.keys()
        self._seen |= ranks
        return gone if all_needed else gone & {0}

    def _local_ranks(self):
        """Those ranks on this computer that live; by rank, its processes."""
        ranks = {}
        for pid, variables in self._processes():
            for found in filter(None, map(RANK.fullmatch, variables)):
                if is_alive(pid):
                    ranks.setdefault(int(found[1]), set()).add(pid)
        return ranks

    def _processes(self):
        """mpirun, its helpers and the local ranks: all that have this start's own mark in their environment."""
        mark = self.mark.encode()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (variables := set((entry / "environ").read_bytes().split(b"\0"))):
                    yield int(entry.name), variables
            except OSError:
                pass  # it has ended, or is another user's

    def _kill_all(self):
        for pid, _ in self._processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def exit_code_in(exit_file):
    """The code that rank 0 left, or None."""
    text = text_in(exit_file)
    return int(text) if text.isdigit() else None


def is_halo(line):
    """Whether this command line runs a program of halo_mpi that works on all ranks together."""
    names = {word.rpartition(".")[2] for word in line}
    return any(re.search("halo.mpi", word) for word in line) and not names.isdisjoint({"generate", "evaluate", "calibrate"})


def text_in(path):
    """What rank 0 wrote there; nothing if it did not."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def written_since(path, moment):
    """Whether this file is there and was written after `moment` (time.time())."""
    try:
        return path is not None and path.stat().st_mtime >= moment
    except OSError:
        return False


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
