"""One laboratory: it is brought up under a name of its own and taken down by that name alone, whatever state it is in."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from bench.lab.kernel_links import KernelLinks, missing_for
from bench.lab.links import INTERFACE, Conditions, Links, Names
from bench.lab.relay_links import RelayLinks, relay_program
from bench.lab.processes import end_processes, is_alive, network_of, parent_of, program_of, rank_of, read_pid, started_at
from bench.lab.scenario import Scenario
from bench.lab.system import NETNS, LabError, call, inside, pids_in, require_root_and_tools

STATE = Path("/run/halo-lab")  # a folder per lab
PREFIX = "hl"
BACKENDS = ("auto", "kernel", "relay")
DAEMONS = ("prted", "prterun", "mpirun")

# AGENT HOST COMMAND runs COMMAND on that host, as ssh on pi1 would: in its network namespace and under its own name. A host that is cut
# off cannot be reached, and nobody hears of what ends there until it is back.
AGENT = """#!/bin/sh
host=$1
shift
[ "$host" = pi1 ] && and_stay=exec
enter() {{
    $and_stay nsenter --net={netns}/{lab}-"$host" unshare --uts \\
        sh -c 'echo "$1" > /proc/sys/kernel/hostname; exec sh -c "$2"' sh "$host" "$*"
}}
cut_off() {{ [ -e {away}/pi1 ] || [ -e {away}/"$host" ]; }}
tries=0
while [ "$host" != pi1 ] && cut_off; do
    [ $((tries += 1)) -gt {tries} ] && {{ echo "connect to host $host: Connection timed out" >&2; exit 255; }}
    sleep 0.1
done
enter "$@"
code=$?
while cut_off; do sleep 0.1; done
exit $code
"""
CONNECT_S = 3.0


class Lab:
    """Use it as a context: `with Lab(scenario) as lab`."""

    def __init__(self, scenario: Scenario, backend: str = "auto", seed: int = 0):
        self.scenario, self.backend, self.seed = scenario, backend, seed
        self.conditions = Conditions(dict(scenario.hosts))
        self.links: Links | None = None

    def __enter__(self) -> Lab:
        require_root_and_tools()
        self.folder = new_folder()
        self.names = Names(self.folder.name, int(self.folder.name[len(PREFIX) :], 16) % 256)
        try:
            self._bring_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def disown(self) -> None:
        """It stays when this process ends."""
        (self.folder / "owner").unlink()

    def __exit__(self, *_) -> None:
        take_down(self.names.lab)

    @property
    def agent(self) -> Path:
        return self.folder / "agent"

    @property
    def away(self) -> Path:
        """Has a file for every host that is cut off, for the agent."""
        return self.folder / "away"

    @property
    def hostfile(self) -> Path:
        return self.folder / "hostfile"

    @property
    def marks(self) -> Path:
        """What the program knows as HALO_MPI_LAB_DIR."""
        return self.folder / "marks"

    def _bring_up(self) -> None:
        self.marks.mkdir()
        (self.folder / "owner").write_text(f"{os.getpid()} {started_at(os.getpid())}")
        self.away.mkdir()
        self.agent.write_text(AGENT.format(netns=NETNS, lab=self.names.lab, away=self.away, tries=round(CONNECT_S / 0.1)))
        self.agent.chmod(0o755)
        self.hostfile.write_text("".join(f"{host} slots=1\n" for host in self.scenario.hosts))
        namespaces = {host: self.names.namespace(host) for host in self.scenario.hosts}
        for namespace in (self.names.switch, *namespaces.values()):
            call("ip", "netns", "add", namespace)
            inside(namespace, silence_ipv6)
        self.links = self._choose_links()
        self.links.connect()
        self.links.apply(self.conditions)
        for host, namespace in namespaces.items():
            address = self.names.address(host)
            lines = [f"address add {address}/24 dev {INTERFACE}", f"link set {INTERFACE} up", "link set lo up"]
            lines.append(f"route change {route(self.scenario, self.names, host)}")
            call("ip", "-n", namespace, "-batch", "-", stdin="\n".join(lines) + "\n")

    def _choose_links(self) -> Links:
        hosts = self.scenario.hosts
        obstacle = missing_for(self.scenario)
        if not obstacle and any(host.delay_ms for host in hosts.values()) and not self._has_netem():
            obstacle = "delays, for want of netem"
        if self.backend == "kernel" and obstacle:
            raise LabError(f"the kernel alone cannot make these links: {obstacle}")
        if self.backend == "kernel" or (self.backend == "auto" and not obstacle):
            return KernelLinks(self.names, hosts)
        try:
            relay_program()
        except LabError as error:
            raise LabError(f"{error} (the kernel alone cannot do it: {obstacle})" if obstacle else str(error)) from None
        return RelayLinks(self.names, hosts, self.seed, self.folder)

    def _has_netem(self) -> bool:
        try:
            call("tc", "-n", self.names.switch, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
        except LabError:
            return False
        return True

    def apply(self) -> None:
        """Lets changed conditions hold."""
        assert self.links is not None
        self.links.apply(self.conditions)
        cut = self.conditions.black_holes | self.conditions.unplugged
        for host in self.scenario.hosts:
            if host in cut:
                (self.away / host).touch()
            else:
                (self.away / host).unlink(missing_ok=True)

    def host_of(self, pid: int) -> str | None:
        """The host that a process stands on."""
        place = network_of(pid)
        return next((h for h in self.scenario.hosts if (NETNS / self.names.namespace(h)).stat().st_ino == place), None)

    def rank_on(self, host: str) -> int | None:
        """The process of the rank on a host: of its processes that belong to a rank, the one in a pid file, else the first."""
        ranks = {pid for pid in pids_in(self.names.namespace(host)) if rank_of(pid) is not None and is_alive(pid)}
        told = {read_pid(file) for file in self.marks.glob("rank-*.pid")}
        first = (pid for pid in sorted(ranks) if parent_of(pid) not in ranks)
        return next(iter(ranks & told), None) or next(first, None)

    def daemon_on(self, host: str) -> int | None:
        """The process of MPI's daemon on a host; on the first one it is mpirun itself."""
        return next((pid for pid in pids_in(self.names.namespace(host)) if program_of(pid) in DAEMONS and is_alive(pid)), None)

    def processes(self) -> list[int]:
        """Everything that runs on the hosts."""
        return [pid for host in self.scenario.hosts for pid in pids_in(self.names.namespace(host)) if is_alive(pid)]


