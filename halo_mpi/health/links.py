"""What the line between the root and a worker does: round trips, late and lost packets, bandwidth, clocks.

The root asks and the worker answers, in messages as long as a token's:

    E want ......   an answer of `want` bytes, which begins with the worker's clock, f64
    T addresses     the root's, JSON: tune connections to them; the answer is their number, JSON
    C               segments sent, and sent again, by connection, JSON
    S alone         the end; whether MPI's own end would wait for somebody
"""

import json
import struct
import time
from dataclasses import asdict, dataclass

import numpy as np

from halo_mpi.health.finding import ERROR, OK, WARNING, Finding
from halo_mpi.health.talk import LONGEST_S, SilentError, Talk
from halo_mpi.schedule.advice import LATE_RATE
from halo_mpi.schedule.telemetry import LATE, LATE_MS
from halo_mpi.wire.sockets import sent_segments, tune_sockets

MESSAGE_BYTES = 1168  # a token's at hidden 576 in f16
WARM_UP, PINGS, PINGS_S = 16, 400, 2.0
LONG_BYTES, LONG_TIMES = 512 * 2**10, 2
ANSWER_S = 5.0
HEAD, CLOCK = struct.Struct("<cxxxi"), struct.Struct("<d")
SLOW_MS, SLOW_MBIT = 3.0, 40.0  # a token of 30 layers waits for 60 round trips; a prompt of 500 tokens is some MB
LOSS, LEAST_LOST = 0.005, 3
CABLE = "use a cable or another WiFi channel; generate sends twice and repairs, --sync relaxed goes on past late answers"
TRAFFIC = "look for other traffic and programs, and WiFi's power saving: `sudo iw wlan0 set power_save off`"
TWO = "take Open MPI, and name the network that the hosts share: --mca btl_tcp_if_include eth0"


@dataclass(slots=True)
class Link:
    """Of one worker. Rates are parts of all, None where that is not told; `connections`: TCP's, that messages go over; 0 on one host."""

    rank: int
    host: str
    connections: int
    rtt_p50_ms: float
    rtt_p99_ms: float
    rtt_max_ms: float
    late_rate: float
    loss_there: float | None
    loss_back: float | None
    lost: int
    mbit_there: float
    mbit_back: float
    ahead_s: float

    def to_dict(self) -> dict:
        return asdict(self)


def measure(talk: Talk, host: str, here: set[str], there: set[str]) -> Link:
    """`here`, `there`: addresses of the root's and the worker's host. Raises SilentError."""
    for _ in range(WARM_UP):  # Open MPI opens connections when they are used first
        _echo(talk, MESSAGE_BYTES, MESSAGE_BYTES)
    apart = there - here
    if apart:
        tune_sockets(apart)
    _ask(talk, b"T" + json.dumps(sorted(here - there)).encode())
    before, times, ahead = _segments(talk, apart), [], []
    until = time.perf_counter() + PINGS_S
    while len(times) < PINGS and time.perf_counter() < until:
        took_s, ahead_s = _echo(talk, MESSAGE_BYTES, MESSAGE_BYTES)
        times.append(took_s * 1e3)
        ahead.append((took_s, ahead_s))
    after = _segments(talk, apart)
    p50, p99, most = (float(np.quantile(times, part)) for part in (0.5, 0.99, 1.0))
    late = float(np.mean(np.array(times) > LATE * p50 + LATE_MS))
    (sent, lost), (sent_back, lost_back) = (_increase(*each) for each in zip(before, after))
    mbit = []
    for sizes in ((LONG_BYTES, MESSAGE_BYTES), (MESSAGE_BYTES, LONG_BYTES)):
        took_s = min(_echo(talk, *sizes)[0] for _ in range(LONG_TIMES))
        mbit.append(8e-6 * LONG_BYTES / max(1e-6, took_s - p50 / 1e3))
    losses = (sum(lost) / max(1, sum(sent)) if sent else None for sent, lost in ((sent, lost), (sent_back, lost_back)))
    return Link(talk.peer, host, len(sent), p50, p99, most, late, *losses, sum(lost + lost_back), *mbit, min(ahead)[1])


