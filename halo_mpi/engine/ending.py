"""How a run that is done ends on a rank."""

from dataclasses import dataclass

from halo_mpi.errors import EXIT_DONE


@dataclass(frozen=True, slots=True)
class Ending:
    """The program's exit code (the root's counts); `parted`: ranks are missing, and MPI's own end would wait for them."""

    exit_code: int = EXIT_DONE
    parted: bool = False
