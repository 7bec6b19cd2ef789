"""How far the start of a run has come, for launch/halo-mpirun, in a file that rank 0 keeps for it.

"mpi"     rank 0 is in MPI's start, which ends only when all ranks are there
"ranks"   they agree, measure and plan
no file   the work has begun
"lost"    ranks are gone, without which the others cannot go on: it can be started again
"""

import os
from pathlib import Path

EXIT_FILE = "HALO_MPI_EXIT_FILE"  # the variable that names the file for the exit code; this one lies beside it
RANKS = "OMPI_COMM_WORLD_RANK", "PMI_RANK"  # where a rank's number is known before MPI has started


def stage_file() -> Path | None:
    """On rank 0 under halo-mpirun."""
    path, rank = os.environ.get(EXIT_FILE), next((os.environ[name] for name in RANKS if name in os.environ), "0")
    return Path(f"{path}-stage") if path and rank == "0" else None


def enter(stage: str) -> None:
    """On rank 0: the start is here now; elsewhere nothing."""
    if path := stage_file():
        try:
            path.write_text(stage)
        except OSError:
            pass  # rank 0 runs on another host than halo-mpirun


def work_begins() -> None:
    """The start is over."""
    if path := stage_file():
        path.unlink(missing_ok=True)
