"""Run under mpirun: `generate` in which the rank given by --seed meets a defect in the middle of its work."""

import sys

from mpi4py import MPI

from halo_mpi.engine.launch import run_distributed
from halo_mpi.generate import generate
from halo_mpi.model.llama import Share

ffn = Share.ffn
calls = 0


def broken_ffn(self, layer, x):
    global calls
    calls += 1
    if calls == 7:
        raise ZeroDivisionError("a defect made for the test")
    return ffn(self, layer, x)


if MPI.COMM_WORLD.rank == int(sys.argv[-1]):
    Share.ffn = broken_ffn
run_distributed(generate)
