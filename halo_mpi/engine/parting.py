"""How a rank leaves a run that is done."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from halo_mpi.errors import EXIT_DONE, HaloError


@dataclass(frozen=True, slots=True)
class Parting:
    """The program's exit code (the root's counts); `alone`: ranks are missing, and MPI's own end would wait for them."""

    exit_code: int = EXIT_DONE
    alone: bool = False


def after(parting: Parting, step: Callable[[], None]) -> Parting:
    """What only the root has to do when the others have left. Nobody need be ended if it fails: that is told, and is the exit code."""
    from halo_mpi.engine.agreement import complain

    try:
        step()
    except HaloError as error:
        complain(str(error))
        return replace(parting, exit_code=error.exit_code)
    return parting
