"""Run under mpirun: `generate`, but each step of the root takes a while, so that a run can be interrupted in its middle."""

import time

from halo_mpi.engine.launch import run_distributed
from halo_mpi.engine.root import Root
from halo_mpi.generate import generate

compute = Root.steps


def slow_step(self, tokens, position):
    print("stepping", flush=True)
    time.sleep(0.5)
    return compute(self, tokens, position)


Root.steps = slow_step
run_distributed(generate)
