"""Run under mpirun: `generate`, but each token takes a while, so that a run can be disturbed in its middle.

HALO_TEST_TOKEN_S has the seconds by the number of ranks, such as {"3": 0.02, "2": 1.0}.
"""

import json
import os
import time

from halo_mpi.engine.launch import run_distributed
from halo_mpi.engine.root import Root
from halo_mpi.generate import generate

TOKEN_S = json.loads(os.environ.get("HALO_TEST_TOKEN_S", "{}"))
compute = Root.steps


def slow_step(self, tokens, position):
    from mpi4py import MPI  # which `run_distributed` must be the first to import

    time.sleep(TOKEN_S.get(str(MPI.COMM_WORLD.size), 0.05))
    return compute(self, tokens, position)


Root.steps = slow_step
run_distributed(generate)
