"""A rank's messages to and from its peers: persistent receives, nonblocking sends, nobody waits.

Where there are several TCP connections to a peer, every small message goes over two, and the copy that comes first counts:

    line 0   1  2  -  4  5 ...     3 was lost here, and holds up all behind it until TCP has sent it again,
    line 1   1  2  3  4  -  ...    but not those on the other line; only if both copies are lost does anybody wait

Where that happens often, there are more lines: a WIDER message says that all messages behind it come on all of them. Each line is a
communicator of its own, since MPI keeps the order within one. The n-th message on a line is the n-th on the others, counted from
where the line began, so copies need no number. Large messages go over line 0 alone; a 16-byte message keeps their place on the others.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from mpi4py import MPI

from halo_mpi.wire.lateness import Lateness
from halo_mpi.wire.messages import TAG, Kind, Message
from halo_mpi.wire.receiving import PROCESS_ENDED, Lane, Receiver, is_over

DEPTH = 8  # receives per peer: an answer, its trailer, and the answers to a few kicks
SIZES = (0, 1, 8)  # rows of the buffers for messages, besides the largest
MOST_COPIED_VALUES = 8192  # a decode message; 32 KiB in f32, below the 64 KiB from which MPI would ask the receiver first
TESTED = 4  # sends that are tested before a new one
LAST_S = 1.0  # so long the last messages may take to leave


class Mailbox:
    """Sends messages in this run's wire format and yields those that have come.

    `rows`, `width`: the most vectors in a message and their length. `copies`: communicators for the second line and further ones. With
    `trailers` a 16-byte message follows every one that carries vectors, where there is no second line. `sent_bytes` and
    `received_bytes` count per peer, copies included. `ended`: peers whose process has ended, as far as MPI tells (Open MPI with
    ULFM does); nothing is sent to them any more, and what came of them and was not handed out is lost.
    """

    def __init__(self, comm: MPI.Comm, peers: list[int], rows: int, width: int, wire: str, trailers: bool = False,
                 copies: Sequence[MPI.Comm] = ()):  # fmt: skip
        self._wire, self._trailers, self._peers, self.width = wire, trailers, peers, width
        first = [comm, *copies[:1]]
        self._lines, self._more = dict.fromkeys(peers, first), copies[1:]
        self._copied_rows = 1 if width <= MOST_COPIED_VALUES else 0
        self._receiver = Receiver(peers)
        open_lane, sizes = self._receiver.open, (rows, self._copied_rows)
        self._lanes = {peer: [open_lane(line, peer, DEPTH, size, width) for line, size in zip(first, sizes)] for peer in peers}
        self._lateness = {peer: Lateness() for peer in peers}
        self._pools = [SendPool(size, width) for size in (*(size for size in SIZES if size < rows), rows)]
        self._handed_out = dict.fromkeys(peers, 0)  # messages
        self.ended: set[int] = set()
        self.sent_bytes = dict.fromkeys(peers, 0)

    def limit(self, lines: int) -> None:
        """Use no more lines than this: there are not more connections. Before the others are used."""
        self._lines = {peer: each[:lines] for peer, each in self._lines.items()}
        self._more = self._more[: max(0, lines - 2)]

    @property
    def copies(self) -> dict[int, int]:
        """How often each peer is sent a small message."""
        return {peer: len(lines) for peer, lines in self._lines.items()}

    @property
    def received_bytes(self) -> dict[int, int]:
        return self._receiver.received_bytes

    def post(self, peers: list[int], kind: Kind, seq: int, layer: int = 0, position: int = 0, x: np.ndarray | None = None,
             epoch: int = 0, lag: int = 0, plan: int = 0, wire: str | None = None) -> None:  # fmt: skip
        """Start sending one message with x, f32 [rows, width] or None, to all `peers`."""
        rows = 0 if x is None else len(x)
        copied = rows <= self._copied_rows
        lines = {peer: self._lines[peer] if copied else self._lines[peer][:1] for peer in peers}
        self._send(rows, lines, (seq, kind, layer, position, x, wire or self._wire, epoch, lag, plan))
        if not copied and any(others := {peer: self._lines[peer][1:] for peer in peers}.values()):
            self._send(0, dict(zip(peers, others)), (seq, Kind.ELSEWHERE))
        if rows and self._trailers and (alone := [peer for peer in peers if len(self._lines[peer]) == 1]):
            self.post(alone, Kind.TRAILER, seq)

    def _send(self, rows: int, lines: dict[int, list[MPI.Comm]], content: tuple) -> None:
        pool = next(pool for pool in self._pools if rows <= pool.rows)
        message = pool.take()
        data = message.write(*content)
        self.ended |= pool.send(message, data, {peer: each for peer, each in lines.items() if peer not in self.ended})
        for peer, each in lines.items():
            self.sent_bytes[peer] += data.size * len(each)

    def poll(self) -> Iterator[tuple[int, Message]]:
        """Sender and message of everything that has come, one sender's in the order of sending.

        A message is valid until the iterator goes on.
        """
        self.ended |= self._receiver.test()
        for peer in self._peers:
            while peer not in self.ended and (lane := self._lane_of_next(peer)):
                self._handed_out[peer] += 1
                message = lane.first()
                if message.header["kind"] == Kind.WIDER:
                    self._receive_more(peer)
                    self.widen(peer)
                else:
                    yield peer, message
                self._receiver.take(lane)
            if self._lateness[peer].is_much:
                self.widen(peer)

    def _lane_of_next(self, peer: int) -> Lane | None:
        """Where the peer's next message has come; copies of what was handed out before are taken out on the way."""
        handed_out, found, late = self._handed_out[peer], None, False
        for lane in self._lanes[peer]:
            while (message := lane.first()) and lane.taken < handed_out:
                self._receiver.take(lane)
            late = late or lane.taken < handed_out
            if not found and message and message.header["kind"] != Kind.ELSEWHERE:
                found = lane
        if found:
            self._lateness[peer].observe(late)
        return found

    def widen(self, peer: int) -> None:
        """From now on send to the peer over all lines, and tell it."""
        if self._more and len(self._lines[peer]) == 2:
            self.post([peer], Kind.WIDER, 0)
            self._lines[peer] = [*self._lines[peer], *self._more]

    def _receive_more(self, peer: int) -> None:
        """What the peer sends from now on comes over all lines."""
        for line in self._more:
            self._lanes[peer].append(self._receiver.open(line, peer, DEPTH, self._copied_rows, self.width, self._handed_out[peer]))

    def close(self) -> None:
        """Wait until everything is sent, but not for ever, and let go of MPI's requests."""
        until = time.perf_counter() + LAST_S
        for pool in self._pools:
            pool.close(until)
        self._receiver.close()


