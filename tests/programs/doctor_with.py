"""Run under mpirun: `doctor` on hosts that are not alike: doctor_with.py SETTINGS.json [ARGUMENT ...]

Rank R is on the host pi(R + 1). SETTINGS, by host: `version` of halo_mpi, `silent`: it never answers, `arguments` for doctor.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

import halo_mpi

host = f"pi{int(os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK', '0'))) + 1}"
settings = json.loads(Path(sys.argv[1]).read_text()).get(host, {})
socket.gethostname = lambda: host
halo_mpi.__version__ = settings.get("version", halo_mpi.__version__)

from halo_mpi.doctor import doctor  # noqa: E402
from halo_mpi.engine.launch import run_distributed  # noqa: E402

if settings.get("silent"):
    doctor.callback = lambda **_: time.sleep(60)
run_distributed(doctor, [*sys.argv[2:], *settings.get("arguments", [])])
