"""Which workers the root goes on without in relaxed mode: as far as the quality that was asked for affords it."""

from halo_mpi.engine.check import Check
from halo_mpi.engine.crew import Crew
from halo_mpi.engine.open_sums import OpenSums
from halo_mpi.engine.predictor import Predictor
from halo_mpi.wire.messages import Kind


class DoingWithout:
    """`at`: the sync of the token, set by whoever computes it. `drops`: late answers count as zero, and nobody pauses.

    `check`: is told of the estimates that are final.
    """

    def __init__(
        self, crew: Crew, sums: OpenSums, predictor: Predictor, layers: int, relaxed: bool, drops: bool, check: Check | None
    ):
        self._crew, self._sums, self._predictor, self._layers = crew, sums, predictor, layers
        self._relaxed, self._drops, self._check = relaxed, drops, check
        self.at = 0

    def must_be_exact(self, layer: int, workers: list[int]) -> bool:
        """Whether all these workers are waited for in a sync of this layer, if they can be."""
        if not self._relaxed or self._crew.overrun(workers):
            return True
        return layer in (0, self._layers - 1) and not self._drops

    def affords(self, kind: Kind, layer: int, missing: set[int]) -> bool:
        """Whether the root may go on without the answers that are missing now."""
        costly = not self._drops and any(self._predictor.too_costly(kind, layer, rank) for rank in missing)
        rest = self._predictor.rest(self.at, self._crew.done_without())
        return not costly and self._sums.affords(self._predictor.share(kind, layer, missing), rest)

    def affords_always(self, ranks: set[int]) -> bool:
        """Whether the root may go on without these workers, and those it does without already, for tokens to come."""
        return self._relaxed and self._sums.affords_always(self._predictor.rest(0, self._crew.done_without() | ranks))

    def unaffordable(self, silent_s: float, replaced: bool) -> set[int]:
        """Workers whose work others must do before the next token, of those that are lost or, unless 0, silent for so long; none if the
        root can go on without them until it has been `replaced` between tokens."""
        gone = self._crew.gone(silent_s) if silent_s else self._crew.lost()
        return set() if gone and replaced and self.affords_always(gone) else gone

    def stop_asking(self, kind: Kind, layer: int) -> None:
        """Workers with too many requests before them get no more."""
        overrun = self._crew.overrun(self._crew.asked(kind, layer)[1])
        behind = {rank for rank in overrun if self._crew.does_without(rank)}
        for rank in behind | self.leave_behind(overrun - behind):
            self._crew.stop_asking(rank)
        if kind == Kind.ATTENTION and layer == 0:
            self.pause(self._crew.far_behind())

    def pause(self, ranks: set[int]) -> set[int]:
        """Ask these workers nothing for a while; those that pause now."""
        gone = self.leave_behind({rank for rank in ranks if not self._crew.does_without(rank) and not self._drops})
        for rank in gone:
            self._crew.pause(rank)
        return gone

    def leave_behind(self, ranks: set[int]) -> set[int]:
        """Wait for these workers no more; those that are behind now."""
        gone = set()
        for rank in ranks:
            rest = self._predictor.rest(self.at, self._crew.done_without() | {rank})
            if not (self._relaxed and self._sums.affords(0.0, rest) and self.affords_always({rank})):
                continue
            gone.add(rank)
            self._crew.leave(rank)
            for entry in self._sums.substitute_all(rank):
                if self._check:
                    self._check.add(entry.estimate)
        return gone
