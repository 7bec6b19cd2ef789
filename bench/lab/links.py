"""What the two ways to build the hosts' links have in common: kernel_links.py and relay_links.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from bench.lab.scenario import Host

INTERFACE = "eth0"  # of every host
MTU = 1500
QUEUE_MS = 50  # of a link with a rate; lane.h has the same


def number_of(host: str) -> int:
    return int(host[2:])


@dataclass(frozen=True)
class Names:
    """A lab's namespaces and addresses."""

    lab: str  # such as "hl3fa2"
    subnet: int  # 10.83.SUBNET.0/24

    @property
    def switch(self) -> str:
        return f"{self.lab}-switch"

    @property
    def network(self) -> str:
        return f"10.83.{self.subnet}.0/24"

    def namespace(self, host: str) -> str:
        return f"{self.lab}-{host}"

    def address(self, host: str) -> str:
        return f"10.83.{self.subnet}.{number_of(host)}"

    def hardware_address(self, host: str) -> str:
        return f"02:48:4c:00:{self.subnet:02x}:{number_of(host):02x}"


@dataclass
class Conditions:
    """The state of all links: each host's values, whether packets are lost, and who cannot be reached."""

    hosts: dict[str, Host]
    lossy: bool = False
    black_holes: set[str] = field(default_factory=set)
    unplugged: set[str] = field(default_factory=set)

    def worst_first(self) -> list[str]:
        """The order in which links judge: the first of two hosts in this list is the one whose link judges a packet."""
        return sorted(self.hosts, key=lambda h: (self.hosts[h].mean_loss, self.hosts[h].delay_ms, number_of(h)), reverse=True)


@dataclass(frozen=True)
class Lane:
    """One direction ("up": from the host) of one host's link: how many packets crossed it, and what happened to them.

    judged: met this link's loss (those that met the other end's are not counted); dropped: of these, lost; cut: swallowed by a
    black hole or a link that is down; overflow: found a full queue.
    """

    host: str
    direction: str
    packets: int
    bytes: int
    judged: int
    dropped: int
    cut: int
    overflow: int


class Links(Protocol):
    """The links between the hosts' namespaces, which exist, and the switch."""

    name: str  # for the record

    def connect(self) -> None:
        """Every host gets INTERFACE, not yet configured."""

    def apply(self, conditions: Conditions) -> None: ...

    def lanes(self) -> list[Lane]: ...

    def costs(self) -> dict:
        """What the links themselves cost, for the record."""
