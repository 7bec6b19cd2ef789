"""Partial sums that are lost or late, simulated on one computer: what a text's loss becomes if some never come, or come late.

All ways to lose them walk through the model side by side, so that each layer's weights are read once, and with the same draws.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.llama import Share, Trunk, rms_norm
from halo_mpi.model.whole import load_layer
from halo_mpi.predict.fits import LowRank
from halo_mpi.predict.importance import relative_costs
from halo_mpi.predict.judge import rank_correlation, recall_of_least
from halo_mpi.predict.stored import read_estimate, read_importance
from halo_mpi.predict.moments import apply
from halo_mpi.schedule.cost import KINDS
from halo_mpi.store.reader import ModelStore
from halo_mpi.wire.messages import Kind

LEAST = 4  # what is skipped is among the least important 1/4
LAST = 10**9  # sync: everything comes by the end of a token


@dataclass(frozen=True, slots=True)
class Way:
    """`lost`: the probability for a unit and token; `filled`: zero, mean (of what came before in the window) or estimate.

    `units`: of each kind and layer, the groups or heads that are lost together; a kind or layer without is exact.
    `chosen`: any unit; or only those of the token's least important quarter, "static" or as "predicted", so many times as likely.
    `lags`: if there are any, a lost sum comes late: so many syncs lack it, 1, 2, ... with these weights. What matters more than
    `price` times an even share, weighted by what its layer's parts cost, is waited for.
    """

    name: str
    filled: str
    lost: float
    units: dict[tuple[Kind, int], list[list[int]]]
    chosen: str = "any"
    lags: tuple[float, ...] = ()
    price: float = np.inf


@dataclass(slots=True)
class Layer:
    """A whole layer and what calibration knows of it."""

    share: Share
    estimates: dict[Kind, list[LowRank]]
    memory: dict[Kind, list[float]]
    weight: torch.Tensor
    bias: torch.Tensor
    cost: dict[Kind, float]  # of a missing part, relative to the mean of all syncs


def stored_layer(store: ModelStore, config: ModelConfig, layer: int, length: int) -> Layer:
    """A layer of a calibrated model."""
    found, (weight, bias) = store.meta["calibration"], read_importance(store, layer)
    weights = load_layer(store, config, layer, list(range(config.heads)), list(range(config.groups)))
    return Layer(
        Share(config, [weights], length),
        {
            Kind.FFN: [read_estimate(store, "group_estimate", layer, group) for group in range(config.groups)],
            Kind.ATTENTION: [read_estimate(store, "head_estimate", layer, head) for head in range(config.heads)],
        },
        {Kind.FFN: found["groups"]["memory"][layer], Kind.ATTENTION: found["heads"]["memory"][layer]},
        torch.from_numpy(weight),
        torch.from_numpy(bias),
        {kind: float(costs[layer]) for kind, costs in relative_costs(found["sensitivity"], config.layers).items()},
    )


class Simulation:
    """`windows`: token ids [W, T]; the first token of each is never lost, since all others would lack it."""

    def __init__(self, config: ModelConfig, trunk: Trunk, windows: np.ndarray, ways: list[Way], seed: int = 0):
        self._config, self._trunk, self._ways, self._seed = config, trunk, ways, seed
        self._ids = torch.from_numpy(windows).long()
        self._x = [[trunk.embedding[ids] for ids in self._ids] for _ in ways]
        self._ahead = [[None] * len(windows) for _ in ways]
        self._late = [[[] for _ in windows] for _ in ways]  # (sync after which it comes, what it changes)
        self.lost = [[0, 0] for _ in ways]  # units lost, units in all
        self.judged = {kind: [[] for _ in windows] for kind in KINDS}  # by layer: rank correlation and recall

    def run(self, layer_of: Callable[[int], Layer], progress: Callable) -> np.ndarray:
        """The loss of every scored token, in nats, [ways, tokens]."""
        for number in progress(range(self._config.layers)):
            layer = layer_of(number)
            for way in range(len(self._ways)):
                for window in range(len(self._ids)):
                    self._pass(way, window, layer, number)
        return np.stack([self._losses(way) for way in range(len(self._ways))])

    def _pass(self, way: int, window: int, layer: Layer, number: int) -> None:
        trunk, weights, dim, config = self._trunk, layer.share.layers[0], self._config.head_dim, self._config
        x = self._x[way][window]
        inputs = rms_norm(x, trunk.attention_norms[number], config.norm_eps)
        ahead = inputs if number == 0 else self._ahead[way][window]
        scores = ahead @ layer.weight.T + layer.bias
        mixed = layer.share.mix(0, inputs, 0)
        columns = [slice(head * dim, (head + 1) * dim) for head in range(config.heads)]
        y = self._with_losses(way, window, layer, number, Kind.ATTENTION, inputs, mixed, weights.o, columns, scores)
        x = x + (y if trunk.o_bias is None else y + trunk.o_bias[number]) + self._arrived(way, window, 2 * number)
        inputs = rms_norm(x, trunk.ffn_norms[number], config.norm_eps)
        groups = [config.group_neurons(group) for group in range(config.groups)]
        columns = [slice(group.start, group.stop) for group in groups]
        inner = layer.share.activations(0, inputs)
        y = self._with_losses(way, window, layer, number, Kind.FFN, inputs, inner, weights.down, columns, scores)
        last = 2 * number + 1 if number + 1 < config.layers else LAST
        self._x[way][window] = (
            x + (y if trunk.down_bias is None else y + trunk.down_bias[number]) + self._arrived(way, window, last)
        )
        self._ahead[way][window] = inputs

    def _with_losses(self, way: int, window: int, layer: Layer, number: int, kind: Kind, inputs: torch.Tensor, inner: torch.Tensor,
                     out: torch.Tensor, columns: list[slice], scores: torch.Tensor) -> torch.Tensor:  # fmt: skip
        """The layer's output [T, D], some parts of it as they are filled in."""
        rule, y = self._ways[way], F.linear(inner, out)
        units = rule.units.get((kind, number))
        if not rule.units and way == 0:
            actual = torch.stack([(inner[:, own] @ out[:, own].T).norm(dim=-1) for own in columns], 1)[1:]
            predicted = self._scores_of(layer, kind, scores)[1:]
            self.judged[kind][window].append((rank_correlation(predicted, actual), recall_of_least(predicted, actual)))
        if not units:
            return y
        lost, lags = self._drawn(rule, window, number, kind, units, scores)
        if rule.price < np.inf:
            lost &= self._shares(layer, kind, units, scores) * (len(units) + 1) * layer.cost[kind] <= rule.price
        self.lost[way][0] += int(lost.sum())
        self.lost[way][1] += lost.numel()
        for unit, gone, lag in zip(units, lost.T, lags.T):
            if not gone.any():
                continue
            actual = sum(inner[:, columns[part]] @ out[:, columns[part]].T for part in unit)
            change = gone[:, None] * (actual - self._fill(rule.filled, layer, kind, unit, inputs, actual, gone))
            y = y - change
            for syncs in range(1, len(rule.lags) + 1):
                late = gone & (lag == syncs)
                if late.any():
                    self._late[way][window].append((2 * number + (kind == Kind.FFN) + syncs, change * late[:, None]))
        return y

    def _arrived(self, way: int, window: int, sync: int) -> torch.Tensor | float:
        """What the sums that come by the end of this sync change."""
        late = self._late[way][window]
        self._late[way][window] = [entry for entry in late if entry[0] > sync]
        return sum(change for due, change in late if due <= sync)

    def _shares(self, layer: Layer, kind: Kind, units: list, scores: torch.Tensor) -> torch.Tensor:
        """The units' predicted shares of a sync's |output|, [T, units]."""
        own = self._scores_of(layer, kind, scores).softmax(1)  # scores are log |output|
        return torch.stack([own[:, unit].sum(1) for unit in units], 1)

    def _scores_of(self, layer: Layer, kind: Kind, scores: torch.Tensor) -> torch.Tensor:
        groups = len(layer.estimates[Kind.FFN])
        return scores[:, :groups] if kind == Kind.FFN else scores[:, groups:]

    def _drawn(self, rule: Way, window: int, number: int, kind: Kind, units: list,
               scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """What is lost, bool [T, units], and how late it comes, int [T, units]."""
        draw = torch.Generator().manual_seed(self._seed + 1000003 * window + 1009 * number + kind)
        chance = torch.rand(len(scores), len(units), generator=draw)
        chance[0] = 1
        weights = torch.tensor(rule.lags or (1.0,))
        lags = 1 + torch.multinomial(weights, chance.numel(), replacement=True, generator=draw).view(chance.shape)
        if rule.chosen == "any":
            return chance < rule.lost, lags
        count = max(1, len(units) // LEAST)
        least = torch.zeros(chance.shape, dtype=torch.bool)
        if rule.chosen == "static":  # they are sorted
            least[:, -count:] = True
        else:
            least.scatter_(1, scores[:, : len(units)].topk(count, -1, largest=False)[1], True)
        return least & (chance < rule.lost * len(units) / count), lags

    def _fill(self, filled: str, layer: Layer, kind: Kind, unit: list[int], inputs: torch.Tensor, actual: torch.Tensor,
              gone: torch.Tensor) -> torch.Tensor | float:  # fmt: skip
        """What stands in for a unit's output at every token, [T, D]."""
        if filled == "zero":
            return 0.0
        came = (~gone).float()[:, None]
        if filled == "mean":
            return (actual * came).cumsum(0) / came.cumsum(0).clamp(min=1)
        error = actual - sum(apply(layer.estimates[kind][part], inputs) for part in unit)
        here = torch.arange(len(gone))
        last = torch.where(gone, 0, here).cummax(0)[0]
        memory = float(np.clip(np.mean([layer.memory[kind][part] for part in unit]), 0, 1)) ** (here - last)
        return actual - error + torch.where(last > 0, memory, 0.0)[:, None] * error[last]  # the first token is like no other

    def _losses(self, way: int) -> np.ndarray:
        found = []
        for ids, x in zip(self._ids, self._x[way]):
            last = rms_norm(x[:-1], self._trunk.final_norm, self._config.norm_eps)
            found.append(F.cross_entropy(F.linear(last, self._trunk.head), ids[1:], reduction="none").numpy())
        return np.concatenate(found)
