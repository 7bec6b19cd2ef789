"""Which MPI this is, and what it survives; known without starting it."""

import os

from mpi4py import MPI


def mpi_name() -> str:
    """For example "Open MPI 5.0.11"."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def survives_ends() -> bool:
    """Whether the other ranks go on when one's process ends: Open MPI started with `--with-ft ulfm`."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "yes")
