"""Links made by the kernel: veth pairs into a bridge, nft for losses, tbf for rates, netem for delays where there is one.

nft's random numbers cannot be seeded. It judges in the bridge's forward hook, where the sender does not notice a drop (in
its own output hook it would see an error instead of a loss) and each packet comes by once.
"""

from __future__ import annotations

import json

from bench.lab.links import INTERFACE, MTU, QUEUE_MS, Conditions, Lane, Names
from bench.lab.scenario import Host, Scenario
from bench.lab.system import NETNS, LabError, call, inside, switch_offloads_off

BRIDGE = "switch0"
PARTS_PER_LOSS = 1_000_000
COUNTS = ("judged", "dropped", "cut")


def missing_for(scenario: Scenario) -> str | None:
    """Why the kernel alone cannot make these links, or None."""
    hosts = list(scenario.hosts.values())
    if any(host.burst for host in hosts):
        return "bursts"
    if len({(host.delay_ms, host.jitter_ms) for host in hosts}) > 1:
        return "delays that differ between hosts"
    try:
        call("nft", "list", "tables")
    except LabError as error:
        return f"nft ({error})"
    return None


class KernelLinks:
    def __init__(self, names: Names, hosts: dict[str, Host]):
        self.names, self.hosts, self.unplugged = names, hosts, set()
        self.name = "nft+netem" if any(host.delay_ms for host in hosts.values()) else "nft"

    def connect(self) -> None:
        switch = self.names.switch
        lines = [f"link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"]
        for host in self.hosts:
            there, mac = self.names.namespace(host), self.names.hardware_address(host)
            lines += [
                f"link add {host} mtu {MTU} type veth peer name {INTERFACE} mtu {MTU} address {mac} netns {there}",
                f"link set {host} master {BRIDGE} up",
            ]
        call("ip", "-n", switch, "-batch", "-", stdin="\n".join([*lines, f"link set {BRIDGE} up"]) + "\n")
        inside(switch, lambda: [switch_offloads_off(interface) for interface in (BRIDGE, *self.hosts)])
        for host in self.hosts:
            inside(self.names.namespace(host), lambda: switch_offloads_off(INTERFACE))
            self._shape(host)
        self._nft("\n".join(["table bridge lab {", *self._declarations(), "}"]))

    def _shape(self, host: str) -> None:
        """Rates on both ends of the link; the delay on the switch's end, which each packet leaves by exactly once."""
        link = self.hosts[host]
        for namespace, interface in ((self.names.namespace(host), INTERFACE), (self.names.switch, host)):
            parent = ["root"]
            if link.rate_mbit:
                burst_bytes = max(2 * (MTU + 14), int(link.rate_mbit * 31))  # 31 bytes per Mbit/s: 0.25 ms
                rate = ["rate", f"{link.rate_mbit}mbit", "burst", str(burst_bytes), "latency", f"{QUEUE_MS}ms"]
                call("tc", "-n", namespace, "qdisc", "add", "dev", interface, *parent, "handle", "1:", "tbf", *rate)
                parent = ["parent", "1:1"]
            if link.delay_ms and interface == host:
                delay = ["delay", f"{link.delay_ms}ms", f"{link.jitter_ms}ms", "limit", "10000"]
                call("tc", "-n", namespace, "qdisc", "add", "dev", interface, *parent, "handle", "2:", "netem", *delay)
                # netem reorders what jitters unless its inner queue is a plain one (tc-netem(8))
                call("tc", "-n", namespace, "qdisc", "add", "dev", interface, "parent", "2:1", "pfifo", "limit", "10000")

    def _declarations(self) -> list[str]:
        counters = [f"counter {way}_{host}_{count} {{}}" for host in self.hosts for way in ("up", "down") for count in COUNTS]
        return [*counters, "chain forward { type filter hook forward priority 0; policy accept; }"]

    def apply(self, conditions: Conditions) -> None:
        rules, rule = ["flush chain bridge lab forward"], "add rule bridge lab forward"
        ways = (("up", "iifname"), ("down", "oifname"))
        for host in sorted(conditions.black_holes | conditions.unplugged):
            rules += [f'{rule} {key} "{host}" counter name {way}_{host}_cut drop' for way, key in ways]
        rules.append(f"{rule} ether type != ip accept")
        for host in conditions.worst_first() if conditions.lossy else ():
            parts = round(conditions.hosts[host].loss * PARTS_PER_LOSS)
            for way, key in ways if parts else ():
                counted = f"counter name {way}_{host}_judged"
                lost = f"numgen random mod {PARTS_PER_LOSS} < {parts} counter name {way}_{host}_dropped drop"
                rules += [f'{rule} {key} "{host}" {counted} {lost}', f'{rule} {key} "{host}" accept']
        self._nft("\n".join(rules))
        for host in conditions.unplugged ^ self.unplugged:
            call("ip", "-n", self.names.switch, "link", "set", host, "down" if host in conditions.unplugged else "up")
        self.unplugged = set(conditions.unplugged)

    def lanes(self) -> list[Lane]:
        listed = json.loads(self._nft_command("-j", "list", "counters", "table", "bridge", "lab"))["nftables"]
        counted = {c["counter"]["name"]: c["counter"]["packets"] for c in listed if "counter" in c}
        links = json.loads(call("ip", "-n", self.names.switch, "-s", "-j", "link", "show"))
        ports = {link["ifname"]: link["stats64"] for link in links}
        lanes = []
        for host in self.hosts:
            ends = ((self.names.namespace(host), INTERFACE), (self.names.switch, host))
            for way, side, (namespace, interface) in zip(("up", "down"), ("rx", "tx"), ends):
                crossed, counts = ports[host][side], [counted[f"{way}_{host}_{count}"] for count in COUNTS]
                overflow = self._overflow(namespace, interface) if self.hosts[host].rate_mbit else 0
                lanes.append(Lane(host, way, crossed["packets"], crossed["bytes"], *counts, overflow))
        return lanes

    def _overflow(self, namespace: str, interface: str) -> int:
        queues = json.loads(call("tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", interface))
        return sum(queue.get("drops", 0) for queue in queues if queue.get("root"))

    def costs(self) -> dict:
        return {}

    def _nft(self, script: str) -> None:
        self._nft_command("-f", "-", stdin=script + "\n")

    def _nft_command(self, *words: str, stdin: str = "") -> str:
        return call("nsenter", f"--net={NETNS / self.names.switch}", "nft", *words, stdin=stdin)
