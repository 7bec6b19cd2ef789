"""Run under mpirun: `generate` where llvmlite and Numba cannot be imported."""

import sys

sys.modules["llvmlite"] = sys.modules["numba"] = None

from halo_mpi.engine.launch import run_distributed  # noqa: E402
from halo_mpi.generate import generate  # noqa: E402

run_distributed(generate)
