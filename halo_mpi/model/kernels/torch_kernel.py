"""The kernel `torch`: what a rank uses that cannot compile. 4-bit blocks are multiplied as they are, everything else in bf16."""

import numpy as np
import torch

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.reference import Reference, ReferenceShare
from halo_mpi.model.kernels.tiles import aligned_bytes
from halo_mpi.model.kernels.torch_matrices import Halves, Packed, can_pack
from halo_mpi.model.layer_weights import LayerWeights
from halo_mpi.model.sizes import Shape, Sizes
from halo_mpi.store.encoding import BLOCK


class TorchKernel(Reference):
    """`dtype`, `down_dtype`: in which the layers' weights are stored."""

    name = "torch"

    def __init__(self, config: ModelConfig, dtype: str, threads: int = 1, cache: str = "f16", down_dtype: str | None = None):
        super().__init__(config, threads, cache)
        packs = can_pack() and config.head_dim % BLOCK == 0 and config.hidden % BLOCK == 0
        kept, down = ("int4" if packs and stored == "int4" else "bf16" for stored in (dtype, down_dtype or dtype))
        self.sizes = Sizes(config, kept, "bf16", cache, down)
        self.copies = "int4" not in (kept, down)
        self.isa = torch.backends.cpu.get_cpu_capability()

    def make(self, shape: Shape, memory: np.ndarray | None = None) -> torch.Tensor | Halves | Packed:
        if shape.dtype == "f32":
            return super().make(shape, memory)
        memory = aligned_bytes(shape.nbytes) if memory is None else memory[: shape.nbytes]
        if shape.dtype == "int4":
            return Packed(memory, *shape.dims)
        return Halves(torch.from_numpy(memory).view(torch.bfloat16).view(shape.dims))

    def share(self, layers: list[LayerWeights], context: int) -> "TorchShare":
        return TorchShare(self.sizes.config, layers, context, torch.float16 if self.sizes.cache_dtype == "f16" else torch.float32)

    def head(self, matrix: Halves, rows: int) -> "TorchHead":
        return TorchHead(matrix.part(0, rows))


class TorchShare(ReferenceShare):
    def product(self, x: torch.Tensor, matrix: Halves | Packed, bias: torch.Tensor | None = None, first: int = 0) -> torch.Tensor:
        y = matrix.product(x, first)
        return y if bias is None else y + bias


class TorchHead:
    def __init__(self, matrix: Halves):
        self._matrix = matrix

    def logits(self, x: np.ndarray) -> np.ndarray:
        return self._matrix.product(torch.from_numpy(x)).numpy()

    def part(self, start: int, stop: int) -> "TorchHead":
        return TorchHead(self._matrix.part(start, stop))

    def rows(self, tokens: list[int]) -> np.ndarray:
        return self._matrix.values[tokens].float().numpy()
