"""The workers' shares of each sync where no calibration tells what matters: by the number of heads and groups."""

import numpy as np

from halo_mpi.schedule.placement import Plan
from halo_mpi.wire.messages import Kind


class WorkShares:
    """Has the methods of `PredictedShares`."""

    def __init__(self, plan: Plan, ranks: int):
        self._ranks = ranks
        self.follow(plan)

    def follow(self, plan: Plan) -> None:
        """The workers' parts are those of this plan from now on."""
        owners = {Kind.ATTENTION: plan.query, Kind.FFN: plan.ffn}
        self._shares = {
            (kind, layer): np.bincount(row, minlength=self._ranks) / row.size
            for kind, table in owners.items()
            for layer, row in enumerate(table)
        }
        self._largest, self._syncs = np.max(list(self._shares.values()), axis=0), len(self._shares)

    def look_ahead(self, layer: int, x: np.ndarray) -> None:
        """Nothing is known of this token."""

    def share(self, kind: Kind, layer: int, ranks: set[int]) -> float:
        """The workers' part of a sync's work."""
        return float(sum(self._shares[kind, layer][rank] for rank in ranks))

    def too_costly(self, kind: Kind, layer: int, rank: int) -> bool:
        """Nothing is known of what matters."""
        return False

    def rest(self, sync: int, ranks: set[int]) -> float:
        """At most their parts of this sync of a token and all later ones together."""
        return float(self._largest[list(ranks)].sum()) * (self._syncs - sync)
