"""Boards that are not at hand: what others published of them, as a file of devices (see `devices`) would say it.

Every figure names its source. Nothing here was measured on a Raspberry Pi by this project, so what is planned from it is simulated.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.sizes import Sizes
from halo_mpi.schedule.cost import Cluster
from halo_mpi.schedule.devices import AT_FIRST, described, message_ms


class Figure(NamedTuple):
    """A number and who published it, or what it was derived from."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Board:
    """`memory_gbps`: GB/s that its memory gives; `speed_gbps`: GB/s of 4-bit weights that its matrix-vector products read, four cores;
    `memory_gib`: of it, for weights and KV cache."""

    name: str
    memory_gbps: Figure
    speed_gbps: Figure
    memory_gib: Figure


@dataclass(frozen=True, slots=True)
class Line:
    """`round_trip_ms`: between two boards, of a small packet; `mbit`: of one board's line. `frame_ms`: what a frame takes on the air beside
    its bits, where all boards share one radio channel and each message crosses it twice, to the access point and from there."""

    round_trip_ms: Figure
    mbit: Figure
    frame_ms: Figure | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    board: Board
    line: Line

    @property
    def figures(self) -> dict[str, Figure]:
        """All its numbers by name."""
        own = {**asdict(self.board), **asdict(self.line), "link_ms": LINK_MS, "sync_ms": SYNC_MS, "further_ms": FURTHER_MS}
        return {name: figure for name, figure in own.items() if isinstance(figure, Figure)}


README = "distributed-llama's README at version 0.7, github.com/b4rtaz/distributed-llama"
GUESSED_GIB = "a board with 8 GiB, less 1 GiB for system and program, which is a guess"
PI4 = Board(
    "pi4",
    Figure(5.56, "STREAM scale on a Pi 4, www.sci-pi.org.uk/bench/stream.html"),
    Figure(2.84, f"one Pi 4B, Llama-2-7B in Q40, 3.72 GB of weights in 1308 ms: {README}"),
    Figure(7.0, GUESSED_GIB),
)
PI5 = Board(
    "pi5",
    Figure(11.1, "tinymembench C copy on a Pi 5 of 8 GB, read and written: github.com/raspberrypi/firmware/issues/1876"),
    Figure(8.55, f"one Pi 5, Llama-2-7B in Q40, 3.72 GB of weights in 435 ms: {README}"),
    Figure(7.0, GUESSED_GIB),
)
PING_MS = "ping between a Pi 5 and its neighbour, 1 s apart: github.com/raspberrypi/linux/pull/7251"
ETHERNET4 = Line(
    Figure(0.188, f"as of a Pi 5, since no figure of a Pi 4 was found; {PING_MS}"),
    Figure(949, "iperf3 on a Pi 4B: tomcore.io/docs/articles/RaspberryPI/raspberry-pi-4b-network-performance"),
)
ETHERNET5 = Line(Figure(0.188, PING_MS), Figure(937, "iperf3 on a Pi 5: github.com/raspberrypi/linux/pull/7251"))
WIFI_MS = Figure(6.0, "twice the 3 ms between board and access point, of 1 to 5: github.com/RPi-Distro/firmware-nonfree/issues/60")
FRAME_MS = Figure(0.17, "802.11 OFDM: DIFS 34 us, 7.5 slots of 9 us, preamble and header 24 us, SIFS 16 us, acknowledgement 28 us")
WIFI4 = Line(WIFI_MS, Figure(77, "iperf3 on a Pi 4 at 5 GHz: github.com/raspberrypi/linux/issues/4390"), FRAME_MS)
WIFI5 = Line(WIFI_MS, Figure(200, "of a Pi 500+ at 5 GHz: github.com/RPi-Distro/firmware-nonfree/issues/60"), FRAME_MS)
PROFILES = {
    "pi4": Profile(PI4, ETHERNET4),
    "pi5": Profile(PI5, ETHERNET5),
    "pi4-wifi": Profile(PI4, WIFI4),
    "pi5-wifi": Profile(PI5, WIFI5),
}
LAB = "this program on x86-64, 4 ranks on 2 cores: bench/results/validation.json; a Pi takes longer"
LINK_MS = Figure(0.25, f"of a request and its answer, beside the round trip: {LAB}")
SYNC_MS = Figure(0.16, f"of a sync, beside its longest share: {LAB}")
FURTHER_MS = Figure(0.1, f"of each worker but the first: {LAB}")
HOPS = 4  # on a shared channel: a request and its answer, each to the access point and from there


def simulated(
    profile: Profile, count: int, sizes: Sizes, context: int, mbit: float | None = None, loss: float = 0.0, memory: int | None = None
) -> Cluster:
    """So many boards, the first of which is the root. `mbit`, `memory` (bytes): in place of the published ones; `loss`: of packets, per
    direction."""
    board, line = profile.board, profile.line
    shared = line.frame_ms is not None
    reached = (mbit or line.mbit.value) / (2 if shared else 1)
    own = {
        "name": board.name,
        "speed": board.speed_gbps.value,
        "memory": str(memory or int(board.memory_gib.value * 2**30)),
        "mbit": reached,
    }
    others = {**own, "count": count - 1, "link_ms": line.round_trip_ms.value + LINK_MS.value, "loss": loss}
    further_ms = FURTHER_MS.value + (_on_the_air_ms(line, reached, sizes.config) if shared else 0.0)
    content = {"devices": [own, others][:count], "sync_ms": SYNC_MS.value, "further_ms": further_ms}
    return described(content, f"profile {board.name}", sizes, context)


def _on_the_air_ms(line: Line, reached: float, config: ModelConfig) -> float:
    """What a worker's messages take on a shared channel, beside the bits of the request, which count on any line."""
    return HOPS * line.frame_ms.value + AT_FIRST * message_ms(reached, config)
