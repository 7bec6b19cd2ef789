"""A worker's side of the star: requests from rank 0 in order, one answer to each."""

from collections.abc import Iterator

import numpy as np
from mpi4py import MPI

from halo_mpi.wire.exchange import ROOT
from halo_mpi.wire.messages import Kind, Message
from halo_mpi.wire.polling import Waiter
from halo_mpi.wire.ring import ReceiveRing, SendPool

RING_DEPTH = 4


class WorkerLink:
    """Receives requests and sends the answers, in this run's wire format."""

    def __init__(self, comm: MPI.Comm, rows: int, width: int, wire: str, waiter: Waiter | None = None):
        self._wire = wire
        self._waiter = waiter or Waiter()
        self._ring = ReceiveRing(comm, [ROOT], RING_DEPTH, rows, width)
        self._pool = SendPool(comm, rows, width)

    def requests(self) -> Iterator[Message]:
        """Every request in the order of seq, until the root says stop. Pings are answered here."""
        waiter, stopped = self._waiter, False
        while not stopped:
            for _, request in self._ring.poll():
                waiter.heard()
                if request.header["kind"] == Kind.STOP:
                    stopped = True
                elif request.header["kind"] == Kind.PING:
                    self.answer(request, None)
                else:
                    yield request
            if not stopped:
                waiter.wait()
        self._pool.close()
        self._ring.close()

    def answer(self, request: Message, y: np.ndarray | None) -> None:
        """Start sending y, f32 [rows, width], as the answer to `request`."""
        header, message = request.header, self._pool.take()
        data = message.write(
            int(header["seq"]), Kind(header["kind"]), int(header["layer"]), int(header["position"]), y, self._wire
        )
        self._pool.send(message, data, [ROOT])
        self._waiter.heard()  # the next request comes soon after an answer, however long that took