def new_folder() -> Path:
    STATE.mkdir(mode=0o755, exist_ok=True)
    while True:
        folder = STATE / f"{PREFIX}{secrets.token_hex(2)}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
        except FileNotFoundError:  # another lab that went away took the empty parent along
            STATE.mkdir(mode=0o755, exist_ok=True)


def silence_ipv6() -> None:
    """In the namespace of the calling thread: no packets but those that programs send."""
    for which in ("all", "default"):
        switch = Path(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6")
        if switch.exists():
            switch.write_text("1")


def route(scenario: Scenario, names: Names, host: str) -> str:
    """The route that carries the host's TCP settings: namespaces may not set any congestion control, but routes may."""
    words = f"{names.network} dev {INTERFACE} proto kernel scope link src {names.address(host)} congctl {scenario.congestion}"
    if scenario.rto_min_ms:
        words += f" rto_min {scenario.rto_min_ms}ms"
    return words + (" quickack 1" if scenario.quickack else "")


def is_owned(lab: str) -> bool:
    """Whether the `run` that made this lab is still at work."""
    try:
        pid, started = (STATE / lab / "owner").read_text().split()
    except (OSError, ValueError):
        return False
    return is_alive(int(pid)) and started_at(int(pid)) == started


def existing_labs() -> list[str]:
    folders = STATE.iterdir() if STATE.is_dir() else ()
    return sorted(folder.name for folder in folders if folder.name.startswith(PREFIX))


def take_down(lab: str) -> None:
    """Ends everything in the lab's namespaces, then removes these (links, queues and tables go along) and its files."""
    namespaces = [path.name for path in NETNS.glob(f"{lab}-*")]
    for namespace in namespaces:
        end_processes(namespace)
        call("ip", "netns", "del", namespace)
    shutil.rmtree(STATE / lab, ignore_errors=True)
    try:
        STATE.rmdir()
    except OSError:
        pass  # other labs
