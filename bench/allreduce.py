"""The syncs alone, the usual way of HPC: MPI_Allreduce of the hidden vector, paced as the lab says.

    python -m bench.lab run SCENARIO.toml --marks -- python -m bench.allreduce --json FILE

Every rank sleeps for its pace, then all add up a vector of `--hidden` floats; 2 x layers such syncs count as a token. The
first token is not timed. The end is agreed in the vector itself (its first element), so that no rank waits for another.
A collective that hangs is given up `--patience` seconds after the end of the time box, and the wait counts as a sync.
"""

import json
import os
import threading
import time
from pathlib import Path

import click
import numpy as np
from mpi4py import MPI

from halo_mpi.engine.marks import Marks
from halo_mpi.wire.polling import sharpen_timers

EXIT_FILE = "HALO_MPI_EXIT_FILE"  # the lab takes the exit code from there


class Syncs:
    """The times of all syncs so far, and the report of them."""

    def __init__(self, comm: MPI.Comm, hidden: int, per_token: int):
        self.comm, self.hidden, self.per_token = comm, hidden, per_token
        self.sync_ms: list[float] = []
        self.tpot_ms: list[float] = []
        self.began = time.perf_counter()

    def report(self, stuck: str | None = None) -> dict:
        return {
            "ranks": self.comm.size,
            "hidden": self.hidden,
            "syncs_per_token": self.per_token,
            "mpi": MPI.Get_library_version().split(",")[0],
            "stuck": stuck,
            "samples": {"tpot_ms": self.tpot_ms, "sync_ms": self.sync_ms},
        }


def token(comm: MPI.Comm, x: np.ndarray, syncs: int, marks: Marks, end: float, done: Syncs | None) -> bool:
    """One token; whether rank 0 found in its last sync that the time is over."""
    last = False
    for _ in range(syncs):
        begin = time.perf_counter()
        x[:] = 0.0
        x[0] = comm.rank == 0 and begin > end
        if done:
            done.began = begin
        marks.pace(begin, 1.0)
        comm.Allreduce(MPI.IN_PLACE, x)
        last = x[0] > 0
        if done:
            done.sync_ms.append(round((time.perf_counter() - begin) * 1e3, 3))
    return last


@click.command(help=__doc__)
@click.option("--hidden", default=576, show_default=True, help="Floats per vector.")
@click.option("--syncs", default=60, show_default=True, help="Per token: 2 x layers.")
@click.option("--seconds", default=5.0, show_default=True, help="Begin no further token after so long.")
@click.option("--patience", default=20.0, show_default=True, help="So long may the last one take.")
@click.option("--json", "out", type=click.Path(path_type=Path), required=True, help="Write the times to this file.")
def main(hidden: int, syncs: int, seconds: float, patience: float, out: Path) -> None:
    comm, marks = MPI.COMM_WORLD, Marks.from_environment(MPI.COMM_WORLD.rank)
    sharpen_timers()
    x = np.zeros(hidden, np.float32)
    comm.Allreduce(MPI.IN_PLACE, x)  # opens the connections
    marks.begin()
    done = Syncs(comm, hidden, syncs)

    def give_up() -> None:
        done.sync_ms.append(round((time.perf_counter() - done.began) * 1e3, 3))
        out.write_text(json.dumps(done.report(stuck=f"a sync had not ended after {done.sync_ms[-1] / 1e3:.1f} s")))
        marks.end()
        if EXIT_FILE in os.environ:
            Path(os.environ[EXIT_FILE]).write_text("0")
        comm.Abort(0)

    watch = threading.Timer(seconds + patience, give_up)
    watch.daemon = True
    if comm.rank == 0:
        watch.start()
    token(comm, x, syncs, marks, float("inf"), None)
    marks.token()
    end, last = time.perf_counter() + seconds, False
    while not last:
        begin = time.perf_counter()
        last = token(comm, x, syncs, marks, end, done)
        done.tpot_ms.append(round((time.perf_counter() - begin) * 1e3, 3))
        marks.token()
    watch.cancel()
    marks.end()
    if comm.rank == 0:
        out.write_text(json.dumps(done.report()))


if __name__ == "__main__":
    main()
