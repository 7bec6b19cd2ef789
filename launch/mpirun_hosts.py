"""For halo-mpirun: hostfiles in both dialects, which of their hosts answer, and ending what a lost job left on them."""

import re
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

EXIT_FAILED, EXIT_USAGE = 1, 2
ANSWER_S = 5.0  # so long may a host take to answer
DEFAULT_AGENT = "ssh -o BatchMode=yes -o ConnectTimeout=4"


class LaunchError(Exception):
    """One line for the user, and the exit code that goes with it."""

    def __init__(self, message, exit_code=EXIT_USAGE):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Host:
    """A host, its slots, and its line in a hostfile."""

    name: str
    slots: int
    line: str


def read_hostfile(name, kind):
    """The hosts of a hostfile, which must be in the dialect of this kind of MPI."""
    try:
        lines = Path(name).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise LaunchError(f"{name}: the hostfile cannot be read: {reason}") from None
    hosts = []
    for number, line in enumerate(lines, 1):
        entry = re.sub(r"\s*=\s*", "=", line.partition("#")[0]).strip()
        if not entry:
            continue
        host, *settings = entry.split()
        mpich = re.fullmatch(r"([^:=]+):(\d+)", host)
        openmpi = re.search(r"\bslots=(\d+)", entry)
        where = f"{name}, line {number}"
        if kind == "Open MPI" and mpich:
            raise LaunchError(f"{where}: '{host}' is MPICH's way; with Open MPI write '{mpich[1]} slots={mpich[2]}'")
        if kind == "MPICH" and openmpi:
            raise LaunchError(f"{where}: '{entry}' is Open MPI's way; with MPICH write '{host}:{openmpi[1]}'")
        if "=" in host or not all("=" in setting for setting in settings):
            example = "pi2 slots=1" if kind == "Open MPI" else "pi2:1"
            raise LaunchError(f"{where}: '{entry}' is not understood; with {kind} write a host like '{example}'")
        slots = int(openmpi[1]) if openmpi else int(mpich[2]) if mpich else 1
        if slots < 1:
            raise LaunchError(f"{where}: {host} has no slots; to leave a host out, put a # before its line")
        hosts.append(Host(mpich[1] if mpich else host, slots, entry))
    if not hosts:
        raise LaunchError(f"{name}: the hostfile names no host")
    return hosts


def read_host_list(text, kind):
    """The hosts of `-host a:2,b`."""
    hosts = []
    for entry in filter(None, text.split(",")):
        name, _, slots = entry.partition(":")
        slots = int(slots) if slots.isdigit() and int(slots) else 1
        hosts.append(Host(name, slots, f"{name} slots={slots}" if kind == "Open MPI" else f"{name}:{slots}"))
    return hosts


def hosts_that_answer(names, agent, marks, stopped: Callable[[], bool]):
    """Those of these hosts that answer; all processes there with one of `marks` in their environment are ended on the way.

    All are asked at once; `stopped`: the user does not want to wait any more.
    """
    sought = " ".join(f"-e {shlex.quote(mark)}" for mark in marks)
    command = f"for p in /proc/[0-9]*; do grep -qzxF {sought} $p/environ && kill -9 ${{p#/proc/}}; done 2>/dev/null; true"
    answered = set()

    def ask(name):
        try:
            if is_here(name):
                answered.add(name)
                return
            line = [*shlex.split(agent), name, command]
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            if subprocess.run(line, timeout=ANSWER_S, **quiet).returncode == 0:
                answered.add(name)
        except (OSError, subprocess.TimeoutExpired):
            pass

    asking = [threading.Thread(target=ask, args=(name,), daemon=True) for name in dict.fromkeys(names)]
    for thread in asking:
        thread.start()
    until = time.monotonic() + ANSWER_S + 0.5  # names that nobody resolves can hold up a thread for longer
    while any(thread.is_alive() for thread in asking) and time.monotonic() < until and not stopped():
        time.sleep(0.05)
    return frozenset(answered)


def is_here(name):
    """Whether this is the computer that halo-mpirun runs on: an address of it can be bound."""
    if name in ("localhost", socket.gethostname(), socket.gethostname().partition(".")[0]):
        return True
    try:
        family, _, _, _, address = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
        return True
    except OSError:
        return False
