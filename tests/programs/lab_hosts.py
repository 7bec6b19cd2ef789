"""Every rank's host name, some traffic, then an exit code: lab_hosts.py [CODE [own|mpirun]]

The lab learns CODE from the exit file (own), or the hard way, from mpirun.
"""

import json
import os
import socket
import sys

from mpi4py import MPI

world = MPI.COMM_WORLD
code = int(sys.argv[1]) if len(sys.argv) > 1 else 0
hosts = world.gather(socket.gethostname())
for _ in range(20):
    world.Bcast(bytearray(50_000))
if world.rank == 0:
    print(json.dumps({"hosts": hosts, "lab": os.environ["HALO_MPI_LAB_DIR"]}), flush=True)
world.Barrier()
if sys.argv[2:] == ["own"]:
    if world.rank == 0:
        with open(os.environ["HALO_MPI_EXIT_FILE"], "w") as file:
            file.write(str(code))
    code = 0
MPI.Finalize()
sys.exit(code)
