"""The hosts of a hostfile, asked over ssh, without MPI: those that are down would keep mpirun from starting."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from halo_mpi.errors import UsageError
from halo_mpi.health.finding import ERROR, OK, Finding
from halo_mpi.health.together import Seen

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
DEFAULT_SSH = "ssh -o BatchMode=yes -o ConnectTimeout=3"
SSH_FAILED = 255
UP = "look whether the board has power and network; put a # before its line in the hostfile to go on without it"
KEY = "make `{ssh} {host} true` work without a password: `ssh-copy-id {host}`"
NAME = "correct the hostfile, or name the host in /etc/hosts"
INSTALL = "halo_mpi and its .venv must lie in {folder}, as here: copy them there, `bash launch/quickstart.sh`"


@dataclass(frozen=True, slots=True)
class Named:
    """A line of the hostfile; `here`: it is this computer."""

    name: str
    slots: int
    here: bool


def read_hosts(hostfile: Path, mpi: str) -> tuple[list[Named], list[Finding]]:
    """The hosts of a hostfile in the dialect of this MPI ("Open MPI 5.0.11"), and what is to say about it; none if it is wrong."""
    if not LAUNCH.is_dir():
        raise UsageError(f"--hostfile needs {LAUNCH}, which is not there; run doctor from a clone of the repository")
    sys.path.append(str(LAUNCH))
    from mpirun_hosts import LaunchError, is_here, read_hostfile

    kind = "MPICH" if mpi.startswith("MPICH") else "Open MPI"
    try:
        hosts = read_hostfile(str(hostfile), kind)
    except LaunchError as error:
        says, _, do = str(error).partition("; ")
        return [], [Finding("hostfile", ERROR, says, do)]
    named: dict[str, Named] = {}
    for host in hosts:  # a host may be named twice
        before = named.get(host.name)
        named[host.name] = Named(host.name, host.slots + (before.slots if before else 0), is_here(host.name))
    found = [
        Finding("hostfile", OK, f"{hostfile}, in {kind}'s dialect: {len(named)} hosts, {sum(host.slots for host in hosts)} ranks")
    ]
    if not named[hosts[0].name].here:
        says = f"the first line names {hosts[0].name}, which is not this computer: rank 0 would run there"
        found.append(
            Finding("hostfile", ERROR, says, "start on that board, or put this one first: halo-mpirun and the text are here")
        )
    return list(named.values()), found


def ask(hosts: list[Named], ssh: str, words: list[str], most_s: float) -> tuple[list[Seen], list[Finding]]:
    """Let all of these hosts examine themselves at once, over ssh, with the words for doctor; who answered, and findings about the others.

    `most_s`: seconds for all. Raises UsageError if there is no such program.
    """
    if hosts and not shutil.which((shlex.split(ssh) or [""])[0]):
        raise UsageError(f"--ssh: there is no program {ssh!r}; `apt-get install openssh-client`, or name another one")
    answers: dict[str, Seen | Finding] = {}
    threads = [threading.Thread(target=lambda host=host: answers.update({host.name: _ask(host, ssh, words, most_s)}), daemon=True)
               for host in hosts]  # fmt: skip
    for thread in threads:
        thread.start()
    until = time.monotonic() + most_s + 1  # a name that nobody resolves may hold a thread up for longer
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    late = {host.name: _down(host.name, f"did not answer in {most_s:.0f} s") for host in hosts if host.name not in answers}
    told = [answers.get(host.name) or late[host.name] for host in hosts]
    return [each for each in told if isinstance(each, Seen)], [each for each in told if isinstance(each, Finding)]


def _ask(host: Named, ssh: str, words: list[str], most_s: float) -> Seen | Finding:
    folder = os.getcwd()
    variables = [f"{name}={os.environ[name]}" for name in ("PYTHONPATH",) if os.environ.get(name)]
    command = shlex.join(["env", *variables, sys.executable, "-m", "halo_mpi.doctor", "--examine", *words])
    begin = time.time()
    try:
        line = [*shlex.split(ssh), host.name, f"cd {shlex.quote(folder)} && exec {command}"]
        done = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=most_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return _down(host.name, f"did not answer in {most_s:.0f} s")
    except OSError as error:
        return _down(host.name, f"could not be asked: {error.strerror}")
    end, last = time.time(), (done.stderr.strip().splitlines() or [""])[-1].strip()
    if done.returncode == SSH_FAILED:
        return _unreachable(host.name, ssh, last)
    try:
        said = json.loads(done.stdout.strip().splitlines()[-1])
        clock, _ = said["time"], said["software"]["halo_mpi"]
        ahead_s = max(0.0, clock - end) or min(0.0, clock - begin)
        return Seen(host.name, said, host.slots, ahead_s)
    except (ValueError, IndexError, KeyError, TypeError):
        says = f"answers, but halo_mpi does not run there: {last or f'exit code {done.returncode}'}"
        return Finding("hosts", ERROR, says, INSTALL.format(folder=folder), host.name)


def _unreachable(name: str, ssh: str, last: str) -> Finding:
    """ssh could not connect, and `last` is its last line."""
    if "denied" in last or "verification" in last:
        return Finding("hosts", ERROR, f"ssh is refused: {last}", KEY.format(ssh=shlex.split(ssh)[0], host=name), name)
    if "resolve" in last:
        return Finding("hosts", ERROR, "no computer of this name is known here", NAME, name)
    return _down(name, f"cannot be reached: {last or 'ssh failed'}")


def _down(name: str, why: str) -> Finding:
    return Finding("hosts", ERROR, why, UP, name)
