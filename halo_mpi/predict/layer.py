"""The calibration of one layer: every token passes through it, moments are summed up, and all that is stored is fitted.

attention   x -> normed -> mixed (what the heads read) -> o     estimates of each head's output from `normed`
FFN         x -> normed -> activations -> down                  order of the neurons, then estimates of each group's output
importance  inputs of the layer before -> log |output| of each group and head of this one
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.llama import Share, Trunk, rms_norm
from halo_mpi.predict.fits import SINKS, Judged, LayerFit, LowRank
from halo_mpi.predict.judge import judge_estimates, judge_importance
from halo_mpi.predict.moments import Moments
from halo_mpi.predict.sorting import order_of, put_in_order
from halo_mpi.wire.exchange import add_up, broadcast

ESTIMATE_RIDGE, IMPORTANCE_RIDGE = 0.1, 0.05  # the prototypes'
LEAST_SQUARE = 1e-4  # of the median |output|^2: what is smaller counts no more
TINY = 1e-12
Pair = tuple[torch.Tensor, torch.Tensor]  # inputs [T, D] and what belongs to them [T, K], of a window


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's windows, in numbers: the first `held_out` are not fitted to but judge the fit; `for_order` decide the neurons' order."""

    held_out: int
    for_order: list[int]


@dataclass(slots=True)
class Walkers:
    """What a rank carries from layer to layer: the residual vectors of its windows, and what the importance is predicted from."""

    x: torch.Tensor  # f32 [W, T, D]
    ahead: torch.Tensor  # f16 [W, T, D], the FFN's normed inputs of the layer before; at first the embedding's
    part: Part