def serve(talk: Talk, here: set[str]) -> bool:
    """Answer the root until it says stop; whether MPI's own end would wait for somebody then. Raises SilentError.

    `here`: addresses of this host.
    """
    root: set[str] = set()
    while True:
        message = talk.receive(LONGEST_S)
        kind, rest = message[:1], message[1:]
        if kind == b"S":
            return bool(rest[0])
        if kind == b"T":
            root = set(json.loads(rest)) - here
            if root:
                tune_sockets(root)
            answer = b"null"
        elif kind == b"C":
            answer = json.dumps(sent_segments(root)).encode()
        else:
            answer = CLOCK.pack(time.time()).ljust(HEAD.unpack_from(message)[1], b".")
        talk.send(answer, ANSWER_S)


def say_stop(talks: list[Talk], alone: bool) -> None:
    """To those that answer still."""
    for talk in talks:
        try:
            talk.send(b"S" + bytes([alone]), ANSWER_S)
        except SilentError:
            pass


def silent(rank: int, host: str, why: str) -> Finding:
    """A worker did not answer."""
    says = f"rank {rank} {why}"
    return Finding(
        "hosts", ERROR, says, "look whether the board is up and its network works; try `halo-mpi doctor --hostfile FILE`", host
    )


def judged(links: list[Link], syncs: int) -> list[Finding]:
    """`syncs`: of a token; 0: not known."""
    found = [finding for link in links for finding in _judged(link, syncs)]
    if links and not found:
        slowest = max(links, key=lambda link: link.rtt_p50_ms)
        lost = "hardly anything lost" if any(link.lost for link in links) else "nothing lost"
        if all(link.loss_there is None for link in links):
            lost = "losses are not told" if any(link.connections for link in links) else "within one host"
        found.append(Finding("links", OK, f"round trips of {slowest.rtt_p50_ms:.2f} ms at most, {lost}"))
    return found


def _judged(link: Link, syncs: int) -> list[Finding]:
    found, losses = [], {"there": link.loss_there, "back": link.loss_back}
    if link.lost >= LEAST_LOST and max(loss or 0 for loss in losses.values()) >= LOSS:
        told = ", ".join(f"{loss:.1%} on the way {way}" for way, loss in losses.items() if loss is not None)
        found.append((f"packets lost: {told}", CABLE))
    elif link.late_rate >= LATE_RATE:
        says = f"{link.late_rate:.1%} of answers late: {link.rtt_p99_ms:.1f} ms (p99) instead of {link.rtt_p50_ms:.2f}"
        found.append((says, TRAFFIC))
    if link.rtt_p50_ms > SLOW_MS:
        says = f"a round trip takes {link.rtt_p50_ms:.1f} ms"
        says += f", and a token waits for {syncs} of them: {syncs * link.rtt_p50_ms:.0f} ms" if syncs else ""
        found.append((says, "use a cable, or plan without this host"))
    if min(link.mbit_there, link.mbit_back) < SLOW_MBIT:
        says = f"{link.mbit_there:.0f} Mbit/s there, {link.mbit_back:.0f} back: long prompts will take time"
        found.append((says, "use a cable, or a faster switch or WiFi"))
    if link.connections == 1:
        found.append(("one connection instead of two: messages are not sent twice", TWO))
    return [Finding("links", WARNING, says, do, link.host) for says, do in found]


def _echo(talk: Talk, there: int, back: int) -> tuple[float, float]:
    """Seconds that a message and its answer took, and how far the worker's clock is ahead."""
    clock, begin = time.time(), time.perf_counter()
    answer = _ask(talk, HEAD.pack(b"E", back).ljust(there, b"."))
    took_s = time.perf_counter() - begin
    return took_s, CLOCK.unpack_from(answer)[0] - clock - took_s / 2


def _segments(talk: Talk, apart: set[str]) -> tuple[dict, dict]:
    """Segments sent, and sent again, by connection, of the root and of the worker."""
    return sent_segments(apart), json.loads(_ask(talk, b"C"))


def _increase(before: dict, after: dict) -> tuple[list[int], list[int]]:
    """Of connections that were used in between: segments sent, and lost."""
    used = [each for each in before if each in after and after[each][0] > before[each][0]]
    return [after[each][0] - before[each][0] for each in used], [max(0, after[each][1] - before[each][1]) for each in used]


def _ask(talk: Talk, message: bytes) -> bytearray:
    talk.send(message, ANSWER_S)
    return talk.receive(ANSWER_S)
