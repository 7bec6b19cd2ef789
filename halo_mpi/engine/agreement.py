"""Failing together: every rank learns of a failure on any, rank 0 alone says why, and all end with the same exit code."""

import socket
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

from mpi4py import MPI

from halo_mpi.errors import HaloError, InputError
from halo_mpi.wire.exchange import ROOT, broadcast, gather

T = TypeVar("T")


class AgreedError(HaloError):
    """A failure that all ranks know of and that the root has printed."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def complain(message: str) -> None:
    """Print the one line that tells the user what went wrong, on standard error."""
    print(f"halo-mpi: {message}", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print one line about something that the run survives, on standard error."""
    complain(f"warning: {message}")


def together(comm: MPI.Comm, step: Callable[[], T], verbose: bool = False, patient: bool = False) -> T:
    """Run `step` on every rank (collective) and return its result.

    Raises AgreedError on every rank if `step` raised a HaloError on any. The root prints before anyone leaves, since
    mpirun ends all ranks as soon as one exits with an error. With `verbose` the ranks that failed show their tracebacks. `patient`: some
    may take much longer for it than others. Raises MissingError if a rank is silent for too long.
    """
    result, failure = None, None
    try:
        result = step()
    except HaloError as error:
        if verbose:
            traceback.print_exc()
        failure = {"rank": comm.rank, "host": socket.gethostname(), "message": str(error), "code": error.exit_code}
    failures = [failure for failure in gather(comm, failure, patient) if failure]
    verdict = None
    if failures:
        verdict = {"message": _summary(failures, comm.size), "code": max(failure["code"] for failure in failures)}
        complain(verdict["message"])
    verdict = broadcast(comm, verdict, patient)
    if verdict:
        raise AgreedError(verdict["message"], verdict["code"])
    return result


def require_equal(comm: MPI.Comm, what: str, value: str, advice: str) -> None:
    """End all ranks if `value` is not the same on all of them (collective); the line says what to do."""
    values = gather(comm, {"host": socket.gethostname(), "value": value})

    def check() -> None:
        for rank, other in enumerate(values):
            if other["value"] != values[0]["value"]:
                raise InputError(
                    f"the {what} differs: {_short(values[0]['value'])} on rank 0 ({values[0]['host']}), "
                    f"{_short(other['value'])} on rank {rank} ({other['host']}); {advice}"
                )

    together(comm, check)


def _short(value: str) -> str:
    return value[:12] if len(value) == 64 else value  # a digest


def _summary(failures: list[dict], ranks: int) -> str:
    first = failures[0]
    same = [failure for failure in failures if failure["message"] == first["message"]]
    if len(same) == ranks or first["rank"] == ROOT:
        return first["message"]
    others = f" (and {len(failures) - 1} more ranks failed)" if len(failures) > 1 else ""
    return f"rank {first['rank']} on {first['host']}: {first['message']}{others}"