class LayerCalibration:
    """One layer, which `share` holds alone and whole. Collective; `unit`: neurons that stay together when they are sorted."""

    def __init__(self, comm, config: ModelConfig, share: Share, trunk: Trunk, layer: int, unit: int):
        self._comm, self._config, self._share, self._trunk, self._layer = comm, config, share, trunk, layer
        self._weights, self._unit = share.layers[0], unit
        dim = config.head_dim
        self._heads = [slice(head * dim, (head + 1) * dim) for head in range(config.heads)]
        groups = [config.group_neurons(group) for group in range(config.groups)]
        self._groups = [slice(group.start, group.stop) for group in groups]

    def run(self, walkers: Walkers, width: int) -> LayerFit | None:
        """Move the walkers through the layer; on the root, the fit, with estimates of rank `width`."""
        heads, head_sizes, heads_seen = self._attention(walkers)
        head_fits = self._estimates(heads, self._weights.o, self._heads, width)
        del heads  # the largest thing here, beside the FFN's
        order = self._sort(walkers)
        groups, importance, sizes, groups_seen, sizes_seen = self._ffn(walkers, head_sizes)
        group_fits = self._estimates(groups, self._weights.down, self._groups, width)
        importance.add_up(self._comm)
        add_up(self._comm, sizes.numpy())
        if self._comm.rank:
            return None
        fit = importance.solve(IMPORTANCE_RIDGE)
        weight, bias = fit.coefficients.T.contiguous(), fit.mean_z - fit.mean_x @ fit.coefficients
        judged = Judged(
            *judge_importance(sizes_seen, weight, bias, len(self._groups)),
            *judge_estimates(groups_seen, self._weights.down, self._groups, group_fits),
            *judge_estimates(heads_seen, self._weights.o, self._heads, head_fits),
        )
        shares = torch.cat([part / part.sum() for part in sizes.split((len(self._groups), len(self._heads)))])
        return LayerFit(order, group_fits, head_fits, weight.numpy(), bias.numpy(), shares.float().numpy(), judged)

    def _attention(self, walkers: Walkers) -> tuple[Moments, list[torch.Tensor], list[Pair]]:
        """Through the attention. Moments of what the heads read; the size of each head's output; and what is held out."""
        moments, sizes, seen = Moments(self._config.hidden, len(self._heads) * self._config.head_dim), [], []
        grams = grams_of(self._weights.o, self._heads)
        for window, x in enumerate(walkers.x):
            inputs = self._normed(x, self._trunk.attention_norms)
            if self._layer == 0:
                walkers.ahead[window] = inputs.half()
            mixed = self._share.mix(0, inputs, 0)
            weight = self._advance(x, mixed, self._weights.o, self._trunk.o_bias)
            sizes.append(norms(mixed, grams, self._heads))
            if window < walkers.part.held_out:
                seen.append((inputs[SINKS:], mixed[SINKS:]))
            else:
                moments.add(inputs[SINKS:], mixed[SINKS:], weight[SINKS:])
        return moments, sizes, seen

    def _ffn(self, walkers: Walkers,
             head_sizes: list[torch.Tensor]) -> tuple[Moments, Moments, torch.Tensor, list[Pair], list[Pair]]:  # fmt: skip
        """Through the FFN. Moments of the activations, and of log sizes from the layer before; sums of sizes; what is held out."""
        hidden, parts = self._config.hidden, len(self._groups) + len(self._heads)
        moments, importance = Moments(hidden, self._config.ffn), Moments(hidden, parts)
        sums, seen, sizes_seen = torch.zeros(parts, dtype=torch.float64), [], []
        grams = grams_of(self._weights.down, self._groups)
        for window, x in enumerate(walkers.x):
            inputs = self._normed(x, self._trunk.ffn_norms)
            activations = self._share.activations(0, inputs)
            weight = self._advance(x, activations, self._weights.down, self._trunk.down_bias)
            sizes = torch.cat((norms(activations, grams, self._groups), head_sizes[window]), 1)[SINKS:]
            ahead = walkers.ahead[window][SINKS:].float()
            if window < walkers.part.held_out:
                seen.append((inputs[SINKS:], activations[SINKS:]))
                sizes_seen.append((ahead, sizes))
            else:
                moments.add(inputs[SINKS:], activations[SINKS:], weight[SINKS:])
                importance.add(ahead, sizes.log())
                sums += sizes.sum(0)
            walkers.ahead[window] = inputs.half()
        return moments, importance, sums, seen, sizes_seen

    def _normed(self, x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, norm[self._layer], self._config.norm_eps)

    def _advance(self, x: torch.Tensor, inner: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Add out(inner) to a window's residual vectors x [T, D]; how much each token counts, [T].

        It is 1 / |output|^2, so that relative errors are what is made small: outputs differ a thousandfold.
        """
        y = F.linear(inner, out)
        x += y if bias is None else y + bias[self._layer]
        square = y.pow(2).sum(-1)
        return 1 / square.clamp(min=float(LEAST_SQUARE * square.median()) + TINY)

    def _estimates(self, moments: Moments, out: torch.Tensor, parts: list[slice], width: int) -> list[LowRank]:
        moments.add_up(self._comm)
        if self._comm.rank:
            return []
        fit = moments.solve(ESTIMATE_RIDGE)
        return [fit.low_rank(part, out[:, part], width) for part in parts]

    def _sort(self, walkers: Walkers) -> np.ndarray:
        """Find the order of the layer's neurons and put its weights in that order."""
        size = torch.zeros(self._config.ffn, dtype=torch.float64)
        for place in walkers.part.for_order:
            size += self._share.activations(0, self._normed(walkers.x[place], self._trunk.ffn_norms))[SINKS:].abs().sum(0)
        add_up(self._comm, size.numpy())
        importance = size * self._weights.down.norm(dim=0)
        order = np.array(broadcast(self._comm, order_of(importance.numpy(), self._unit).tolist(), patient=True))
        put_in_order(self._weights, order, self._unit)
        return order


def grams_of(out: torch.Tensor, parts: list[slice]) -> list[torch.Tensor]:
    """out' out of each part's columns."""
    return [out[:, part].T @ out[:, part] for part in parts]


def norms(inner: torch.Tensor, grams: list[torch.Tensor], parts: list[slice]) -> torch.Tensor:
    """|out[:, part] inner[:, part]| for each part and token, [T, parts], by way of out' out, which is smaller than out."""
    squares = [((inner[:, part] @ gram) * inner[:, part]).sum(-1) for part, gram in zip(parts, grams)]
    return torch.stack(squares, 1).clamp(min=TINY).sqrt()
