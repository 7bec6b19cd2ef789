"""`generate`, but the process is gone in the middle of the thirteenth token, without a word."""

import os

from halo_mpi.engine.launch import run_distributed
from halo_mpi.engine.root import Root
from halo_mpi.generate import generate

compute = Root.steps
steps = 0


def last_step(self, tokens, position):
    global steps
    steps += 1
    if steps == 12:  # the first token is the prompt's
        os._exit(9)
    return compute(self, tokens, position)


Root.steps = last_step
run_distributed(generate)
