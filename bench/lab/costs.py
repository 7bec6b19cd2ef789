"""What the lab's links cost by themselves: python -m bench.lab.costs [--round-trips N] [--json FILE]

UDP round trips of a 1200-byte message between pi1 and pi2, one at a time, over the kernel's links, over the relay, and over the
relay with 2 ms of delay each way: the round trip in microseconds (the scenario's own delay taken off) and the relay's CPU time
per packet; then the same CPU time while packets come back to back.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path
from statistics import median, quantiles

import click

from bench.lab.lab import Lab
from bench.lab.scenario import Host, Scenario
from bench.lab.system import LabError, inside

MESSAGE = bytes(1200)
CASES = (("kernel", 0.0), ("relay", 0.0), ("relay", 2.0))
BATCH = 16  # messages back to back


def udp_socket(lab: Lab, host: str, port: int = 0) -> socket.socket:
    """A socket on one of the lab's hosts; it waits at most 5 s."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.settimeout(5)
        made.bind((lab.names.address(host), port))
        return made

    return inside(lab.names.namespace(host), make)


def echo(answering: socket.socket) -> None:
    """Answers until an empty message comes."""
    while (message := answering.recvfrom(2048))[0]:
        answering.sendto(*message)


def round_trips_us(lab: Lab, number: int, batch: int = 1) -> list[float]:
    samples = []
    with udp_socket(lab, "pi1") as asking, udp_socket(lab, "pi2", 7007) as answering:
        thread = threading.Thread(target=echo, args=(answering,))
        thread.start()
        there = answering.getsockname()
        for _ in range(number // batch):
            started = time.perf_counter()
            for _ in range(batch):
                asking.sendto(MESSAGE, there)
            for _ in range(batch):
                asking.recv(2048)
            samples.append((time.perf_counter() - started) * 1e6)
        asking.sendto(b"", there)
        thread.join()
    return samples


def measure(backend: str, delay_ms: float, number: int) -> dict:
    scenario = Scenario("costs", {host: Host(delay_ms=delay_ms) for host in ("pi1", "pi2")})
    with Lab(scenario, backend) as lab:
        round_trips_us(lab, 20)  # address resolution
        before = lab.links.costs()
        single = [sample - 2000 * delay_ms for sample in round_trips_us(lab, number)]
        between = lab.links.costs()
        round_trips_us(lab, number, BATCH)
        after = lab.links.costs()
    result = {"backend": backend, "delay_ms": delay_ms, "p50_us": median(single), "p99_us": quantiles(single, n=100)[98]}
    if before:
        packets = 2 * number
        result["cpu_us_per_packet"] = (between["cpu_s"] - before["cpu_s"]) * 1e6 / packets
        result["cpu_us_per_packet_back_to_back"] = (after["cpu_s"] - between["cpu_s"]) * 1e6 / packets
    return {**result, "samples_us": single}


@click.command(help=__doc__)
@click.option("--round-trips", default=1000, show_default=True)
@click.option("--json", "json_file", type=click.Path(), help="Write the samples here.")
def main(round_trips: int, json_file: str | None) -> None:
    results = [measure(backend, delay_ms, round_trips) for backend, delay_ms in CASES]
    print(f"{'links':8} {'delay ms':>8} {'p50 us':>8} {'p99 us':>8} {'CPU us/packet':>14} {'back to back':>13}")
    for r in results:
        costs = [f"{r[key]:.1f}" if key in r else "" for key in ("cpu_us_per_packet", "cpu_us_per_packet_back_to_back")]
        print(f"{r['backend']:8} {r['delay_ms']:8.1f} {r['p50_us']:8.1f} {r['p99_us']:8.1f} {costs[0]:>14} {costs[1]:>13}")
    if json_file:
        Path(json_file).write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        sys.exit(2)
