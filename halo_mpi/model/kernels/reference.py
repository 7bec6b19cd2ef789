"""The reference: f32 matrices, multiplied by torch. Exact but for rounding, and slower than what the other kernels do with fewer bits."""

import numpy as np
import torch
import torch.nn.functional as F

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.choice import PROGRAM_BYTES
from halo_mpi.model.layer_weights import Cache, LayerWeights
from halo_mpi.model.llama import Share
from halo_mpi.model.norms import rms_norm
from halo_mpi.model.sizes import Shape, Sizes


class Reference:
    """The kernel of this name."""

    name, isa, copies = "reference", "torch", True
    program_bytes = PROGRAM_BYTES["reference"]

    def __init__(self, config: ModelConfig, threads: int = 1, cache: str = "f32"):
        self.sizes, self.threads = Sizes(config, cache_dtype=cache), threads
        torch.set_num_threads(threads)

    def prepare(self) -> None:
        pass

    def make(self, shape: Shape, memory: np.ndarray | None = None) -> torch.Tensor:
        if memory is None:
            return torch.empty(shape.dims)
        return torch.from_numpy(memory[: shape.nbytes].view(np.float32).reshape(shape.dims))

    def norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        return rms_norm(x, weight, eps)

    def share(self, layers: list[LayerWeights], context: int) -> "ReferenceShare":
        return ReferenceShare(self.sizes.config, layers, context, torch.float16 if self.sizes.cache_dtype == "f16" else torch.float32)

    def head(self, matrix: torch.Tensor, rows: int) -> "ReferenceHead":
        return ReferenceHead(matrix[:rows])


class ReferenceShare(Share):
    """A share that takes and gives NumPy arrays."""

    def attention(self, layer: int, x: np.ndarray, position: int) -> np.ndarray:
        with torch.inference_mode():
            return super().attention(layer, torch.from_numpy(x), position).numpy()

    def append(self, layer: int, x: np.ndarray, position: int, coming: tuple[LayerWeights, Cache] | None = None) -> None:
        with torch.inference_mode():
            super().append(layer, torch.from_numpy(x), position, coming)

    def ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return super().ffn(layer, torch.from_numpy(x)).numpy()


class ReferenceHead:
    def __init__(self, matrix: torch.Tensor):
        self._matrix = matrix

    def logits(self, x: np.ndarray) -> np.ndarray:
        return F.linear(torch.from_numpy(x), self._matrix).numpy()

    def part(self, start: int, stop: int) -> "ReferenceHead":
        return ReferenceHead(self._matrix[start:stop])

    def rows(self, tokens: list[int]) -> np.ndarray:
        return self._matrix[tokens].numpy()
