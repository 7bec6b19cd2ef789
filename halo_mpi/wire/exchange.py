"""Small structured data between ranks at start-up and at the end, as JSON: nothing from the network is unpickled.

These are collective calls; they stay out of the token loop, where one late rank would stop all. They are made of messages between the
root and each worker, so that the root can tell who does not answer, and nobody waits inside MPI for a rank that is stopped or cut off.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from mpi4py import MPI

from halo_mpi.errors import HaloError, RanksLostError
from halo_mpi.wire.polling import Waiter

ROOT = 0
TAG = 2  # the mailbox has another
SILENT_S = 60.0  # so long the root waits for a worker that starts: a Pi reads PyTorch from an SD card in 20
ALONE_S = (
    900.0  # so long a worker waits for the root, which may be waiting for another; Linux gives a connection up after as long
)
ENDED = "ended before the work began; start again"
LOOK_S = 0.2  # between two looks; longer ones do not count: this process was stopped itself
HOSTS = MPI.Comm.Create_keyval()


class MissingError(RanksLostError):
    """Ranks without which the others cannot go on: they have ended, are stopped, cut off, or hang."""

    def __init__(self, ranks: Iterable[int], what: str, hosts: list[str] | None = None):
        self._what = what
        named = ", ".join(f"{rank} on {hosts[rank]}" if hosts else str(rank) for rank in sorted(ranks))
        super().__init__(f"rank {named or '?'} {what}", set(ranks))

    def on(self, hosts: list[str] | None) -> "MissingError":
        """The same, with the names of the hosts."""
        return MissingError(self.ranks, self._what, hosts)


class Patience:
    """Waiting for others, not longer than `most_s` (None: for ever), the times in which this process was stopped left out."""

    def __init__(self, most_s: float | None, waiter: Waiter | None = None):
        self._most_s, self._waiter = most_s, waiter or Waiter()
        self._waited_s, self._looked_at = 0.0, self._waiter.now()

    def look(self, missing: Iterable[int]) -> None:
        """These are not there yet. Raises MissingError if that was so for too long."""
        now = self._waiter.now()
        self._waited_s += min(now - self._looked_at, LOOK_S)
        self._looked_at = now
        if self._most_s is not None and self._waited_s > self._most_s:
            raise MissingError(
                missing, f"did not answer for {self._most_s:.0f} s; look whether its host is up and its process runs"
            )

    def wait(self, missing: Iterable[int]) -> None:
        """The same, and let others run for a moment."""
        self.look(missing)
        self._waiter.wait()


def open_connections(comm: MPI.Comm, count: int) -> None:
    """Let every worker use each of its `count` connections to the root before the root sends anything (collective).

    Where both ends open them at the same time, a message may stay for ever on one that Open MPI 5.0.11 has given up: of 24 starts
    with four connections 5 hung. Raises HaloError where a worker begins with something else.
    """
    if comm.rank != ROOT:
        data = json.dumps(count).encode()
        requests = [comm.Send_init([data, MPI.BYTE], ROOT, TAG) for _ in range(count)]  # an Isend would always take the same half
        MPI.Prequest.Startall(requests)
        _complete({ROOT: lambda: MPI.Request.Testall(requests)}, ALONE_S)
        for request in requests:
            request.Free()
        return
    coming, came = [rank for rank in range(comm.size) if rank != ROOT], 0
    while coming:
        came += 1
        told = {rank: json.loads(data) for rank, data in _receive(comm, coming, SILENT_S).items()}
        if others := [rank for rank, each in told.items() if not isinstance(each, int)]:  # what protocols before 8 begin with
            raise HaloError(f"rank {others[0]} has another version of halo_mpi; install the same version on all hosts")
        coming = [rank for rank in coming if told[rank] > came]


def broadcast(comm: MPI.Comm, value: Any = None, patient: bool = False) -> Any:
    """The root's `value` (anything that JSON holds), on every rank. `patient`: others may take any time before it."""
    if comm.rank != ROOT:
        return json.loads(_receive(comm, [ROOT], None if patient else ALONE_S)[ROOT])
    data = json.dumps(value).encode()
    _send(comm, data, [rank for rank in range(comm.size) if rank != ROOT], None if patient else SILENT_S)
    return json.loads(data)


def gather(comm: MPI.Comm, value: Any, patient: bool = False) -> list[Any]:
    """Every rank's `value` (anything that JSON holds) on the root, by rank; an empty list elsewhere."""
    data = json.dumps(value).encode()
    if comm.rank != ROOT:
        _send(comm, data, [ROOT], None if patient else ALONE_S)
        return []
    others = _receive(comm, [rank for rank in range(comm.size) if rank != ROOT], None if patient else SILENT_S)
    return [json.loads(others.get(rank, data)) for rank in range(comm.size)]


def meet(comm: MPI.Comm) -> None:
    """Go on when all are here (collective)."""
    gather(comm, None)
    broadcast(comm)


def duplicate(comm: MPI.Comm) -> MPI.Comm:
    """A communicator of the same ranks (collective)."""
    meet(comm)
    copy, request = comm.Idup()
    patience = Patience(SILENT_S if comm.rank == ROOT else ALONE_S)
    while not request.Test():
        patience.wait(set(range(comm.size)) - {comm.rank})
    return copy


def name_hosts(comm: MPI.Comm, hosts: list[str]) -> None:
    """From now on it is known on this rank where the others are, by rank."""
    comm.Set_attr(HOSTS, hosts)


def hosts_of(comm: MPI.Comm) -> list[str] | None:
    """The ranks' hosts, if they are known."""
    return comm.Get_attr(HOSTS)


def add_up(comm: MPI.Comm, sums: np.ndarray) -> None:
    """Add the ranks' arrays on the root, in place."""
    comm.Reduce(MPI.IN_PLACE if comm.rank == ROOT else sums, sums if comm.rank == ROOT else None, MPI.SUM, ROOT)


def _send(comm: MPI.Comm, data: bytes, ranks: list[int], most_s: float | None) -> None:
    requests = {rank: comm.Isend([data, MPI.BYTE], rank, TAG) for rank in ranks}
    _complete({rank: request.Test for rank, request in requests.items()}, most_s)


def _receive(comm: MPI.Comm, ranks: list[int], most_s: float | None) -> dict[int, bytes]:
    """The next message of each of these ranks."""
    found: dict[int, bytearray] = {}
    requests: dict[int, MPI.Request] = {}

    def has_come(rank: int) -> bool:
        if rank not in requests:
            status = MPI.Status()
            message = comm.Improbe(rank, TAG, status)
            if message is None:
                return False
            found[rank] = bytearray(status.Get_count(MPI.BYTE))
            requests[rank] = message.Irecv([found[rank], MPI.BYTE])
        return requests[rank].Test()

    _complete({rank: lambda rank=rank: has_come(rank) for rank in ranks}, most_s)
    return {rank: bytes(data) for rank, data in found.items()}


def _complete(tests: dict[int, Callable[[], bool]], most_s: float | None) -> None:
    """Ask again and again, by rank, until all say yes."""
    patience = Patience(most_s)
    while missing := {rank: test for rank, test in tests.items() if not test()}:
        tests = missing
        patience.wait(missing)
