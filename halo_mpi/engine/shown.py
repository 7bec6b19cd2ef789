"""Where the text is shown: on standard output, or through the pipe that launch/halo-mpirun has for it, since mpirun passes standard
output on line by line, among messages of its own."""

import os
import stat
import sys
from typing import BinaryIO

PIPE = "HALO_MPI_TEXT"  # its name
# Of a run that is started again, so many bytes of the text were shown already: through the pipe, and on standard output.
SHOWN_THERE, SHOWN = "HALO_MPI_TEXT_SHOWN", "HALO_MPI_SHOWN"


class Shown:
    """The root's text, piece by piece, but for the bytes that were shown already."""

    def __init__(self):
        pipe = _open(os.environ.get(PIPE))
        self._file = pipe or sys.stdout.buffer
        self._already = int(os.environ.get(SHOWN_THERE if pipe else SHOWN, 0))

    def show(self, text: str) -> None:
        data = text.encode()
        skipped = min(self._already, len(data))
        self._already -= skipped
        self._file.write(data[skipped:])
        self._file.flush()


def _open(path: str | None) -> BinaryIO | None:
    """The pipe, if this process is on the computer where somebody reads from it."""
    try:
        descriptor = os.open(path or "", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None
    if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "wb")
