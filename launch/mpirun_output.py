"""For halo-mpirun: what is shown on its standard output, at once and byte by byte as it comes."""

import contextlib
import os
import re
import selectors
import threading
import time

TEXT = "HALO_MPI_TEXT"  # names a pipe for the program's text: mpirun passes standard output on line by line, among messages of its own
# So many bytes of the text were shown already, of what came through that pipe and of what came through mpirun.
TEXT_SHOWN, SHOWN = "HALO_MPI_TEXT_SHOWN", "HALO_MPI_SHOWN"
DRAIN_S = 1.0  # after mpirun's end: so long is waited for more
BANNER = b"=   BAD TERMINATION"  # MPICH's mpirun writes it to standard output
MESSAGE = re.compile(rb"-{40,}\n.*?\n-{40,}\n", re.DOTALL)  # and Open MPI's such
BLOCK = 1 << 16


class Output:
    """Passes on what comes from mpirun's standard output and from the text's pipe. Both are counted over all starts."""

    def __init__(self):
        self.closed = False
        self._passed = {TEXT_SHOWN: 0, SHOWN: 0}
        self._busy, self._heard_at = False, 0.0
        self._last = b""  # some of what mpirun wrote

    @property
    def shown(self):
        """What the program is to know when it is started again."""
        return {name: str(count) for name, count in self._passed.items()}

    def open(self, pipe):
        """Make the text's pipe for the next start, if there is to be one."""
        self._selector, self._held = selectors.DefaultSelector(), None
        if pipe is None:
            return
        try:
            os.mkfifo(pipe, 0o600)
        except OSError:
            return  # a folder that can have none; the text comes through mpirun
        self._selector.register(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), selectors.EVENT_READ, TEXT_SHOWN)
        self._held = os.open(pipe, os.O_WRONLY)  # while this is open, the pipe does not end

    def follow(self, stdout):
        self._selector.register(stdout, selectors.EVENT_READ, SHOWN)
        self._thread = threading.Thread(target=self._pass_on, args=(self._selector,), daemon=True)
        self._thread.start()

    def drain(self):
        """Wait for the rest, unless somebody who outlived mpirun keeps it from ending."""
        if self._held is not None:
            os.close(self._held)
        self._heard_at = time.monotonic()
        while self._thread.is_alive() and (self._busy or time.monotonic() - self._heard_at < DRAIN_S):
            self._thread.join(0.05)
        if BANNER in self._last:  # it is no part of the text
            self._passed[SHOWN] -= len(self._last) - max(0, self._last.rfind(b"\n=", 0, self._last.find(BANNER) - 1))
        self._last = b""

    def _pass_on(self, selector):
        with selector:
            while selector.get_map():
                for key, _ in selector.select():
                    if data := os.read(key.fd, BLOCK):
                        self._show(data, key.data)
                    else:
                        selector.unregister(key.fileobj)
                        os.close(key.fileobj) if isinstance(key.fileobj, int) else key.fileobj.close()

    def _show(self, data, source):
        self._busy, self._heard_at = True, time.monotonic()
        if source == SHOWN and self._passed[TEXT_SHOWN]:  # mpirun's own messages do not belong into a text
            with contextlib.suppress(OSError):
                os.write(2, b"".join(MESSAGE.findall(data)))
            data = MESSAGE.sub(b"", data)
        if source == SHOWN:
            self._last = (self._last + data)[-BLOCK:]
        while data and not self.closed:
            try:
                count = os.write(1, data)
                self._passed[source] += count
                data = data[count:]
            except OSError:
                self.closed = True
        self._busy = False
