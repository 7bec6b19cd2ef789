"""Run under mpirun: `generate`, but one rank ends or stops in the middle of the first start.

HALO_TEST_BAD is "RANK MOMENT SIGNAL FILE", where FILE comes into being with the first start; HALO_TEST_SILENT_S how long others wait.
"""

import os
import signal
from pathlib import Path

from halo_mpi.engine import launch, stage
from halo_mpi.generate import generate

RANK, MOMENT, SIGNAL, FILE = os.environ["HALO_TEST_BAD"].split()
RANK_HERE = next(os.environ[name] for name in stage.RANKS if name in os.environ)


def at(moment):
    if (RANK, MOMENT) == (RANK_HERE, moment) and not Path(FILE).exists():
        if Path(FILE).parent.exists():
            Path(FILE).touch()
        os.kill(os.getpid(), getattr(signal, SIGNAL))


def before(owner, name, moment):
    step = getattr(owner, name)

    def wrapped(*arguments, **named):
        at(moment)
        return step(*arguments, **named)

    setattr(owner, name, wrapped)


def run(*arguments):
    from halo_mpi.wire import exchange, root_link

    if not Path(FILE).exists():
        exchange.SILENT_S = root_link.SILENT_S = float(os.environ["HALO_TEST_SILENT_S"])
    at("agree")
    from halo_mpi.engine import machine, planning, profile, session, weights

    before(machine, "broadcast", "hosts")
    before(exchange, "meet", "copy")
    before(session, "Mailbox", "connect")
    before(profile, "_sample", "measure")
    before(session.WorkerLink, "greet", "echo")
    before(planning, "measure", "plan")
    before(weights, "load_norms" if RANK == "0" else "reside", "load")
    return original(*arguments)


original, launch._run = launch._run, run
at("import")
launch.run_distributed(generate)
