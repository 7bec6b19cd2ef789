"""A worker's request loop: stateless but for its weights and the KV cache of its heads.

A worker that is behind does all attention in order, since a K or V that is missing would spoil all tokens after it, but
leaves out what the root can no longer use: the output of old attention, and old FFN work altogether.
"""

import time
from collections.abc import Callable

import torch

from halo_mpi.engine.marks import Marks
from halo_mpi.errors import HaloError
from halo_mpi.model.llama import Share
from halo_mpi.wire.messages import Kind
from halo_mpi.wire.worker_link import Request, WorkerLink

APPEND_SHARE = 0.25  # of an attention request's time, for a lab's pace: two of the four products


class Worker:
    """Answers the root's requests. `even_shares` is for the lab's pace; `compute_s` counts the seconds of computing.

    `need` is called with 2 * layer before a layer's attention, and with 2 * layer + 1 before its FFN: their weights must be there.
    """

    def __init__(self, link: WorkerLink, share: Share, marks: Marks, even_shares: dict[Kind, list[float]],
                 need: Callable[[int], None] = lambda part: None):  # fmt: skip
        self._link, self._share, self._marks, self._even_shares, self._need = link, share, marks, even_shares, need
        self.compute_s = 0.0

    def run(self) -> None:
        """Work until the root says stop."""
        while not self._link.stopped:
            if not self.turn():
                self._link.wait()
        self._link.close()

    def turn(self) -> bool:
        """Do the oldest request that is not done; False if there is none."""
        request = self._link.next()
        if request is None:
            return False
        if self._link.is_current(request) and (request.kind != Kind.FFN or self._link.is_useful(request)):
            self._need(2 * request.layer + (request.kind == Kind.FFN))
        begin = time.perf_counter()
        y, pace = self._compute(request) if self._link.is_current(request) else (None, 0.0)
        if pace:
            self._marks.pace(begin, pace)
        self.compute_s += time.perf_counter() - begin
        self._link.answer(request, None if y is None else y.numpy())
        return True

    def _compute(self, request: Request) -> tuple[torch.Tensor | None, float]:
        """The answer, None if nobody needs one, and the even shares of work done."""
        kind, layer, x = request.kind, request.layer, torch.from_numpy(request.x)
        useful = self._link.is_useful(request)
        if kind == Kind.REPLAY or kind == Kind.ATTENTION and not useful:
            self._share.append(layer, x, request.position)
            return None, self._even_shares[Kind.ATTENTION][layer] * APPEND_SHARE * len(x)
        if kind == Kind.ATTENTION:
            return self._share.attention(layer, x, request.position), self._even_shares[Kind.ATTENTION][layer]
        if kind == Kind.FFN:
            return (self._share.ffn(layer, x), self._even_shares[Kind.FFN][layer]) if useful else (None, 0.0)
        raise HaloError(f"the root sent a request of unknown kind {kind}; do all ranks run the same version?")
