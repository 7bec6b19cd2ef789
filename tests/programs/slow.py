"""Run under mpirun: `generate`, but each token takes a while, so that a run can be disturbed in its middle."""

import time

from halo_mpi.engine.launch import run_distributed
from halo_mpi.engine.root import Root
from halo_mpi.generate import generate

step = Root.step


def slow_step(self, token, position):
    time.sleep(0.05)
    return step(self, token, position)


Root.step = slow_step
run_distributed(generate)
