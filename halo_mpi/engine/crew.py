"""The workers as the root sees them: who has which part, who is late, who is cut off, and how they come back.

present --> suspect    missed a deadline and was not heard since; any message clears it
        --> away       silent for `OUTAGE_S`, and the run's quality allows to do without it
away    --> present    heard again, and sent every attention input that it missed
"""

import numpy as np
import torch

from halo_mpi.engine.history import AttentionInputs
from halo_mpi.model.config import ModelConfig
from halo_mpi.schedule.placement import Plan
from halo_mpi.wire.messages import Kind
from halo_mpi.wire.root_link import RootLink

OUTAGE_S = 0.3
CREDIT = 128  # requests without an answer


class Crew:
    """`quality`: the largest share of the work that may be done without."""

    def __init__(self, config: ModelConfig, plan: Plan, link: RootLink, relaxed: bool, quality: float, context: int):
        self._link, self._relaxed, self._quality = link, relaxed, quality
        owners = {Kind.ATTENTION: plan.query, Kind.FFN: plan.ffn}
        self._shares = {kind: [_shares(row, link.ranks) for row in table] for kind, table in owners.items()}
        self._workers = {kind: [sorted(set(row.tolist()) - {0}) for row in table] for kind, table in owners.items()}
        self._of_all = np.mean(
            [_shares(table, link.ranks) for table in owners.values()], axis=0
        )  # of each rank, in the whole work
        self._left_at: dict[int, float] = {}
        self._history = None
        if relaxed:
            self._history = AttentionInputs(config.layers, context, config.hidden, self._workers[Kind.ATTENTION])

    def split(self, kind: Kind, layer: int) -> tuple[list[int], list[int]]:
        """The workers that have a part in this sync: those that are asked, and those that are away."""
        workers = self._workers[kind][layer]
        for rank in workers:
            if self.is_overrun([rank]) and self._may_leave(rank):
                self._leave(rank)
        if not self._left_at:
            return workers, []
        return [rank for rank in workers if rank not in self._left_at], [rank for rank in workers if rank in self._left_at]

    def share(self, kind: Kind, layer: int, ranks: set[int]) -> float:
        """The workers' part of a sync's work."""
        return float(sum(self._shares[kind][layer][rank] for rank in ranks))

    def deadline(self, rank: int, seq: int, own_done: float) -> float:
        """Until when to wait for the answer to request `seq`."""
        peer = self._link.peers[rank]
        return own_done if peer.suspect else peer.deadline.at(peer.asked_at[seq], own_done)

    def suspect(self, rank: int) -> None:
        self._link.peers[rank].suspect = True

    def is_overrun(self, ranks: list[int]) -> bool:
        """Whether one of the workers has as many requests before it as it may have."""
        return any(self._link.unanswered(rank) >= CREDIT for rank in ranks)

    def is_away(self, rank: int) -> bool:
        return rank in self._left_at

    def state(self, rank: int) -> str:
        """As the report has it."""
        return "suspended" if rank in self._left_at else "ok"

    def leave(self, rank: int, now: float) -> bool:
        """Do without a worker that was silent for long, if that is allowed; whether it is away now."""
        peer = self._link.peers[rank]
        since = max(peer.heard_at, next(iter(peer.asked_at.values()), now))
        if now - since < OUTAGE_S or not self._may_leave(rank):
            return False
        self._leave(rank)
        return True

    def _may_leave(self, rank: int) -> bool:
        return self._relaxed and rank not in self._left_at and self._of_all[[rank, *self._left_at]].sum() <= self._quality

    def _leave(self, rank: int) -> None:
        self._left_at[rank] = self._link.waiter.now()
        self._link.probe(rank)

    def begin_text(self) -> None:
        """A new text: nobody lacks anything of it."""
        self._left_at.clear()
        if self._history:
            self._history.begin_text()

    def sent_attention(self, layer: int, position: int, normed: torch.Tensor, workers: list[int]) -> None:
        if self._history:
            self._history.keep(layer, position, normed, workers)

    def welcome_back(self, position: int, epoch: int) -> None:
        """Before a token: who was away and is heard again gets what it missed, and is present once that is all."""
        for rank in list(self._left_at):
            peer = self._link.peers[rank]
            if peer.heard_at <= self._left_at[rank] or peer.kicks_in_flight:
                continue
            if self._history.replay(self._link, rank, position, epoch):
                del self._left_at[rank]
            else:
                self._link.probe(rank)


def _shares(owners: np.ndarray, ranks: int) -> np.ndarray:
    return np.bincount(owners.ravel(), minlength=ranks) / owners.size
