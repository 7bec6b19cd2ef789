"""Receiving: a few persistent receives per peer, so that a message always finds a buffer waiting."""

from collections.abc import Iterator

import numpy as np
from mpi4py import MPI

from halo_mpi.wire.messages import TAG, Message


class ReceiveRing:
    """`depth` persistent receives from each of `peers` (ranks are always named, never MPI.ANY_SOURCE).

    MPI keeps the order of one peer's messages, but `Testsome` may name completed receives of a peer in any order; `poll`
    yields them by seq.
    """

    def __init__(self, comm: MPI.Comm, peers: list[int], depth: int, rows: int, width: int):
        self._slots = [(peer, Message(rows, width)) for peer in peers for _ in range(depth)]
        self._requests = [comm.Recv_init([message.buffer, MPI.BYTE], peer, TAG) for peer, message in self._slots]
        self.received_bytes = {peer: 0 for peer in peers}
        MPI.Prequest.Startall(self._requests)

    def poll(self) -> Iterator[tuple[int, Message]]:
        """Peer and message of everything that has arrived. A message is valid until the iterator goes on."""
        if not self._requests:
            return
        statuses: list[MPI.Status] = []
        done = MPI.Request.Testsome(self._requests, statuses) or []
        for status, index in zip(statuses, done):
            self.received_bytes[self._slots[index][0]] += status.Get_count(MPI.BYTE)
        for index in sorted(done, key=lambda index: int(self._slots[index][1].header["seq"])):
            yield self._slots[index]
            self._requests[index].Start()

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
        self._shape = rows, width
        self._free: list[Message] = []
        self._busy: list[tuple[Message, list[MPI.Request]]] = []

    def take(self) -> Message:
        """A message that may be written."""
        busy = []
        for message, requests in self._busy:
            if MPI.Request.Testall(requests):
                self._free.append(message)
            else:
                busy.append((message, requests))
        self._busy = busy
        return self._free.pop() if self._free else Message(*self._shape)

    def send(self, message: Message, data: np.ndarray, peers: list[int]) -> None:
        """Start sending the first bytes of `message` (what its `write` returned) to every peer."""
        self._busy.append((message, [self._comm.Isend([data, MPI.BYTE], peer, TAG) for peer in peers]))

    def close(self) -> None:
        for _, requests in self._busy:
            MPI.Request.Waitall(requests)
        self._busy = []
