"""A worker's side of the star: requests from rank 0 in order, at most one answer to each."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from halo_mpi.errors import HaloError
from halo_mpi.wire.exchange import ALONE_S, ROOT
from halo_mpi.wire.mailbox import Mailbox
from halo_mpi.wire.messages import BYTES, PINGS, TOOK_S, Echo, Kind, Message, text_rows
from halo_mpi.wire.polling import Waiter

UNANSWERED_IN_VECTORS = (Kind.REPLAY, Kind.REFILL, Kind.PROBE)
BESIDE_THE_TEXT = (Kind.PROBE, Kind.HEAD)  # without an epoch; what is older may be of use still


@dataclass(frozen=True, slots=True)
class Request:
    """What the root asks for: x, f32 [rows, width], of the tokens from `position` on; u8 for a PLAN."""

    kind: int
    seq: int
    layer: int
    position: int
    epoch: int
    plan: int
    x: np.ndarray


class RootGone(HaloError):
    """There is nobody any more to work for."""


class WorkerLink:
    """Takes in what has come, answers pings and kicks at once, and hands out the other requests one by one.

    What came meanwhile tells which of the older ones are still of use.
    """

    def __init__(self, mailbox: Mailbox, waiter: Waiter | None = None):
        self._mailbox, self._waiter = mailbox, waiter or Waiter()
        self._queue: deque[Request] = deque()
        self._oldest_useful = self._epoch = self._done = 0
        self._stopped, self._pings = False, 0
        self._leave: bool | None = None
        self._heard_at = self._waiter.now()
        self._work: Callable[[], None] = lambda: None
        self._last_ping = False

    @property
    def stopped(self) -> bool:
        """The root said stop, and everything before it is done."""
        return self._stopped and not self._queue

    def greet(self) -> None:
        """Answer the pings with which the root begins."""
        until = self._pings + PINGS
        while self._pings < until:
            self.next()
            self._waiter.wait()

    def echo(self, work: Callable[[], None]) -> None:
        """Answer pings until there are no more; `work`: to be done before the answer to some."""
        self._work, self._last_ping = work, False
        while not self._last_ping:
            self.next()
            self._waiter.wait()

    def next(self) -> Request | None:
        """The oldest request that is not done yet; None if there is none now."""
        self.hear()
        return self._queue.popleft() if self._queue else None

    def hear(self) -> None:
        """Take in what has come, and answer pings and kicks. Raises RootGone if the root has ended, or was silent for very long."""
        now = self._waiter.now()
        for _, message in self._mailbox.poll():
            self._waiter.heard()
            self._heard_at = now
            self._take(message)
        if self._mailbox.ended or now - self._heard_at > ALONE_S:
            raise RootGone("the root is gone")

    def is_current(self, request: Request) -> bool:
        """Whether the request belongs to the text that is worked at."""
        return request.epoch == self._epoch

    def is_useful(self, request: Request) -> bool:
        """Whether the root can still use the answer."""
        return request.seq >= self._oldest_useful

    def answer(self, request: Request, y: np.ndarray | None, took_s: float = 0.0, wire: str | None = None,
               beside_s: float = 0.0) -> None:  # fmt: skip
        """Start sending y, f32 [rows, width], as the answer to `request`; None: it is done, and nobody needs the answer.

        `beside_s`: what a probe took beside the `took_s` that it tells.
        """
        self._done = request.seq
        took = round(took_s / TOOK_S)
        if request.kind in UNANSWERED_IN_VECTORS or request.kind == Kind.HEAD and y is None:
            self._mailbox.post([ROOT], Kind(request.kind), request.seq, position=round(beside_s / TOOK_S), lag=took)
        elif y is not None:
            self._mailbox.post([ROOT], Kind(request.kind), request.seq, request.layer, request.position, y, lag=took, wire=wire)
        self._waiter.heard()  # the next request comes soon after an answer, however long that took

    def prepared(self, plan: int, refusal: str | None) -> None:
        """Say that what this plan needs is loaded, or why it cannot be."""
        x = None if refusal is None else text_rows(refusal, self._mailbox.width)
        self._mailbox.post([ROOT], Kind.PLAN, self._done, x=x, plan=plan, wire=BYTES)

    def wait(self) -> None:
        """Let others run for a moment."""
        self._waiter.wait()

    def fail(self, why: str) -> None:
        """Say that this rank cannot do its part any more."""
        self._mailbox.post([ROOT], Kind.FAILURE, self._done, x=text_rows(why, self._mailbox.width), wire=BYTES)

    def close(self, last_words: str = "") -> bool:
        """Say the last words, wait until the root lets go, and let go of MPI's requests; whether the ranks part without MPI's own end,
        since not all of them are there."""
        self._mailbox.post([ROOT], Kind.STOP, self._done, x=text_rows(last_words, self._mailbox.width), wire=BYTES)
        try:
            while self._leave is None:
                self.hear()
                self._waiter.wait()
            self._mailbox.post([ROOT], Kind.STOP, self._done)
        except RootGone:
            self._leave = True
        self._mailbox.close()
        return self._leave

    def _take(self, message: Message) -> None:
        header = message.header
        kind, seq = int(header["kind"]), int(header["seq"])
        if kind == Kind.STOP:
            if self._stopped:
                self._leave = bool(header["lag"])
            self._stopped = True
        elif kind == Kind.PING:
            if header["lag"] == Echo.WORK:
                self._work()
            if wanted := int(header["position"]):
                self._mailbox.post([ROOT], Kind.PING, seq, x=np.zeros((wanted, self._mailbox.width), np.float32), wire="f32")
            else:
                self._mailbox.post([ROOT], Kind.PING, seq, x=message.read() if header["rows"] else None)
            self._pings += 1
            self._last_ping = header["lag"] == Echo.LAST
        elif kind == Kind.KICK:
            self._mailbox.post([ROOT], Kind.KICK, self._done)
        elif kind != Kind.TRAILER:
            if kind not in BESIDE_THE_TEXT:
                self._epoch = int(header["epoch"])
                self._oldest_useful = seq - int(header["lag"])
            x = message.read()
            x = x if x.base is None else x.copy()
            place = (int(header[name]) for name in ("layer", "position", "epoch", "plan"))
            self._queue.append(Request(kind, seq, *place, x))
