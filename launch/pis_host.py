"""For setup-pis.sh: commands on other hosts, what is known of a host before anything is copied, and whether halo_mpi runs there."""

import shlex
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

AGENT = "ssh -o BatchMode=yes -o ConnectTimeout=8 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
PROBE_S, START_S = 60.0, 300.0  # a Pi compiles all modules when it first imports them
CLOCK_S = 60.0  # clocks may differ by so much
SSH_FAILED = 255

# Arguments: this computer's Python; then for each folder its path and a file that lies in it here.
# Of a folder that is not there yet, its nearest parent tells what may be written and how much is free.
PROBE = r"""
say() { printf 'halo\t%s\t%s\n' "$1" "$2"; }
say clock "$(date +%s)"
say machine "$(uname -m)"
say rsync "$(command -v rsync)"
say python "$("$1" -c 'import struct, sys; print("%d.%d, %d bits" % (*sys.version_info[:2], 8 * struct.calcsize("P")))' 2>/dev/null)"
shift
while [ $# -gt 0 ]; do
    state=missing at=$1
    if [ -e "$1/$2" ]; then state=shared
    elif [ -e "$1/.halo-copy" ] || [ -e "$1/launch/halo-mpirun" ]; then state=ours
    elif [ -n "$(ls -A "$1" 2>/dev/null)" ]; then state=there
    fi
    while [ ! -e "$at" ]; do at=$(dirname "$at"); done
    [ $state = shared ] || { [ -d "$at" ] && [ -w "$at" ]; } || state=forbidden
    say "$1" "$state $(df -Pk "$at" | awk 'END { free = $4; sub(/^.*% +/, ""); print free, $0 }')"
    shift 2
done
"""

ADVICE = {
    "Permission denied": "give it your key: ssh-copy-id {host}",
    "Host key verification failed": "log in once by hand and say yes: ssh {host}",
    "IDENTIFICATION HAS CHANGED": "if it was installed anew: ssh-keygen -R {host}, then ssh {host}",
    "Could not resolve": "correct the name in the hostfile, or put it into /etc/hosts",
    "refused": "is ssh turned on there? sudo systemctl enable --now ssh",
    "timed out": "is it on, and in this network?",
    "No route": "is it on, and in this network?",
}


class HostError(Exception):
    """Why a host was not set up, in one line."""


@dataclass(frozen=True)
class Place:
    """A folder on a host: missing, there, ours (a copy of halo_mpi), shared with this computer, or forbidden; and its file system."""

    state: str
    free_bytes: int
    mount: str


@dataclass
class Facts:
    """What a host told of itself. `clock_s`: how far its clock is ahead of this computer's."""

    machine: str = ""
    python: str = ""
    rsync: str = ""
    clock_s: float = 0.0
    places: dict[str, Place] = field(default_factory=dict)


class Commands:
    """Runs commands from several threads; `end` ends those that run and lets no other begin."""

    def __init__(self):
        self._lock, self._running, self._ended = threading.Lock(), set(), False

    def run(self, line: Sequence[str], text: str = "", most_s: float | None = None) -> subprocess.CompletedProcess:
        """Raises HostError if it takes longer than `most_s`."""
        with self._lock:
            if self._ended:
                raise HostError("interrupted")
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = subprocess.Popen(line, text=True, errors="replace", **pipes)
            self._running.add(process)
        try:
            out, err = process.communicate(text, timeout=most_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise HostError(f"{line[0]} did not end in {most_s:.0f} s") from None
        finally:
            with self._lock:
                self._running.discard(process)
        return subprocess.CompletedProcess(line, process.returncode, out, err)

    def end(self) -> None:
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()


class Host:
    """A host and the words that run a command on it: over ssh, or here."""

    def __init__(self, name: str, commands: Commands, is_here: bool = False):
        self.name, self.commands = name, commands
        self._words = ["sh", "-c"] if is_here else [*shlex.split(AGENT), name]

    def run(self, command: str, text: str = "", most_s: float = PROBE_S) -> subprocess.CompletedProcess:
        """Raises HostError, with advice, if ssh itself fails."""
        done = self.commands.run([*self._words, command], text, most_s)
        if done.returncode == SSH_FAILED:
            raise HostError(self.why(done.stderr))
        return done

    def why(self, errors: str) -> str:
        """One line of what ssh or rsync wrote, and what to do about it."""
        lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["no reason is given"]
        for key, advice in ADVICE.items():
            found = next((line for line in lines if key in line), None)
            if found:
                return f"{found}; {advice.format(host=self.name)}"
        return lines[0] if lines[0].startswith("rsync") else lines[-1]

    def probe(self, python: str, folders: Sequence[tuple[str, str]]) -> Facts:
        """`folders`: (path, name of a file that lies in it on this computer)."""
        words = [word for folder in folders for word in folder]
        began = time.time()
        done = self.run(shlex.join(["sh", "-s", "--", python, *words]), PROBE)
        facts, now = Facts(), (began + time.time()) / 2
        for line in done.stdout.splitlines():
            mark, _, told = line.partition("\t")
            key, _, value = told.partition("\t")
            if mark != "halo":
                continue  # what its login shell says
            if key == "clock":
                facts.clock_s = float(value or now) - now  # nothing is told where `date` was interrupted
            elif key in ("machine", "python", "rsync"):
                setattr(facts, key, value)
            else:
                state, free, mount = value.split(" ", 2)
                facts.places[key] = Place(state, int(free) * 1024, mount)
        if len(facts.places) < len(folders):
            raise HostError(f"does not tell what it is: {self.why(done.stderr)}")
        return facts

    def try_start(self, root: str) -> None:
        """Imports the program there, under its MPI. Raises HostError with the reason if that fails."""
        python = f"{root}/.venv/bin/python"
        words = [python, f"{root}/launch/halo-mpirun", "-n", "1", python, "-c", "import halo_mpi.generate; from mpi4py import MPI"]
        done = self.run(f"cd {shlex.quote(root)} && exec {shlex.join(words)}", most_s=START_S)
        if done.returncode:
            lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            telling = [line for line in lines if "Error: " in line] or lines or [f"exit code {done.returncode}"]
            raise HostError(f"all is copied, but it does not start there: {telling[-1]}")


def check_kind(facts: Facts, here: Facts, python: str) -> None:
    """Raises HostError if a copy of this computer's environment cannot run there."""
    if facts.machine != here.machine:
        raise HostError(f"is a {facts.machine}, this computer a {here.machine}, and programs of one do not run on the other")
    if facts.python != here.python:
        there = f"is Python {facts.python}" if facts.python else "is missing"
        raise HostError(f"{python} {there}, here it is Python {here.python}; install the same system on all hosts")
    if not facts.rsync:
        raise HostError("has no rsync; run there: sudo apt-get install rsync")


def clock_note(clock_s: float) -> str:
    """A remark on a clock that is wrong, or nothing."""
    if abs(clock_s) <= CLOCK_S:
        return ""
    size = f"{abs(clock_s) / 60:.0f} min" if abs(clock_s) < 7200 else f"{abs(clock_s) / 3600:.0f} h"
    return f"; its clock is {size} {'ahead' if clock_s > 0 else 'behind'}: look at `timedatectl` there"
