"""`doctor` of another version of halo_mpi."""

import halo_mpi

halo_mpi.__version__ = "0.0.9"

from halo_mpi.cli import run_local  # noqa: E402
from halo_mpi.doctor import doctor  # noqa: E402

run_local(doctor)
