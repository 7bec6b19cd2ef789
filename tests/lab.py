"""Laboratories in tests: links without a run, whole runs of `python -m bench.lab`, and what must not be left of either."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from math import exp, lgamma, log, log1p
from pathlib import Path

from bench.lab.costs import round_trips_us, udp_socket
from bench.lab.lab import STATE, Lab
from bench.lab.scenario import Host, Scenario
from bench.lab.system import NETNS, LabError
from tests.mpi import ROOT

PROGRAMS = ROOT / "tests" / "programs"
SCENARIOS = ROOT / "bench" / "scenarios"
BACKENDS = ("kernel", "relay")
ONE_IN_A_MILLION = 4.89  # standard deviations
SO_RCVBUFFORCE = 33


@cache
def binomial_interval(number: int, chance: float) -> range:
    """The counts of `number` trials outside of which one in a million falls, half on each side."""
    total = lgamma(number + 1)
    logs = (total - lgamma(k + 1) - lgamma(number - k + 1) + k * log(chance) + (number - k) * log1p(-chance)
            for k in range(number + 1))  # fmt: skip
    inside = [k for k, up_to_k in enumerate(accumulate(map(exp, logs))) if 5e-7 < up_to_k < 1 - 5e-7]
    return range(inside[0], inside[-1] + 2)


# Links without a run


def why_not(backend: str, scenario: Scenario) -> str | None:
    try:
        with Lab(scenario, backend):
            return None
    except (LabError, OSError) as error:
        return str(error)


@contextmanager
def lossy_lab(backend: str, *links: Host, seed: int = 0, **scenario) -> Iterator[Lab]:
    hosts = {f"pi{i}": link for i, link in enumerate(links, 1)}
    with Lab(Scenario("test", hosts, **scenario), backend, seed) as lab:
        round_trips_us(lab, 2)  # address resolution
        lab.conditions.lossy = True
        lab.apply()
        yield lab


def numbers_received(lab: Lab, number: int, sender: str = "pi1", receiver: str = "pi2", size: int = 64) -> list[int]:
    """Sends numbered UDP packets, a few at a time so that no queue overflows; the numbers in order of arrival."""
    with udp_socket(lab, sender) as outgoing, udp_socket(lab, receiver) as incoming:
        incoming.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        incoming.settimeout(0.3)
        there = incoming.getsockname()
        for i in range(number):
            outgoing.sendto(i.to_bytes(4, "big").ljust(size, b"."), there)
            if i % 50 == 49:
                time.sleep(0.0005)
        received = []
        try:
            while True:
                received.append(int.from_bytes(incoming.recv(2048)[:4], "big"))
        except TimeoutError:
            return received


def lanes(lab: Lab) -> dict:
    return {(lane.host, lane.direction): lane for lane in lab.links.lanes()}


# Whole runs


def lab_command(*words) -> list[str]:
    return [sys.executable, "-m", "bench.lab", *map(str, words)]


def start(*words, **popen) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(lab_command(*words), cwd=ROOT, text=True, **{**pipes, **popen})


def run(*words, timeout: float = 50) -> subprocess.CompletedProcess:
    pipes = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run(lab_command(*words), cwd=ROOT, timeout=timeout, **pipes)


def program(name: str, *words) -> list[str]:
    return ["--", "python", str(PROGRAMS / name), *map(str, words)]


def scenario_file(folder: Path, text: str) -> Path:
    file = folder / "scenario.toml"
    file.write_text(text)
    return file


def event(action: str, trigger: str, more: str = "") -> str:
    return f'[[event]]\nhost = "pi2"\naction = "{action}"\n{trigger}\n{more}\n'


def lab_of(output: str) -> str:
    """The HALO_MPI_LAB_DIR that a program of tests/programs printed."""
    return json.loads(output.splitlines()[0])["lab"]


def lab_owned_by(process: subprocess.Popen) -> str:
    """The HALO_MPI_LAB_DIR of a lab whose making has just begun."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for owner in STATE.glob("*/owner"):
            try:
                if owner.read_text().split()[:1] == [str(process.pid)]:
                    return str(owner.parent / "marks")
            except FileNotFoundError:
                pass
        time.sleep(0.001)
    raise AssertionError(f"no lab after 10 s: {process.communicate()}")


# What is left


def machine_state() -> list[str]:
    """What a lab must leave as it was; other labs may run meanwhile."""
    commands = (command.split() for command in ("ip -o link", "tc qdisc", "nft list ruleset", "hostname"))
    return [subprocess.run(words, capture_output=True, text=True).stdout for words in commands if shutil.which(words[0])]


def shared_files(names: str) -> set[str]:
    """The files with such names where MPI and labs keep theirs."""
    found = (path for place in ("/tmp", "/var/tmp", "/dev/shm") for path in Path(place).iterdir())
    return {str(path) for path in found if re.search(names, path.name)}


OF_HOSTS = r"\.pi\d+\."
FOUND = shared_files(OF_HOSTS)  # something else than these tests left them


def leftovers(folder: str | Path) -> list[str]:
    """What there is of a lab that had this HALO_MPI_LAB_DIR: namespaces, mounts, files (of its hosts' MPI too) and processes."""
    home = Path(folder).parent
    found = [str(path) for path in NETNS.glob(f"{home.name}-*")] + [str(p) for p in (home,) if p.exists()]
    found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if home.name in line]
    found += sorted(shared_files(f"{OF_HOSTS}|{home.name}") - FOUND)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if bytes(home) in (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes():
                found.append(f"process {entry.name}")
        except OSError:
            pass
    return found
