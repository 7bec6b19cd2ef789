"""The root's side of the star: one request to many workers, their answers collected in rank order."""

import time

import numpy as np
from mpi4py import MPI

from halo_mpi.wire.messages import Kind, ProtocolError
from halo_mpi.wire.polling import Waiter
from halo_mpi.wire.ring import ReceiveRing, SendPool

RING_DEPTH = 2  # one answer at a time is outstanding in strict mode; the second receive hides the restart
PINGS = 8


class RootLink:
    """Requests to the workers and their answers (strict: every answer is waited for).

    `sent_bytes` and `received_bytes` count per worker; `rtt_ms` is the median of a few empty messages at the start,
    which also makes MPI open its connections.
    """

    def __init__(self, comm: MPI.Comm, rows: int, width: int, wire: str, waiter: Waiter | None = None):
        self.ranks = comm.size
        self.workers = list(range(1, comm.size))
        self._wire = wire
        self._seq = 0
        self._ring = ReceiveRing(comm, self.workers, RING_DEPTH, rows, width)
        self._pool = SendPool(comm, rows, width)
        self._waiter = waiter or Waiter()
        self.sent_bytes = {worker: 0 for worker in self.workers}
        self.rtt_ms = {worker: self._ping(worker) for worker in self.workers}

    @property
    def received_bytes(self) -> dict[int, int]:
        return self._ring.received_bytes

    def ask(self, kind: Kind, layer: int, position: int, x: np.ndarray | None, workers: list[int]) -> int:
        """Start sending x, f32 [rows, width], to the workers; returns the request's seq."""
        self._seq += 1
        message = self._pool.take()
        data = message.write(self._seq, kind, layer, position, x, self._wire)
        self._pool.send(message, data, workers)
        for worker in workers:
            self.sent_bytes[worker] += data.size
        return self._seq

    def collect(self, seq: int, workers: list[int]) -> list[np.ndarray]:
        """Wait for the answers to request `seq`; f32 [rows, width] each, in the order of `workers`, not of arrival."""
        answers: dict[int, np.ndarray] = {}
        self._waiter.heard()
        while len(answers) < len(workers):
            for worker, message in self._ring.poll():
                if int(message.header["seq"]) != seq or worker in answers or worker not in workers:
                    raise ProtocolError(
                        f"rank {worker} answered request {message.header['seq']} while {seq} was asked; this is a defect, report it"
                    )
                answers[worker] = message.read().copy()
                self._waiter.heard()
            if len(answers) < len(workers):
                self._waiter.wait()
        return [answers[worker] for worker in workers]

    def stop(self) -> None:
        """Tell all workers to leave their request loop, and let go of MPI's requests."""
        self.ask(Kind.STOP, 0, 0, None, self.workers)
        self._pool.close()
        self._ring.close()

    def _ping(self, worker: int) -> float:
        times = []
        for _ in range(PINGS):
            begin = time.perf_counter()
            self.collect(self.ask(Kind.PING, 0, 0, None, [worker]), [worker])
            times.append((time.perf_counter() - begin) * 1e3)
        return round(float(np.median(times)), 3)
