"""The mathematics of a share of a LLaMA: what some query heads and some FFN neurons add to the residual stream.

A layer's output is the sum of its heads' and its neurons' contributions, so any set of them computes a partial sum:

    attention:  x -> sum over own heads of  o_h softmax(rotate(q_h x) . K) V      [T, D] -> [T, D]
    FFN:        x -> down[:, own] (silu(gate[own] x) * up[own] x)                 [T, D] -> [T, D]

T tokens at positions p .. p+T-1, D = hidden, x already normalized. Everything is f32. Source: arXiv 2302.13971.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.layer_weights import Cache, LayerWeights


class Share:
    """A rank's heads and neurons of every layer, with the KV cache of those heads.

    The cache holds `context` positions; a call at position p overwrites what was there from p on, so a new sequence
    begins at position 0 without a reset. `cache_dtype`: f32, or f16.
    """

    def __init__(self, config: ModelConfig, layers: list[LayerWeights], context: int, cache_dtype: torch.dtype = torch.float32):
        self.config = config
        self.layers, self._cache_dtype = layers, cache_dtype
        self.context, self.filled = context, 0  # positions of the cache that were ever filled
        self.kv: list[Cache] = [self.empty_cache(len(layer.runs)) for layer in layers]
        cos, sin = config.rotary_tables(context)
        self._cos, self._sin = torch.from_numpy(cos), torch.from_numpy(sin)  # [context, head_dim / 2]

    def empty_cache(self, kv_heads: int) -> Cache:
        """For so many KV heads of a layer."""
        shape = (kv_heads, self.context, self.config.head_dim)
        return torch.zeros(shape, dtype=self._cache_dtype), torch.zeros(shape, dtype=self._cache_dtype)

    def attention(self, layer: int, x: torch.Tensor, position: int) -> torch.Tensor:
        """Partial sum of the own query heads, [T, D], for the normed input x [T, D]; appends K and V at `position`."""
        return self.product(self.mix(layer, x, position), self.layers[layer].o)

    def mix(self, layer: int, x: torch.Tensor, position: int) -> torch.Tensor:
        """What the own query heads read, before o: [T, heads * head_dim], for the normed input x [T, D]; appends K and V."""
        weights, (keys, values) = self.layers[layer], self.kv[layer]
        tokens, dim, end = len(x), self.config.head_dim, position + len(x)
        kv_heads = len(weights.runs)
        self.filled = max(self.filled, end)
        qkv = self.product(x, weights.qkv, weights.qkv_bias).view(tokens, -1, dim).transpose(0, 1)  # [heads, T, dim]
        heads = len(qkv) - 2 * kv_heads
        rotated = self._rotate(qkv[: heads + kv_heads], position)
        keys[:, position:end] = rotated[heads:]
        values[:, position:end] = qkv[heads + kv_heads :]
        mixed = torch.empty(heads, tokens, dim)
        for kv, first, last in weights.runs:
            scores = rotated[first:last] @ keys[kv, :end].float().T * dim**-0.5  # [run, T, end]
            if tokens > 1:
                scores += torch.full((tokens, end), -torch.inf).triu(position + 1)
            mixed[first:last] = torch.softmax(scores, -1) @ values[kv, :end].float()
        return mixed.transpose(0, 1).reshape(tokens, -1)

    def append(self, layer: int, x: torch.Tensor, position: int, coming: tuple[LayerWeights, Cache] | None = None) -> None:
        """Only append K and V of the normed input x [T, D] at `position`. `coming`: of the heads that the layer will have."""
        weights, (keys, values) = coming or (self.layers[layer], self.kv[layer])
        tokens, dim, end = len(x), self.config.head_dim, position + len(x)
        kv_heads = len(weights.runs)
        self.filled = max(self.filled, end)
        first = weights.qkv.shape[0] - 2 * kv_heads * dim
        bias = None if weights.qkv_bias is None else weights.qkv_bias[first:]
        kv = self.product(x, weights.qkv, bias, first).view(tokens, -1, dim).transpose(0, 1)  # [heads, T, dim]
        keys[:, position:end] = self._rotate(kv[:kv_heads], position)
        values[:, position:end] = kv[kv_heads:]

    def ffn(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Partial sum of the own FFN neurons, [T, D], for the normed input x [T, D]."""
        return self.product(self.activations(layer, x), self.layers[layer].down)

    def activations(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """What the own FFN neurons say, before down: [T, neurons], for the normed input x [T, D]."""
        weights = self.layers[layer]
        gate, up = self.product(x, weights.gate_up, weights.gate_up_bias).chunk(2, -1)
        return F.silu(gate) * up

    def product(self, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None, first: int = 0) -> torch.Tensor:
        """[T, rows] for x [T, columns], by a matrix's rows from `first` on."""
        return F.linear(x, matrix[first:], bias)

    def _rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """Rotary embedding of [heads, T, dim], pairing value i with value i + dim / 2 as Hugging Face does."""
        cos, sin = (table[position : position + x.shape[1]] for table in (self._cos, self._sin))
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


@dataclass(slots=True)
class Trunk:
    """Vocabulary, norms, and the biases that are added once."""

    embedding: torch.Tensor  # [V, D]
    head: torch.Tensor  # [V, D], the same tensor if tied
    attention_norms: torch.Tensor  # [layers, D]
    ffn_norms: torch.Tensor  # [layers, D]
    final_norm: torch.Tensor  # [D]
    o_bias: torch.Tensor | None  # [layers, D]
    down_bias: torch.Tensor | None  # [layers, D]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, D] divided by the root of its mean square, times weight [D] (arXiv 1910.07467)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
