"""Receiving from many peers over many lines, with one call of MPI for all of it."""

from collections import deque
from dataclasses import dataclass

from mpi4py import MPI

from halo_mpi.wire.messages import TAG, Message

PROCESS_ENDED = getattr(MPI, "ERR_PROC_FAILED", None)  # MPI 5; before, a process that ends takes all with it


@dataclass(slots=True)
class Receive:
    """A persistent receive of a peer's message, by its place in the list of all."""

    index: int
    peer: int
    message: Message
    complete: bool = False


class Lane:
    """A peer's messages on one line, in the order in which they were sent. `taken`: messages that have been taken out.

    A peer's messages match its receives in the order in which these were started, but may complete in another: a large one is
    fetched by rendezvous (65536 bytes and more, over Open MPI's TCP), and a small one behind it comes first. So a message is handed
    out only when all before it have been.
    """

    def __init__(self, receives: list[Receive], taken: int):
        self.taken = taken
        self.receives = deque(receives)

    def first(self) -> Message | None:
        """The oldest message that was not taken out, if it has arrived."""
        receive = self.receives[0]
        return receive.message if receive.complete else None


class Receiver:
    """Persistent receives of any number of lanes (ranks are always named, never MPI.ANY_SOURCE). `received_bytes` counts per peer.

    They are tested together, since a test costs a pass of MPI's progress engine over all connections, however many requests it
    names: one call for the receives of two lines took 15 us, two calls 28 and four 53 (8 ranks on 2 cores, Open MPI's TCP).
    """

    def __init__(self, peers: list[int]):
        self._receives: list[Receive] = []
        self._requests: list[MPI.Prequest] = []
        self._ended: set[int] = set()  # peers, not told yet
        self.received_bytes = dict.fromkeys(peers, 0)

    def open(self, comm: MPI.Comm, peer: int, depth: int, rows: int, width: int, taken: int = 0) -> Lane:
        """Receive from now on what comes from the peer over `comm`, `depth` messages of f32 [rows, width] ahead."""
        begin = len(self._receives)
        receives = [Receive(begin + number, peer, Message(rows, width)) for number in range(depth)]
        self._receives += receives
        self._requests += [comm.Recv_init([receive.message.buffer, MPI.BYTE], peer, TAG) for receive in receives]
        for receive in receives:
            self._start(receive)
        return Lane(receives, taken)

    def test(self) -> set[int]:
        """See what has arrived; peers of whom MPI tells now that their process has ended."""
        if not self._requests:
            return set()
        statuses: list[MPI.Status] = []
        try:
            ended, done = self._ended, MPI.Request.Testsome(self._requests, statuses) or []
        except MPI.Exception:
            ended = {status.source for status in statuses if status.error} | self._ended
            if not ended:
                raise
            done = self._done_beside(ended)
        if ended:
            self._forget(ended)
            self._ended = set()
        for status in statuses:
            if not status.error:
                self.received_bytes[status.source] += status.Get_count(MPI.BYTE)
        for index in done:
            self._receives[index].complete = True
        return ended

    def _done_beside(self, ended: set[int]) -> list[int]:
        """Which receives from other peers are complete, since the call that failed does not tell; adds to `ended` whoever fails now."""
        done = []
        for receive, request in zip(self._receives, self._requests):
            if receive.peer in ended or receive.complete or request == MPI.REQUEST_NULL:
                continue
            try:
                if request.Test():
                    done.append(receive.index)
            except MPI.Exception:
                ended.add(receive.peer)
        return done

    def _forget(self, ended: set[int]) -> None:
        """Take these peers' receives out of use."""
        for receive in self._receives:
            if receive.peer in ended:
                self._requests[receive.index] = MPI.REQUEST_NULL  # not freed: it has failed

    def take(self, lane: Lane) -> None:
        """Take the lane's first message out: its buffer receives again."""
        receive = lane.receives.popleft()
        lane.receives.append(receive)
        lane.taken += 1
        receive.complete = False
        self._start(receive)

    def _start(self, receive: Receive) -> None:
        try:
            self._requests[receive.index].Start()
        except MPI.Exception as error:
            if error.Get_error_class() != PROCESS_ENDED:
                raise
            self._ended.add(receive.peer)

    def close(self) -> None:
        """Let go of MPI's requests."""
        for request in self._requests:
            if request != MPI.REQUEST_NULL:
                request.Cancel()
                is_over(request)
        self._requests = []


def is_over(request: MPI.Prequest) -> bool:
    """Whether it is complete, or never will be, since the peer has ended."""
    try:
        return request.Test()
    except MPI.Exception:
        return True
