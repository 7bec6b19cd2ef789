"""Small structured data between ranks at start-up and at the end, as JSON: nothing from the network is unpickled.

These are collective calls; they stay out of the token loop, where one late rank would stop all.
"""

import json
from typing import Any

import numpy as np
from mpi4py import MPI

ROOT = 0


def broadcast(comm: MPI.Comm, value: Any = None) -> Any:
    """The root's `value` (anything that JSON holds), on every rank."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8).copy() if comm.rank == ROOT else None
    size = np.array([0 if data is None else data.size], np.int64)
    comm.Bcast(size, ROOT)
    if data is None:
        data = np.empty(int(size[0]), np.uint8)
    comm.Bcast(data, ROOT)
    return json.loads(data.tobytes())


def gather(comm: MPI.Comm, value: Any) -> list[Any]:
    """Every rank's `value` (anything that JSON holds) on the root, by rank; an empty list elsewhere."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8).copy()
    sizes = np.zeros(comm.size, np.int64)
    comm.Gather(np.array([data.size], np.int64), sizes if comm.rank == ROOT else None, ROOT)
    if comm.rank != ROOT:
        comm.Gatherv(data, None, ROOT)
        return []
    everything = np.empty(int(sizes.sum()), np.uint8)
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    comm.Gatherv(data, [everything, sizes, starts, MPI.BYTE], ROOT)
    return [json.loads(everything[start : start + size].tobytes()) for start, size in zip(starts, sizes)]


def add_up(comm: MPI.Comm, sums: np.ndarray) -> None:
    """Add the ranks' arrays on the root, in place."""
    comm.Reduce(MPI.IN_PLACE if comm.rank == ROOT else sums, sums if comm.rank == ROOT else None, MPI.SUM, ROOT)
