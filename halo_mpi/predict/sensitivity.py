"""What it costs the text if a part of one layer is missing: the increase of the loss, layer by layer.

All variants walk together, so that each layer's weights are read once: variant (l, kind) is exact up to layer l, lacks a fifth
of that layer's FFN groups or heads, drawn for each token, and is exact after it.
"""

import numpy as np
import torch
import torch.nn.functional as F

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.llama import Share, Trunk, rms_norm

MISSING = 0.2


class Variants:
    """The residual vectors of some windows, exact and of every variant so far. Memory: 4 T D bytes for each and window."""

    def __init__(self, config: ModelConfig, trunk: Trunk, windows: dict[int, np.ndarray]):
        """`windows`: token ids [T] by number, which decides what is drawn for it."""
        self._config, self._trunk = config, trunk
        self._ids = [torch.from_numpy(window).long() for window in windows.values()]
        self._x = [[trunk.embedding[ids]] for ids in self._ids]  # per window: exact, then two a layer
        self._draws = [torch.Generator().manual_seed(number) for number in windows]

    def pass_layer(self, share: Share, layer: int) -> None:
        """Through a layer that `share` holds alone and whole."""
        weights, config = share.layers[0], self._config
        for variants, draw in zip(self._x, self._draws):
            exact = variants[0]
            for index, x in enumerate(variants):
                inputs = rms_norm(x, self._trunk.attention_norms[layer], config.norm_eps)
                mixed = share.mix(0, inputs, 0)
                if index == 0:
                    lacking = exact + self._out(self._without(mixed, config.head_dim, draw), weights.o, self._trunk.o_bias, layer)
                variants[index] = x + self._out(mixed, weights.o, self._trunk.o_bias, layer)
            variants.append(lacking)
            exact = variants[0]
            for index, x in enumerate(variants):
                activations = share.activations(0, rms_norm(x, self._trunk.ffn_norms[layer], config.norm_eps))
                if index == 0:
                    part = self._without(activations, config.group_size, draw)
                    lacking = exact + self._out(part, weights.down, self._trunk.down_bias, layer)
                variants[index] = x + self._out(activations, weights.down, self._trunk.down_bias, layer)
            variants.append(lacking)

    def losses(self) -> np.ndarray:
        """Sums over this rank's tokens, in nats: the exact loss, then (attention, FFN) of each layer; and the tokens."""
        sums = np.zeros(2 * self._config.layers + 2)
        for ids, variants in zip(self._ids, self._x):
            for index, x in enumerate(variants):
                last = rms_norm(x[:-1], self._trunk.final_norm, self._config.norm_eps)
                sums[index] += float(F.cross_entropy(F.linear(last, self._trunk.head), ids[1:], reduction="sum"))
            sums[-1] += len(ids) - 1
        return sums

    def _without(self, inner: torch.Tensor, unit: int, draw: torch.Generator) -> torch.Tensor:
        """A fifth of the units of each token set to zero; but for the first token, whose loss all others would share."""
        units = -(-inner.shape[1] // unit)
        kept = torch.rand(len(inner), units, generator=draw) >= MISSING
        kept[0] = True
        return inner * kept.repeat_interleave(unit, 1)[:, : inner.shape[1]]

    def _out(self, inner: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None, layer: int) -> torch.Tensor:
        y = F.linear(inner, out)
        return y if bias is None else y + bias[layer]
