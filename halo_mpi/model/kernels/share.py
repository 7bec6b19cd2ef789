"""A rank's share computed by compiled kernels: model/llama.py's `Share` with quantized matrices, NumPy in and out.

Inputs of the products are rounded to 8 bits, 32 values to a scale. A row's result is the same, bit for bit, however many rows are
computed at once. Not for several threads at a time: they would share the buffers.
"""

import numpy as np

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.attend import STATE, TILE
from halo_mpi.model.kernels.compiled import products
from halo_mpi.model.kernels.layer import ROWS, parts
from halo_mpi.model.kernels.lookup import dequantized_rows
from halo_mpi.model.kernels.steps import ATTENTION, BUFFERS, FFN, MATRIX, WORK
from halo_mpi.model.kernels.team import Team
from halo_mpi.model.kernels.tiles import LINE, Tiles, aligned_bytes
from halo_mpi.model.kernels.vectors import BLOCK, LANES
from halo_mpi.model.layer_weights import Cache, LayerWeights
from halo_mpi.store.encoding import TILE_ROWS


class CompiledShare:
    """A rank's heads and neurons of every layer, with the KV cache of those heads; see model/llama.py.

    What is returned is valid until the next call of the same method. Inputs are f32, contiguous and writable.
    `cache_dtype`: np.float32 or np.float16.
    """

    def __init__(self, config: ModelConfig, layers: list[LayerWeights], context: int, cache_dtype: type = np.float32,
                 team: Team | None = None):  # fmt: skip
        self.config = config
        self.layers = layers
        self.context, self.filled = context, 0  # positions of the cache that were ever filled
        self._cache_dtype = np.dtype(cache_dtype)
        self.kv: list[Cache] = [self.empty_cache(len(layer.runs)) for layer in layers]
        self._angles = config.rotary_tables(context)  # cos, sin, f32 [context, head_dim / 2]
        self._attention: list[BoundAttention | None] = [None] * len(layers)
        self._ffn: list[BoundFfn | None] = [None] * len(layers)
        self.team, self._parts, self._hidden = team or Team(1), parts(), config.hidden
        self._work = Work(self.team)
        self._sums = Results(config.hidden), Results(config.hidden)  # of attention, of the FFN

    def empty_cache(self, kv_heads: int) -> Cache:
        """For so many KV heads of a layer."""
        shape = (kv_heads, self.context, self.config.head_dim)
        return np.zeros(shape, self._cache_dtype), np.zeros(shape, self._cache_dtype)

    def attention(self, layer: int, x: np.ndarray, position: int) -> np.ndarray:
        """Partial sum of the own query heads, [T, D], for the normed input x [T, D]; appends K and V at `position`."""
        weights, kv, bound = self.layers[layer], self.kv[layer], self._attention[layer]
        if bound is None or not bound.is_of(weights, kv):
            bound = self._attention[layer] = BoundAttention(weights, kv, self.config, self._angles, self._work)
        result = self._sums[0].of(len(x))
        self._fill(position, len(x))
        self.team.run(self._parts.attention, bound.address, self._work.address, x, position, result, self._hidden, self._hidden)
        return result

    def append(self, layer: int, x: np.ndarray, position: int, coming: tuple[LayerWeights, Cache] | None = None) -> None:
        """Only append K and V of the normed input x [T, D] at `position`. `coming`: of the heads that the layer will have."""
        weights, kv = coming or (self.layers[layer], self.kv[layer])
        bound = self._attention[layer]
        if bound is None or not bound.is_of(weights, kv):
            bound = BoundAttention(weights, kv, self.config, self._angles, self._work)
        self._fill(position, len(x))
        self.team.run(self._parts.append, bound.address, self._work.address, x, position, x, self._hidden, self._hidden)

    def ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        """Partial sum of the own FFN neurons, [T, D], for the normed input x [T, D]."""
        weights, bound = self.layers[layer], self._ffn[layer]
        if bound is None or not bound.is_of(weights):
            bound = self._ffn[layer] = BoundFfn(weights, self.config.hidden, self._work)
        result = self._sums[1].of(len(x))
        self.team.run(self._parts.ffn, bound.address, self._work.address, x, 0, result, self._hidden, self._hidden)
        return result

    def _fill(self, position: int, rows: int) -> None:
        """Positions are about to be written: the compiled code checks no bounds."""
        end = position + rows
        if not 0 <= position <= end <= self.context:
            raise ValueError(f"positions {position} to {end} of a cache of {self.context}")
        self.filled = max(self.filled, end)


