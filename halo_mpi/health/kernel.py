"""What this host's kernel lets a process do against lost packets, and what its routes say."""

import platform
import subprocess

from halo_mpi.health.finding import OK, WARNING, Finding
from halo_mpi.wire.sockets import accepted_options

SECONDS = 5.0
RTO_MIN = "rto_min"


def kernel() -> Finding:
    """Whether connections can be tuned without root rights, or are by their routes."""
    try:
        accepted = accepted_options()
    except OSError as error:
        return Finding(
            "sockets", WARNING, f"no connection could be tried ({error.strerror})", "look whether the loopback interface is up"
        )
    return judged(accepted, link_routes(), platform.release())


def judged(accepted: dict[str, bool], routes: list[str], release: str) -> Finding:
    """`accepted`: options by name; `routes`: to this host's networks, as `ip route` prints them; `release`: the kernel's."""
    refused = sorted(name for name, taken in accepted.items() if not taken)
    if not refused:
        return Finding("sockets", OK, "the kernel lets connections be tuned")
    untuned = [route for route in routes if RTO_MIN not in route.split()]
    if routes and not untuned:
        return Finding("sockets", OK, f"tuned by routes (Linux {release} refuses {', '.join(refused)})")
    says = f"Linux {release} refuses {', '.join(refused)}: a packet lost with its copy takes 0.2 s or more"
    route = untuned[0] if untuned else "NET dev IF"
    return Finding(
        "sockets", WARNING, says, f"run `sudo ip route change {route} rto_min 5ms quickack 1`, at every start, or take Linux 6.15"
    )


def link_routes() -> list[str]:
    """The routes to the networks that this host is in; none where there is no `ip`."""
    try:
        told = subprocess.run(
            ["ip", "-o", "-4", "route", "show", "scope", "link"], capture_output=True, text=True, timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [" ".join(line.split()) for line in told.stdout.splitlines() if " linkdown" not in line]
