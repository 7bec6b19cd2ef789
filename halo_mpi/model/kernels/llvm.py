"""Compiled kernels: 4-bit and 8-bit tiles as they lie in the shards, and code made for this processor."""

import numpy as np

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.compiled import products
from halo_mpi.model.kernels.share import CompiledHead, CompiledShare
from halo_mpi.model.kernels.tiles import Tiles, aligned_bytes, tiles_across, tiles_down
from halo_mpi.model.layer_weights import LayerWeights
from halo_mpi.model.sizes import Shape, Sizes


class Compiled:
    """The kernel `llvm`. `dtype`: of the layers' weights, int4 or int8; the vocabulary's are int8."""

    name = "llvm"

    def __init__(self, config: ModelConfig, dtype: str, threads: int = 1):
        self.sizes, self.threads, self.isa = Sizes(config, dtype, "int8"), threads, products().isa

    def make(self, shape: Shape, memory: np.ndarray | None = None) -> Tiles | np.ndarray:
        memory = aligned_bytes(shape.nbytes) if memory is None else memory[: shape.nbytes]
        if shape.dtype == "f32":
            return memory.view(np.float32).reshape(shape.dims)
        rows, columns = shape.dims
        return Tiles.of(memory, tiles_down(rows), tiles_across(columns), shape.dtype)

    def share(self, layers: list[LayerWeights], context: int) -> CompiledShare:
        return CompiledShare(self.sizes.config, layers, context)

    def head(self, matrix: Tiles, rows: int) -> CompiledHead:
        return CompiledHead(matrix, rows, self.sizes.config.hidden)
