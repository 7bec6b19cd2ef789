"""Weights that are read while the rank computes: all of them once, and at every token what does not stay in memory.

    parts    0 attention of layer 0   1 its FFN   2 attention of layer 1   3 its FFN  ...  (blocks of the head)  and again from the first

A thread reads, always the next part in this order that is needed and not there. Parts that stay are read once. The others take
turns in a few slots: while one is computed with, the next one is read.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

from halo_mpi.errors import HaloError
from halo_mpi.model.kernels.tiles import aligned_bytes
from halo_mpi.model.loading import Part
from halo_mpi.progress import progress
from halo_mpi.schedule.residence import SLOTS, Residence

POLL_S = 1e-3  # between two looks at the messages while a part is waited for


class Loader:
    """Reads parts; the matrices of a part may be used after `need(part)` until the next is needed.

    `loaded` is called, by the thread, when everything that stays is there; `meanwhile` again and again while `need` waits.
    `read_s` and `waited_s`: seconds that the thread read, and that `need` waited.
    """

    def __init__(self, parts: list[Part], residence: Residence, loaded: Callable[[], None] = lambda: None, shown: bool = False):
        self._parts, self.residence, self._loaded = parts, residence, loaded
        self.meanwhile: Callable[[], None] = lambda: None
        self.read_s = self.waited_s = 0.0
        with enough_memory():
            for part, stays in zip(parts, residence.stays):
                if stays:
                    part.make_room()
            self._slots = [aligned_bytes(residence.slot) for _ in range(SLOTS if residence.slot else 0)]
        self._in_slot: list[int | None] = [None] * len(self._slots)
        self._there = {part for part, size in enumerate(residence.sizes) if not size}
        self._to_stay = {part for part, stays in enumerate(residence.stays) if stays} - self._there
        self._at, self._closing = 0, False
        self._expected: int | None = None  # the part that the kernel fetches already
        self._complete = len(self._there) == len(self._parts)
        if self._complete:
            self._parts = []
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._bar = iter(progress(range(len(self._to_stay)), len(self._to_stay), "loading weights", shown))
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._start()

    def _start(self) -> None:
        self._thread.start()

    def need(self, part: int) -> None:
        """Wait until the part is there; the one needed before may go now.

        Raises what reading it raised: InputError, DamagedFileError, HaloError.
        """
        if self._complete:
            return
        with self._changed:
            self._at = part
            self._changed.notify()
            if part in self._there:
                return
        begin = time.perf_counter()
        while not self._has(part):
            self.meanwhile()
        self.waited_s += time.perf_counter() - begin

    @property
    def complete(self) -> bool:
        """Whether everything is there, and will stay."""
        return self._complete

    def is_done(self) -> bool:
        """The same. Raises what reading raised."""
        with self._changed:
            if self._error:
                raise self._error
            return self._complete

    def load(self) -> None:
        """Wait for every part in its turn."""
        for part in range(len(self._parts)):
            self.need(part)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _has(self, part: int) -> bool:
        """Whether the part is there, after waiting for a moment."""
        with self._changed:
            if part not in self._there and not self._error:
                self._changed.wait(POLL_S)
            if part not in self._there and self._error:
                raise self._error
            return part in self._there

    def _run(self) -> None:
        try:
            with enough_memory():
                next(self._bar, None)
                if not self._to_stay:
                    self._loaded()
                while (part := self._next()) is not None:
                    self._read(part)
        except Exception as error:  # of any kind: it is the computing thread that must fail
            with self._changed:
                self._error = error
                self._changed.notify()
        finally:
            self._bar.close()

    def _read(self, part: int) -> None:
        begin = time.perf_counter()
        if part in self._in_slot:
            self._parts[part].make_room(self._slots[self._in_slot.index(part)])
        if part != self._expected:
            self._parts[part].expect()
        if (after := self._after(part)) is not None:
            self._parts[after].expect()
        self._expected = after
        self._parts[part].read()
        self.read_s += time.perf_counter() - begin
        self._has_come(part)

    def _after(self, part: int) -> int | None:
        """The part that will be read when this one has been, unless somebody skips some."""
        with self._changed:
            there = self._there | {part}
            later = (other for other in self._ahead() if other not in there)
            return next(chain(self._with_a_place(there), later), None)

    def _next(self) -> int | None:
        """The part to read now, once there is one; None if there never will be."""
        with self._changed:
            while not self._closing and not self._complete:
                if (part := self._wanted()) is not None:
                    return part
                self._changed.wait()
            return None

    def _wanted(self) -> int | None:
        """The first part, from the one that is needed now on, that is not there and has a place; what its slot held gives way."""
        part = next(self._with_a_place(self._there), None)
        if part is not None and not self.residence.stays[part]:
            soon = self._soon()
            slot = next(number for number, held in enumerate(self._in_slot) if held not in soon)
            self._there.discard(self._in_slot[slot])
            self._in_slot[slot] = part
        return part

    def _with_a_place(self, there: set[int]) -> Iterator[int]:
        """Parts that are not there and may be read now, in their turn."""
        soon = self._soon()
        return (part for part in self._ahead() if part not in there and (self.residence.stays[part] or part in soon))

    def _soon(self) -> list[int]:
        """The next parts that do not stay, for which the slots are."""
        return [part for part in self._ahead() if not self.residence.stays[part]][:SLOTS]

    def _ahead(self) -> list[int]:
        """All parts in their turn, from the one that is needed now on."""
        parts = range(len(self._parts))
        return [*parts[self._at :], *parts[: self._at]]

    def _has_come(self, part: int) -> None:
        if part in self._to_stay:
            next(self._bar, None)
            self._to_stay.discard(part)
            if not self._to_stay:
                self._loaded()
        with self._changed:
            self._there.add(part)
            self._complete = len(self._there) == len(self._parts) and not self._slots
            if self._complete:
                self._parts = []  # what they were read into may be given up when work moves
            self._changed.notify()


@contextmanager
def enough_memory():
    """Say in one line that there is not enough."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError when it cannot allocate
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        raise HaloError("memory ran out while loading weights; use more ranks or a smaller model") from error
