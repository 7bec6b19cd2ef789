"""A rank's messages to and from its peers: persistent receives, nonblocking sends, nobody waits."""

from collections import deque
from collections.abc import Iterator

import numpy as np
from mpi4py import MPI

from halo_mpi.wire.messages import TAG, Kind, Message

DEPTH = 8  # receives per peer: an answer, its trailer, and the answers to a few kicks
SIZES = (0, 1, 8)  # rows of the buffers for messages, besides the largest
TESTED = 4  # sends that are tested before a new one


class Mailbox:
    """Sends messages in this run's wire format and yields those that have come.

    `rows`, `width`: the most vectors in a message and their length. With `trailers` a 16-byte message follows every one
    that carries vectors. `sent_bytes` and `received_bytes` count per peer.
    """

    def __init__(self, comm: MPI.Comm, peers: list[int], rows: int, width: int, wire: str, trailers: bool = False):
        self._wire, self._trailers = wire, trailers
        self._ring = ReceiveRing(comm, peers, DEPTH, rows, width)
        self._pools = [SendPool(comm, size, width) for size in (*(size for size in SIZES if size < rows), rows)]
        self.sent_bytes = dict.fromkeys(peers, 0)

    @property
    def received_bytes(self) -> dict[int, int]:
        return self._ring.received_bytes

    def post(self, peers: list[int], kind: Kind, seq: int, layer: int = 0, position: int = 0, x: np.ndarray | None = None,
             epoch: int = 0, lag: int = 0, wire: str | None = None) -> None:  # fmt: skip
        """Start sending one message with x, f32 [rows, width] or None, to all `peers`."""
        rows = 0 if x is None else len(x)
        pool = next(pool for pool in self._pools if rows <= pool.rows)
        message = pool.take()
        data = message.write(seq, kind, layer, position, x, wire or self._wire, epoch, lag)
        pool.send(message, data, peers)
        for peer in peers:
            self.sent_bytes[peer] += data.size
        if rows and self._trailers:
            self.post(peers, Kind.TRAILER, seq)

    def poll(self) -> Iterator[tuple[int, Message]]:
        """Sender and message of everything that has come, one sender's in the order of sending.

        A message is valid until the iterator goes on.
        """
        return self._ring.poll()

    def close(self) -> None:
        """Wait until everything is sent, and let go of MPI's requests."""
        for pool in self._pools:
            pool.close()
        self._ring.close()


class ReceiveRing:
    """`depth` persistent receives from each of `peers` (ranks are always named, never MPI.ANY_SOURCE).

    A peer's messages match its receives in the order in which these were started, but may complete in another: a large one is
    fetched by rendezvous (65536 bytes and more, over Open MPI's TCP), and a small one behind it comes first. So a message is handed
    out only when all before it have been.
    """

    def __init__(self, comm: MPI.Comm, peers: list[int], depth: int, rows: int, width: int):
        self._slots = [(peer, Message(rows, width)) for peer in peers for _ in range(depth)]
        self._requests = [comm.Recv_init([message.buffer, MPI.BYTE], peer, TAG) for peer, message in self._slots]
        self._lines: dict[int, deque[int]] = {peer: deque() for peer in peers}  # slots in the order of their receives
        for index, (peer, _) in enumerate(self._slots):
            self._lines[peer].append(index)
        self._complete: set[int] = set()
        self.received_bytes = {peer: 0 for peer in peers}
        MPI.Prequest.Startall(self._requests)

    def poll(self) -> Iterator[tuple[int, Message]]:
        """Peer and message of everything that has arrived; see Mailbox.poll."""
        if not self._requests:
            return
        statuses: list[MPI.Status] = []
        done = MPI.Request.Testsome(self._requests, statuses) or []
        for status, index in zip(statuses, done):
            self.received_bytes[self._slots[index][0]] += status.Get_count(MPI.BYTE)
        self._complete.update(done)
        for peer in dict.fromkeys(self._slots[index][0] for index in done):
            line = self._lines[peer]
            while line[0] in self._complete:
                index = line.popleft()
                yield self._slots[index]
                self._complete.remove(index)
                self._requests[index].Start()
                line.append(index)

    def close(self) -> None:
        for request in self._requests:
            request.Cancel()
            request.Wait()
            request.Free()
        self._requests = []


class SendPool:
    """Messages under way: a buffer is used again only when MPI has let go of it."""

    def __init__(self, comm: MPI.Comm, rows: int, width: int):
        self._comm = comm
        self.rows = rows
        self._shape = rows, width
        self._free: list[Message] = []
        self._busy: deque[tuple[Message, list[MPI.Request]]] = deque()

    def take(self) -> Message:
        """A message that may be written. What a peer that is cut off does not take stays busy, so only a few are tested each time."""
        for _ in range(min(TESTED, len(self._busy))):
            message, requests = self._busy.popleft()
            if MPI.Request.Testall(requests):
                self._free.append(message)
            else:
                self._busy.append((message, requests))
        return self._free.pop() if self._free else Message(*self._shape)

    def send(self, message: Message, data: np.ndarray, peers: list[int]) -> None:
        """Start sending the first bytes of `message` (what its `write` returned) to every peer."""
        self._busy.append((message, [self._comm.Isend([data, MPI.BYTE], peer, TAG) for peer in peers]))

    def close(self) -> None:
        for _, requests in self._busy:
            MPI.Request.Waitall(requests)
        self._busy.clear()
