"""Messages between the root and one worker, none of which is waited for for ever."""

import time
from collections.abc import Callable
from typing import TypeVar

from mpi4py import MPI

from halo_mpi.wire.polling import Waiter

T = TypeVar("T")
TAG = 11  # engine and exchange have others
LONGEST_S = 300.0  # so long a worker waits for the root, which talks with one after the other


class SilentError(Exception):
    """The other one did not answer in time, or its process has ended; which, the text says."""


class Talk:
    """With the rank `peer`."""

    def __init__(self, comm: MPI.Comm, peer: int):
        self._comm, self.peer, self._waiter = comm, peer, Waiter()

    def send(self, data: bytes, most_s: float) -> None:
        """Raises SilentError if the other one takes it not within `most_s` seconds."""
        # A persistent send, as the engine's: Open MPI's Isend takes the same half of the connections every time.
        request = self._guarded(lambda: self._comm.Send_init([data, MPI.BYTE], self.peer, TAG))
        self._guarded(request.Start)
        self._until(request.Test, most_s, time.perf_counter())
        request.Free()

    def receive(self, most_s: float, since: float | None = None) -> bytearray:
        """The next message. Raises SilentError if there is none within `most_s` seconds from now, or from `since` (perf_counter) on."""
        status, found, since = MPI.Status(), [], time.perf_counter() if since is None else since

        def came() -> bool:
            message = self._comm.Improbe(self.peer, TAG, status)
            if message is not None:
                found.append(message)
            return bool(found)

        self._until(came, most_s, since)
        data = bytearray(status.Get_count(MPI.BYTE))
        request = self._guarded(lambda: found[0].Irecv([data, MPI.BYTE]))
        self._until(request.Test, most_s, time.perf_counter())
        return data

    def _until(self, done: Callable[[], bool], most_s: float, since: float) -> None:
        self._waiter.heard()
        while not self._guarded(done):
            if time.perf_counter() > since + most_s:
                raise SilentError(f"did not answer for {most_s:.0f} s")
            self._waiter.wait()

    def _guarded(self, step: Callable[[], T]) -> T:
        try:
            return step()
        except MPI.Exception:  # with ULFM: its process is gone
            raise SilentError("its process has ended") from None
