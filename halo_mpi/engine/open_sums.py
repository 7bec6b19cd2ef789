"""Partial sums that an estimate stands for, and whether the root may go on with them.

    asked --> on time | waited                 came before, or after the deadline, and was waited for
          --> open    --> deferred             an estimate went in, and (actual - estimate) when it came
                      --> substituted          the worker was cut off: the estimate is final

The settled states are counted in the ledger; this file keeps the open ones.
"""

from dataclasses import dataclass

import numpy as np

from halo_mpi.engine.ledger import Ledger
from halo_mpi.wire.messages import Kind


@dataclass(slots=True)
class OpenSum:
    """An estimate [D] in the place of the answer to x [1, D]; `missed`: how many syncs' inputs lacked the actual one."""

    seq: int
    rank: int
    kind: Kind
    layer: int
    position: int
    x: np.ndarray
    estimate: np.ndarray
    missed: int = 0


class OpenSums:
    """`max_lag`: how many syncs' inputs may lack a partial sum that will come; `quality`: the largest share of a token's
    work that may be inexact; `syncs`: per token.
    """

    def __init__(self, max_lag: int, quality: float, syncs: int, ledger: Ledger):
        self._max_lag, self._budget, self._ledger, self._syncs = max_lag, quality * syncs, ledger, syncs
        self._open: dict[tuple[int, int], OpenSum] = {}
        self._inexact = 0.0  # shares of syncs, summed over the token

    def __len__(self) -> int:
        return len(self._open)

    def ranks(self) -> set[int]:
        """Workers of whom something is open."""
        return {entry.rank for entry in self._open.values()}

    def oldest(self, seq: int) -> int:
        """The oldest seq whose answer is still of use when `seq` is asked."""
        return min((entry.seq for entry in self._open.values()), default=seq)

    def overdue(self) -> set[int]:
        """Workers for whom the next sync has to wait: it would be more than `max_lag` that lack something of theirs."""
        return {entry.rank for entry in self._open.values() if entry.missed >= self._max_lag}

    def affords(self, share: float, rest: float) -> bool:
        """Whether this share of the present sync may be inexact too, while so much of it and all later ones will be."""
        return self._max_lag > 0 and self._inexact + share + rest <= self._budget

    def affords_always(self, whole: float) -> bool:
        """Whether so much may be inexact in every token."""
        return self._max_lag > 0 and whole <= self._budget

    def open(self, entry: OpenSum, share: float) -> None:
        """The estimate goes in for now."""
        self._inexact += share
        self._open[entry.seq, entry.rank] = entry

    def substitute(self, rank: int, share: float) -> None:
        """An estimate goes in for good."""
        self._inexact += share
        self._ledger.substitute(rank)

    def substitute_all(self, rank: int) -> list[OpenSum]:
        """What is open of this worker will not be corrected any more; returns it."""
        final = [entry for entry in self._open.values() if entry.rank == rank]
        for entry in final:
            del self._open[entry.seq, entry.rank]
            self._ledger.substitute(rank)
        return final

    def abandon(self) -> None:
        """The token is given up: nothing of it counts."""
        self._open.clear()

    def begin_token(self) -> None:
        self._inexact = 0.0

    def next_sync(self) -> None:
        """A sync's input was made, without what is open."""
        for entry in self._open.values():
            entry.missed += 1

    def arrived(self, seq: int, rank: int) -> OpenSum | None:
        """What stood in for a late partial sum that has come; None if it comes too late to count."""
        entry = self._open.pop((seq, rank), None)
        if entry is None:
            self._ledger.discarded_late += 1
            return None
        self._ledger.correct(rank, entry.missed)
        return entry

    def end_token(self) -> None:
        """Everything is settled."""
        assert not self._open
        self._ledger.inexact.append(self._inexact / self._syncs)
