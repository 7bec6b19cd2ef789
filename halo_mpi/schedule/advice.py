"""The shares that `--placement auto` takes, beside those that it might have taken."""

from dataclasses import dataclass

from halo_mpi.schedule.cost import Cluster
from halo_mpi.schedule.shares import Shares, Work, best_shares, usual_shares

WORTH = 0.1  # of a token's time: for less, shares stay even, so that small differences between devices do not change the text
LATE_RATE, AGAIN = 0.05, 0.5  # of a worker's answers, from which it counts as unstable; and times that, until it is stable again


@dataclass(frozen=True, slots=True)
class Advice:
    """`options`: shares by name, those that memory and disks hold; `chosen`: the name of one of them, even or measured."""

    options: dict[str, Shares]
    chosen: str
    unstable: tuple[int, ...]  # workers that should have what matters least, where others are stable

    @property
    def shares(self) -> Shares:
        return self.options[self.chosen]


def advise(cluster: Cluster, work: Work, calibrated: bool, were_unstable: tuple[int, ...] = ()) -> Advice:
    """What to do with these devices. `calibrated`: it is known what matters. `were_unstable`: workers that must do better now to count as
    stable again. Raises MemoryBudgetError if nothing fits their memory."""
    usual, best = usual_shares(cluster, work), best_shares(cluster, work)
    even, workers = usual.get("even"), range(1, len(cluster.devices))
    keep = even is not None and best.cost.tpot_ms > (1 - WORTH) * even.cost.tpot_ms
    late = tuple(
        rank for rank in workers if cluster.devices[rank].late_rate >= LATE_RATE * (AGAIN if rank in were_unstable else 1)
    )
    unstable = late if calibrated and len(late) < len(workers) else ()
    return Advice({**usual, "measured": best}, "even" if keep else "measured", unstable)
