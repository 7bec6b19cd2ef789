"""What stands in the residual stream for partial sums that are late, and what is added when they come."""

import numpy as np

from halo_mpi.engine.check import Check
from halo_mpi.engine.crew import Crew
from halo_mpi.engine.ledger import Ledger
from halo_mpi.engine.open_sums import OpenSum, OpenSums
from halo_mpi.engine.predictor import Key, Predictor
from halo_mpi.wire.peer import Answer


class LateSums:
    """`drops`: late answers count as zero. `check`: is told of what becomes final."""

    def __init__(self, sums: OpenSums, predictor: Predictor, crew: Crew, ledger: Ledger, drops: bool, check: Check | None):
        self._sums, self._predictor, self._crew, self._ledger = sums, predictor, crew, ledger
        self._drops, self._check = drops, check
        self._corrections: list[np.ndarray] = []

    def stand_in(self, seq: int, key: Key, position: int, x: np.ndarray) -> np.ndarray:
        """The estimate, f32 [1, D], for the answer to x [1, D] that is not there."""
        kind, layer, rank = key
        estimate = np.zeros_like(x[-1]) if self._drops else self._predictor.estimate(key, position, x)
        share = self._predictor.share(kind, layer, {rank})
        if self._drops or self._crew.does_without(rank):
            self._sums.substitute(rank, share)
            if self._check:
                self._check.add(estimate)
        else:
            self._sums.open(OpenSum(seq, rank, kind, layer, position, x, estimate), share)
        return estimate[None]

    def take(self, answer: Answer) -> OpenSum | None:
        """A partial sum of an earlier sync came: what it changes is added by `correct`; what stood in for it, if it still counts."""
        entry = self._sums.arrived(answer.seq, answer.rank)
        if entry:
            self._corrections.append(answer.y - entry.estimate)
            self._predictor.observe((entry.kind, entry.layer, entry.rank), entry.position, entry.x, answer.y)
            if self._check:
                self._check.add(answer.y[0])
        return entry

    def correct(self, x: np.ndarray) -> np.ndarray:
        """The residual vectors x [T, D] with what came late."""
        for correction in self._corrections:
            x = x + correction
        self._corrections.clear()
        return x

    def abandon(self) -> None:
        """The token is given up: nothing of it counts."""
        self._sums.abandon()
        self._ledger.give_up_token()
        self._corrections.clear()