class SendPool:
    """Messages under way: a buffer is used again only when MPI has let go of it."""

    def __init__(self, rows: int, width: int):
        self.rows = rows
        self._shape = rows, width
        self._free: list[Message] = []
        self._busy: deque[tuple[Message, list[MPI.Prequest]]] = deque()

    def take(self) -> Message:
        """A message that may be written. What a peer that is cut off does not take stays busy, so only a few are tested each time."""
        for _ in range(min(TESTED, len(self._busy))):
            message, requests = self._busy.popleft()
            if _all_over(requests):
                self._release(message, requests)
            else:
                self._busy.append((message, requests))
        return self._free.pop() if self._free else Message(*self._shape)

    def send(self, message: Message, data: np.ndarray, lines: dict[int, list[MPI.Comm]]) -> set[int]:
        """Start sending the first bytes of `message` (what its `write` returned) to every peer, on each of its lines.

        Returns the peers of whom MPI says that their process has ended. Open MPI uses its connections to a peer by turns, and an Isend
        takes two (it tries a short cut first), a persistent send one: so the copies of a message are on different connections.
        """
        requests, ended = [], set()
        for peer, each in lines.items():
            try:
                for line in each:
                    request = line.Send_init([data, MPI.BYTE], peer, TAG)
                    request.Start()
                    requests.append(request)
            except MPI.Exception as error:
                if error.Get_error_class() != PROCESS_ENDED:
                    raise
                ended.add(peer)
        self._busy.append((message, requests))
        return ended

    def close(self, until: float) -> None:
        """Wait for what is under way, not longer than that (perf_counter): who is cut off never takes it."""
        while self._busy and time.perf_counter() < until:
            message, requests = self._busy.popleft()
            if _all_over(requests):
                self._release(message, requests)
            else:
                self._busy.append((message, requests))
                time.sleep(1e-4)

    def _release(self, message: Message, requests: list[MPI.Prequest]) -> None:
        for request in requests:
            request.Free()
        self._free.append(message)


def _all_over(requests: list[MPI.Prequest]) -> bool:
    """Whether all are complete, or never will be, since the peer has ended."""
    try:
        return MPI.Request.Testall(requests)
    except MPI.Exception:
        return all([is_over(request) for request in requests])
