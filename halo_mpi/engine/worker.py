"""A worker's request loop: stateless but for its weights and the KV cache of its heads.

A worker that is behind does all attention in order, since a K or V that is missing would spoil all tokens after it, but
leaves out what the root can no longer use: the output of old attention, and old FFN work altogether.
"""

import time

import numpy as np

from halo_mpi.engine.holdings import Holdings
from halo_mpi.engine.marks import Marks
from halo_mpi.engine.mover import from_rows
from halo_mpi.engine.profile import OneGroup
from halo_mpi.engine.split_head import OwnRows
from halo_mpi.errors import HaloError
from halo_mpi.wire.messages import Kind, RangeError
from halo_mpi.wire.worker_link import Request, RootGone, WorkerLink

APPEND_SHARE = 0.25  # of an attention request's time, for a lab's pace: two of the four products


class Worker:
    """Answers the root's requests. `rows`: of the head, if it has some; `compute_s` counts the seconds of computing.

    If it cannot do its part any more (a damaged shard, memory), it says so and does nothing but hear, until the root says stop.
    """

    def __init__(self, link: WorkerLink, holdings: Holdings, marks: Marks, rows: OwnRows | None = None):
        self._link, self._holdings, self._marks, self._rows = link, holdings, marks, rows
        self._preparing: int | None = None  # a plan
        self._group: OneGroup | None = None  # for probes
        self._failed = False
        self.compute_s = 0.0

    def run(self) -> None:
        """Work until the root says stop. Raises RootGone if its process ends."""
        while not self._link.stopped:
            if not self.turn():
                self._link.wait()

    def turn(self) -> bool:
        """Do the oldest request that is not done; False if there is none."""
        if self._failed:
            return self._link.next() is not None
        try:
            return self._turn()
        except (RootGone, RangeError):  # it would happen on every rank
            raise
        except HaloError as error:
            self._failed = True
            self._link.fail(str(error))
            return True

    def _turn(self) -> bool:
        if self._preparing is not None:
            self._look_whether_prepared()
        request = self._link.next()
        if request is None:
            return False
        if request.kind == Kind.PLAN:
            self._prepare(request)
            return True
        if request.kind == Kind.PROBE:
            self._group = self._group or OneGroup(self._holdings.kernel, self._holdings.ranks, self._marks)
            begin = time.perf_counter()
            took_s = self._group.usual_s()
            self._link.answer(request, None, took_s, beside_s=time.perf_counter() - begin - took_s)
            return True
        if request.kind == Kind.HEAD:
            self._score(request)
            return True
        if request.kind != Kind.REFILL:
            self._holdings.follow(request.plan)
            if self._link.is_current(request) and (request.kind != Kind.FFN or self._link.is_useful(request)):
                self._holdings.need(2 * request.layer + (request.kind == Kind.FFN))
        begin = time.perf_counter()
        y, pace = self._compute(request) if self._link.is_current(request) else (None, 0.0)
        if pace:
            self._marks.pace(begin, pace, 1 if y is None else len(y))
        took_s = time.perf_counter() - begin
        self.compute_s += took_s
        if y is not None and self._marks.spoils():
            y.fill(np.nan)
        self._link.answer(request, y, took_s)
        return True

    def _score(self, request: Request) -> None:
        """Answer with the logits of the own rows, unless the root has gone on or they are not loaded yet."""
        begin = time.perf_counter()
        y = self._rows.scores(request.x) if self._rows and self._link.is_useful(request) else None
        self._marks.pace(begin, 0.0)
        took_s = time.perf_counter() - begin
        self.compute_s += took_s
        if y is not None and self._marks.spoils():
            y.fill(np.nan)
        self._link.answer(request, y, took_s, self._rows and self._rows.wire)

    def _prepare(self, request: Request) -> None:
        """Begin to load what the request says that this rank will have."""
        self._preparing = request.plan
        try:
            in_force, changes = from_rows(request.x)
            self._holdings.follow(in_force)  # who has no work hears of a plan by the next one
            self._holdings.prepare(request.plan, changes)
        except HaloError as error:
            self._say_prepared(error)

    def _look_whether_prepared(self) -> None:
        try:
            if self._holdings.is_prepared(self._preparing):
                self._say_prepared()
        except HaloError as error:
            self._say_prepared(error)

    def _say_prepared(self, error: HaloError | None = None) -> None:
        self._link.prepared(self._preparing, None if error is None else str(error))
        self._preparing = None

    def _compute(self, request: Request) -> tuple[np.ndarray | None, float]:
        """The answer, None if nobody needs one, and the even shares of work done."""
        kind, layer, x = request.kind, request.layer, request.x
        useful, share = self._link.is_useful(request), self._holdings.share
        if kind == Kind.REPLAY or kind == Kind.ATTENTION and not useful:
            share.append(layer, x, request.position)
            return None, self._holdings.even_share(Kind.ATTENTION, layer) * APPEND_SHARE * len(x)
        if kind == Kind.ATTENTION:
            return share.attention(layer, x, request.position), self._holdings.even_share(kind, layer)
        if kind == Kind.FFN:
            return (share.ffn(layer, x), self._holdings.even_share(kind, layer)) if useful else (None, 0.0)
        if kind == Kind.REFILL:
            self._holdings.refill(layer, x, request.position)
            return None, self._holdings.even_share(Kind.ATTENTION, layer) * APPEND_SHARE  # as prefill: once for all rows
        raise HaloError(f"the root sent a request of unknown kind {kind}; do all ranks run the same version?")