class CompiledHead:
    """The vocabulary: a quantized matrix [V, D], as the head that scores tokens and as their embedding."""

    def __init__(self, tiles: Tiles, vocabulary: int, hidden: int, team: Team | None = None):
        self.tiles, self._vocabulary, self._hidden = tiles, vocabulary, hidden
        self._record = np.zeros(1, MATRIX)
        describe(self._record[0], tiles, None)
        self._team = team or Team(1)
        self._work = Work(self._team)
        self._work.reserve(inputs=tiles.shape[1])
        self._results = Results(tiles.shape[0], rows=8)

    def logits(self, x: np.ndarray) -> np.ndarray:
        """[T, V] for the normed residual vectors x [T, D]; valid until the next call."""
        result = self._results.of(len(x))
        data, work, made = self._record.ctypes.data, self._work.address, self.tiles.shape[0]
        self._team.run(parts().multiply_rows, data, work, x, self._hidden, result, self._hidden, made)
        return result[:, : self._vocabulary]

    def part(self, start: int, stop: int) -> "CompiledHead":
        """Some of the rows, whole tiles, where they are."""
        return CompiledHead(self.tiles.part(slice(start // TILE_ROWS, -(-stop // TILE_ROWS))), stop - start, self._hidden)

    def rows(self, tokens: list[int] | np.ndarray) -> np.ndarray:
        """The residual vectors [T, D] with which tokens begin."""
        return dequantized_rows(self.tiles, tokens, self._hidden)


class BoundAttention:
    """Addresses of a layer's attention and its cache; keeps what they point to alive."""

    def __init__(self, weights: LayerWeights, kv: Cache, config: ModelConfig, angles: Cache, work: "Work"):
        self._kv, self._qkv, self._bias, self._o, self._runs = kv, weights.qkv, weights.qkv_bias, weights.o, weights.runs
        self._numbers = np.array(weights.runs, np.int64).reshape(-1, 3)
        self.record = np.zeros(1, ATTENTION)
        self.address = self.record.ctypes.data
        record, (keys, values) = self.record[0], kv
        heads, kv_heads, (rows, hidden) = weights.runs[-1][2], len(weights.runs), weights.qkv.shape
        if keys.shape != values.shape or not keys.flags.c_contiguous or not values.flags.c_contiguous:
            raise ValueError("keys and values have to be contiguous and of one shape")
        first = rows // (heads + 2 * kv_heads) * heads
        describe(record["qkv"], weights.qkv, weights.qkv_bias)
        describe(record["kv"], weights.qkv.part(slice(first // 16, None)), weights.qkv_bias, first)
        describe(record["o"], weights.o, None)
        for name, array in dict(keys=keys, values=values, runs=self._numbers, cos=angles[0], sin=angles[1]).items():
            record[name] = array.ctypes.data
        sizes = dict(heads=heads, kv_heads=kv_heads, hidden=config.hidden, dim=config.head_dim, context=keys.shape[1])
        for name, size in (sizes | dict(half=keys.dtype == np.float16)).items():
            record[name] = size
        run = max(last - first for _, first, last in weights.runs)
        work.reserve(max(hidden, weights.o.shape[1]), rows, weights.o.shape[1], run, config.head_dim, weights.o.shape[0])

    def is_of(self, weights: LayerWeights, kv: Cache) -> bool:
        return (
            kv is self._kv
            and weights.qkv is self._qkv
            and weights.o is self._o
            and weights.runs is self._runs
            and weights.qkv_bias is self._bias
        )


class BoundFfn:
    """Addresses of a layer's FFN; keeps what they point to alive."""

    def __init__(self, weights: LayerWeights, hidden: int, work: "Work"):
        self._gate_up, self._bias, self._down = weights.gate_up, weights.gate_up_bias, weights.down
        self.record = np.zeros(1, FFN)
        self.address = self.record.ctypes.data
        describe(self.record[0]["gate_up"], weights.gate_up, weights.gate_up_bias)
        describe(self.record[0]["down"], weights.down, None)
        self.record[0]["hidden"] = hidden
        (rows, columns), (sums, neurons) = weights.gate_up.shape, weights.down.shape
        work.reserve(max(columns, neurons), rows, result=sums)

    def is_of(self, weights: LayerWeights) -> bool:
        return weights.gate_up is self._gate_up and weights.down is self._down and weights.gate_up_bias is self._bias


class Work:
    """Buffers for a chunk of rows, as wide as any layer needed so far."""

    def __init__(self, team: Team):
        self.record = np.zeros(1, WORK)
        self.address = self.record.ctypes.data
        self.record[0]["board"], self.record[0]["threads"] = team.board, team.threads
        self._team = team
        self._sizes = dict.fromkeys(BUFFERS, 0)
        self._memory: list[np.ndarray] = []

    def reserve(self, inputs: int, wide: int = 0, mixed: int = 0, run: int = 0, dim: int = 0, result: int = 0) -> None:
        """For so many inputs of a product, values of the widest one before the last, and so on, of each row."""
        scales = 4 * (inputs // BLOCK)
        tiles = 2 * TILE * (-(-dim // LANES) * LANES)
        # without heads, a block that `quantize_rows` fills up
        scratch = 4 * (TILE * max(run, 1) + STATE * ROWS * run + tiles)
        needed = dict(codes=inputs, scale=scales, total=scales, wide=4 * wide, mixed=4 * mixed, result=4 * result)
        needed = {name: ROWS * size for name, size in needed.items()} | dict(scratch=scratch)
        if all(needed[name] <= size for name, size in self._sizes.items()):
            return
        self._sizes = {name: -(-max(needed[name], size) // LINE) * LINE for name, size in self._sizes.items()}
        self._memory = [
            aligned_bytes(size * (self._team.threads if name == "scratch" else 1)) for name, size in self._sizes.items()
        ]
        self.record[0]["scratch_bytes"] = self._sizes["scratch"]
        for name, memory in zip(self._sizes, self._memory):
            self.record[0][name] = memory.ctypes.data


class Results:
    """Arrays f32 [T, columns] that are used again and again, up to a number of rows."""

    def __init__(self, columns: int, rows: int = ROWS):
        self._memory = aligned_bytes(4 * rows * columns).view(np.float32).reshape(rows, columns)
        self._views = [self._memory[:number] for number in range(rows + 1)]

    def of(self, rows: int) -> np.ndarray:
        return self._views[rows] if rows < len(self._views) else np.empty((rows, self._memory.shape[1]), np.float32)


def describe(record: np.void, tiles: Tiles, bias: np.ndarray | None, first: int = 0) -> None:
    """Write a matrix, and the bias from its `first` row on, into a record."""
    record["products"] = products().int8 if tiles.minimum is None else products().int4
    record["codes"], record["scale"] = tiles.codes.ctypes.data, tiles.scale.ctypes.data
    record["minimum"] = 0 if tiles.minimum is None else tiles.minimum.ctypes.data
    record["bias"] = 0 if bias is None else bias[first:].ctypes.data
    record["row_tiles"], record["column_tiles"] = tiles.codes.shape[:2]
