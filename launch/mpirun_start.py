"""For halo-mpirun: one start of mpirun, followed to its end; the signals that come meanwhile, and what it leaves behind."""

import os
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
# mpirun names its session's folder in /tmp by its process id alone, and a later one that gets the same id cannot start while that
# of a killed one is left. Each run has a place of its own for it, which goes with the run (Open MPI 5's name and Open MPI 4's).
SESSION_PLACES = ("PRTE_MCA_prte_local_tmpdir_base", "OMPI_MCA_orte_local_tmpdir_base")
RANK_0 = {b"OMPI_COMM_WORLD_RANK=0", b"PMI_RANK=0"}


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


class Start:
    """mpirun under way. `checkpoint`: where the program keeps its text, if it does; while it writes there, rank 0 must be alive."""

    def __init__(self, line, environment, exit_file, checkpoint, output, wishes):
        self._exit_file, self._checkpoint, self._output, self._wishes = exit_file, checkpoint, output, wishes
        self._root, self._root_gone_at, self._looked_at = set(), None, 0.0
        self._began = time.time()
        output.open(Path(environment[TEXT]) if TEXT in environment else None)
        places = dict.fromkeys(SESSION_PLACES, str(exit_file.parent))
        self._again_file = exit_file.with_name(exit_file.name + "-again")
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
            if overdue or done_at is None and self._root_is_gone(now):
                killed = True
                self._kill_all()
        innocent = any(map(is_alive, self._root_processes())) or code < 0 and not killed
        self._kill_all()  # ranks that mpirun left behind
        self._output.drain()
        return End(code if code >= 0 else 128 - code, exit_code_in(self._exit_file), innocent, self._began, why)

    def _root_is_gone(self, now):
        """Whether rank 0 has ended in the middle of a text without a word. Looked for only once there is something of a text."""
        if now - self._looked_at < LOOK_S or self._checkpoint is None or not self._checkpoint.exists():
            return False
        self._looked_at = now
        if not any(map(is_alive, self._root)):
            known, self._root = self._root, self._root_processes()
            if known and not self._root:
                self._root = known
                self._root_gone_at = self._root_gone_at or now
        return self._root_gone_at is not None and now - self._root_gone_at > ROOT_GONE_S

    def _root_processes(self):
        return {pid for pid, variables in self._processes() if variables & RANK_0}

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
    try:
        return int(exit_file.read_text())
    except (OSError, ValueError):
        return None


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
