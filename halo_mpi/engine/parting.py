"""How a rank leaves a run that is done."""

from dataclasses import dataclass

from halo_mpi.errors import EXIT_DONE


@dataclass(frozen=True, slots=True)
class Parting:
    """The program's exit code (the root's counts); `alone`: ranks are missing, and MPI's own end would wait for them."""

    exit_code: int = EXIT_DONE
    alone: bool = False
