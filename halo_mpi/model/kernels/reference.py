"""The reference: f32 matrices, multiplied by torch. Exact but for rounding, and slower than what the other kernels do with fewer bits."""

import numpy as np
import torch

from halo_mpi.model.llama import Cache, LayerWeights, Share


class ReferenceShare(Share):
    """A share that takes and gives NumPy arrays."""

    def attention(self, layer: int, x: np.ndarray, position: int) -> np.ndarray:
        """Partial sum of the own query heads, f32 [T, D], for the normed input x f32 [T, D]; appends K and V at `position`."""
        with torch.inference_mode():
            return super().attention(layer, torch.from_numpy(x), position).numpy()

    def append(
        self, layer: int, x: np.ndarray, position: int, coming: tuple[LayerWeights, Cache] | None = None
    ) -> None:
        """Only append K and V of the normed input x f32 [T, D] at `position`. `coming`: of the heads that the layer will have."""
        with torch.inference_mode():
            super().append(layer, torch.from_numpy(x), position, coming)

    def ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        """Partial sum of the own FFN neurons, f32 [T, D], for the normed input x f32 [T, D]."""
        with torch.inference_mode():
            return super().ffn(layer, torch.from_numpy(x)).numpy()
