"""SIGTERM and SIGUSR1 ask a run to end. mpirun passes SIGUSR1 to all ranks, and ends them itself when it gets SIGTERM.

While text flows the root ends the run in order after the token under way, and the workers leave it to the root. Before and after
that the signal ends the process at once.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from halo_mpi.errors import EXIT_TERMINATED

ASKED = (signal.SIGTERM, signal.SIGUSR1)
AGAIN_FILE = "HALO_MPI_AGAIN_FILE"  # the file of this name is there if the run is asked to end because it will be started again
PATIENCE_S = 30  # so long may an end in order take


class Terminated(BaseException):
    """The run was asked to end, and is where it ends at once."""


class Ending:
    """Whether the run was asked to end; `again`: it goes on in another start, so that nothing may be written but the text."""

    def __init__(self):
        self.asked = self.again = False


def end_at_once() -> None:
    """From now on these signals raise Terminated."""
    for number in ASKED:
        signal.signal(number, _raise)


@contextmanager
def in_order() -> Iterator[Ending]:
    """The root, while text flows: the first signal is noted; a second one, or a token that takes too long, ends it at once."""
    ending = Ending()

    def note(number, frame) -> None:
        if ending.asked:
            raise Terminated
        ending.asked, ending.again = True, os.path.exists(os.environ.get(AGAIN_FILE, ""))
        signal.alarm(PATIENCE_S)

    with _handling({**dict.fromkeys(ASKED, note), signal.SIGALRM: _raise}):
        yield ending


@contextmanager
def left_to_the_root() -> Iterator[None]:
    """A worker, while it serves: goes on until the root says stop, but after SIGTERM not for ever."""
    with _handling(
        {
            signal.SIGUSR1: lambda *_: None,
            signal.SIGTERM: lambda *_: signal.alarm(PATIENCE_S),
            signal.SIGALRM: lambda *_: os._exit(EXIT_TERMINATED),
        }
    ):
        yield


@contextmanager
def _handling(handlers: dict) -> Iterator[None]:
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in former.items():
            signal.signal(number, handler)


def _raise(*_) -> None:
    raise Terminated
