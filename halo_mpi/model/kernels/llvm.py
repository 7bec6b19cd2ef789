"""Compiled kernels: 4-bit and 8-bit tiles as they lie in the shards, and code made for this processor."""

import numpy as np

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.choice import PROGRAM_BYTES
from halo_mpi.model.kernels.compiled import products
from halo_mpi.model.kernels.normalize import normalize
from halo_mpi.model.kernels.share import CompiledHead, CompiledShare
from halo_mpi.model.kernels.team import Team
from halo_mpi.model.kernels.tiles import Tiles, aligned_bytes, tiles_across, tiles_down
from halo_mpi.model.layer_weights import LayerWeights
from halo_mpi.model.sizes import Shape, Sizes


COMPILED = ModelConfig("compiled", 1, 32, 1, 1, 16, 32, 32, 2, 1e-5, 10000.0, tied=True)  # the smallest that there is


class Compiled:
    """The kernel `llvm`. `dtype`: of the layers' weights, int4 or int8, `down_dtype`: of down if another; the vocabulary's are int8."""

    name, copies = "llvm", True
    program_bytes = PROGRAM_BYTES["llvm"]

    def __init__(self, config: ModelConfig, dtype: str, threads: int = 1, cache: str = "f32", down_dtype: str | None = None):
        self.sizes, self.isa, self._team = Sizes(config, dtype, "int8", cache, down_dtype), products().isa, Team(threads)
        self.threads = self._team.threads

    def prepare(self) -> None:
        """Call everything once, with next to nothing to do."""
        tiny = Compiled(COMPILED, self.sizes.dtype, self.threads, self.sizes.cache_dtype)
        shapes = tiny.sizes.attention([0]) | tiny.sizes.ffn([0])
        weights = LayerWeights(runs=[(0, 0, 1)], **{name: tiny.make(shape) for name, shape in shapes.items()})
        share, head = tiny.share([weights], 2), tiny.head(tiny.make(tiny.sizes.table()), 32)
        x = tiny.norm(head.rows([0]), np.ones(32, np.float32), 1e-5)
        share.append(0, x, 0)
        head.logits(share.attention(0, x, 1) + share.ffn(0, x))

    def make(self, shape: Shape, memory: np.ndarray | None = None) -> Tiles | np.ndarray:
        memory = aligned_bytes(shape.nbytes) if memory is None else memory[: shape.nbytes]
        if shape.dtype == "f32":
            return memory.view(np.float32).reshape(shape.dims)
        rows, columns = shape.dims
        return Tiles.of(memory, tiles_down(rows), tiles_across(columns), shape.dtype)

    def norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        return normalize(x, weight, eps)

    def share(self, layers: list[LayerWeights], context: int) -> CompiledShare:
        return CompiledShare(
            self.sizes.config, layers, context, np.float16 if self.sizes.cache_dtype == "f16" else np.float32, self._team
        )

    def head(self, matrix: Tiles, rows: int) -> CompiledHead:
        return CompiledHead(matrix, rows, self.sizes.config.hidden, self._team)
