"""Run under mpirun: `generate` of another version of halo_mpi."""

import halo_mpi

halo_mpi.__version__ = "0.0.9"

from halo_mpi.engine.launch import run_distributed  # noqa: E402
from halo_mpi.generate import generate  # noqa: E402

run_distributed(generate)
