"""Run under mpirun: `generate` in which rank 2 is killed while it scores its rows of the vocabulary for the sixth time."""

import os
import signal

from mpi4py import MPI

from halo_mpi.engine.launch import run_distributed
from halo_mpi.engine.split_head import OwnRows
from halo_mpi.generate import generate

scores = OwnRows.scores
calls = 0


def last_scores(self, x):
    global calls
    calls += 1
    if calls == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return scores(self, x)


if MPI.COMM_WORLD.rank == 2:
    OwnRows.scores = last_scores
run_distributed(generate)
