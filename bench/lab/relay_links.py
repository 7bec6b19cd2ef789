"""Links made by relay.c: TAP devices into a user-space switch that can do bursts, delays and jitter, seeded.

What it costs by itself (bench/lab/costs.py; quiet 2-core VM, Linux 6.18): round trip of 1200 bytes +36 us at p50 (107 us, the
kernel's links 71), with a delay another 200 us, since a timer wakes the VM late; CPU per packet 3 us back to back (6 with a
delay), 21 us where each packet has to wake it out of an idle VM (65 to 70 with a delay). With both cores kept busy by others the
VM need not be woken: +6 us (16, the kernel's 10), with a delay +67 us.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path

from bench.lab.links import INTERFACE, MTU, Conditions, Lane, Names, number_of
from bench.lab.scenario import Host
from bench.lab.system import NETNS, LabError, call, inside, switch_offloads_off

SOURCES = [Path(__file__).with_name(name) for name in ("relay.c", "lane.h")]
COMPILERS = ("cc", "gcc", "clang")
NEVER_BAD = (0.0, 0.0)
SCHED_FIFO = 1
RING = 4096  # packets of a host that wait while the relay has no core, before they are lost uncounted; the kernel's default is 500


def relay_program() -> Path:
    """The compiled relay; compiled on first use and kept in the user's cache."""
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halo-lab"
    program = cache / f"relay-{platform.machine()}-{digest}"
    if program.exists():
        return program
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise LabError("the relay needs a C compiler; install gcc")
    cache.mkdir(parents=True, exist_ok=True)
    fresh = cache / f"{program.name}.{os.getpid()}"
    try:
        call(compiler, "-O2", "-o", str(fresh), str(SOURCES[0]))
        fresh.replace(program)
    finally:
        fresh.unlink(missing_ok=True)
    return program


def lane_values(host: Host) -> str:
    """What relay.c's `lane` command takes after port and direction."""
    burst = host.burst
    chances = (1 / burst.good, 1 / burst.bad) if burst else NEVER_BAD
    losses = (burst.loss_good, burst.loss_bad) if burst else (host.loss, host.loss)
    times_ns = (round(host.delay_ms * 1e6), round(host.jitter_ms * 1e6))
    ns_per_byte = 8000 / host.rate_mbit if host.rate_mbit else 0.0
    return " ".join(map(repr, (*chances, *losses, *times_ns, ns_per_byte)))


class RelayLinks:
    name = "relay"

    def __init__(self, names: Names, hosts: dict[str, Host], seed: int, folder: Path):
        self.names, self.hosts, self.seed, self.folder = names, hosts, seed, folder
        self.control: socket.socket | None = None
        self.unplugged: set[str] = set()

    def connect(self) -> None:
        if not os.path.exists("/dev/net/tun"):
            raise LabError("the relay needs /dev/net/tun; load the kernel module tun")
        path = self.folder / "relay.socket"
        namespaces = [str(NETNS / self.names.namespace(host)) for host in self.hosts]
        words = ["nsenter", f"--net={NETNS / self.names.switch}", str(relay_program()), str(path), str(self.seed), *namespaces]
        with open(self.folder / "relay.log", "wb") as log:
            relay = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        assert relay.stdout is not None
        with relay.stdout:
            if relay.stdout.readline() != b"ready\n":
                reason = (self.folder / "relay.log").read_text().strip() or "no reason given"
                raise LabError(f"the relay does not start: {reason.splitlines()[0]}")
        self.process = relay
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(10)
        self.control.connect(str(path))
        for host in self.hosts:
            there, mac = self.names.namespace(host), self.names.hardware_address(host)
            call("ip", "-n", there, "link", "set", INTERFACE, "mtu", str(MTU), "address", mac, "txqueuelen", str(RING))
            inside(there, lambda: switch_offloads_off(INTERFACE))

    def _ask(self, command: str) -> str:
        assert self.control is not None
        try:
            self.control.send(command.encode())
            answer = self.control.recv(1 << 16).decode()
        except OSError as error:
            raise LabError(f"the relay does not answer: {error}") from None
        if answer in ("", "error"):
            raise LabError(f"the relay refused '{command}'")
        return answer

    def apply(self, conditions: Conditions) -> None:
        for priority, host in enumerate(reversed(conditions.worst_first())):
            port, values = number_of(host), lane_values(conditions.hosts[host])
            self._ask(f"priority {port} {priority}")
            self._ask(f"lane {port} 0 {values}")
            self._ask(f"lane {port} 1 {values}")
            self._ask(f"black-hole {port} {int(host in conditions.black_holes)}")
        for host in conditions.unplugged ^ self.unplugged:
            self._ask(f"carrier {number_of(host)} {int(host not in conditions.unplugged)}")
        self.unplugged = set(conditions.unplugged)
        self._ask(f"loss {int(conditions.lossy)}")

    def lanes(self) -> list[Lane]:
        lines = [list(map(int, line.split())) for line in self._ask("counters").splitlines()[1:]]
        return [Lane(f"pi{port}", ("up", "down")[direction], *counts) for port, direction, *counts in lines]

    def costs(self) -> dict:
        cpu_s, oversized, policy = self._ask("counters").splitlines()[0].split()
        taken = sum(lane.packets for lane in self.lanes() if lane.direction == "up")
        return {
            "cpu_s": float(cpu_s),
            "cpu_us_per_packet": round(float(cpu_s) * 1e6 / taken, 2) if taken else None,
            "packets_above_mtu": int(oversized),
            "real_time": int(policy) == SCHED_FIFO,
        }
