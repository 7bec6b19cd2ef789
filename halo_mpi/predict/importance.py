"""How much each worker's part of a sync matters for the token at hand, told one layer ahead."""

import numpy as np

from halo_mpi.model.config import ModelConfig
from halo_mpi.predict.stored import read_importance
from halo_mpi.schedule.placement import Plan
from halo_mpi.store.reader import ModelStore
from halo_mpi.wire.messages import Kind

PRICE = 0.9  # even shares; see bench.lateness
LEAST_SENSITIVITY = 0.1  # of the mean: measured on few tokens, a layer can seem to cost nothing


class PredictedShares:
    """The workers' shares of each sync's importance: |output| as predicted, times what this layer's missing parts cost.

    Over all ranks and the syncs of a token, shares add up to the number of syncs, as even shares of work do.
    """

    def __init__(self, store: ModelStore, config: ModelConfig, plan: Plan, ranks: int):
        found = store.meta["calibration"]
        self._weight, self._bias = zip(*(read_importance(store, layer) for layer in range(config.layers)))
        self._groups, self._ranks, self._layers = config.groups, ranks, config.layers
        self._cost = relative_costs(found["sensitivity"], config.layers)
        self._usual = {Kind.ATTENTION: found["heads"]["importance"], Kind.FFN: found["groups"]["importance"]}
        self.follow(plan)

    def follow(self, plan: Plan) -> None:
        """The workers' parts are those of this plan from now on."""
        ranks = self._ranks
        self._owners = {Kind.ATTENTION: plan.query, Kind.FFN: plan.ffn}
        self._shares = {
            (kind, layer): self._by_rank(kind, layer, np.asarray(self._usual[kind][layer]))
            for kind in self._usual
            for layer in range(self._layers)
        }
        in_turn = [self._shares[kind, layer] for layer in range(self._layers) for kind in (Kind.ATTENTION, Kind.FFN)]
        self._rest = np.cumsum([np.zeros(ranks), *in_turn[::-1]], axis=0)[::-1]  # from each sync of a token to its end

    def look_ahead(self, layer: int, x: np.ndarray) -> None:
        """Predict the shares of a layer's two syncs from x, f32 [1, D]: the FFN's input in the layer before, or the first input."""
        if layer < len(self._weight):
            groups, heads = np.split(self._weight[layer] @ x[-1] + self._bias[layer], [self._groups])
            self._shares[Kind.FFN, layer] = self._by_rank(Kind.FFN, layer, np.exp(groups - groups.max()))
            self._shares[Kind.ATTENTION, layer] = self._by_rank(Kind.ATTENTION, layer, np.exp(heads - heads.max()))

    def share(self, kind: Kind, layer: int, ranks: set[int]) -> float:
        """The workers' part of a sync."""
        shares = self._shares[kind, layer]
        return float(sum(shares[rank] for rank in ranks))

    def too_costly(self, kind: Kind, layer: int, rank: int) -> bool:
        """Whether the worker's part of this sync matters so much that it is better to wait for it."""
        return bool(self._shares[kind, layer][rank] * self._ranks > PRICE)

    def rest(self, sync: int, ranks: set[int]) -> float:
        """Their parts of this sync of a token and all later ones together, as usual in the calibration's text."""
        return float(sum(self._rest[sync, rank] for rank in ranks))

    def _by_rank(self, kind: Kind, layer: int, sizes: np.ndarray) -> np.ndarray:
        owned = np.bincount(self._owners[kind][layer], sizes, self._ranks)
        return owned * (self._cost[kind][layer] / sizes.sum())


def relative_costs(sensitivity: list | None, layers: int) -> dict[Kind, np.ndarray]:
    """What a missing part costs in each layer's attention and FFN, relative to the mean of all."""
    cost = np.ones((layers, 2)) if sensitivity is None else np.asarray(sensitivity)
    cost = np.maximum(cost, LEAST_SENSITIVITY * cost.clip(min=0).mean())
    cost = cost / cost.mean() if cost.mean() > 0 else np.ones((layers, 2))
    return {Kind.ATTENTION: cost[:, 0], Kind.FFN: cost[:, 1]}
