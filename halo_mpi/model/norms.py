"""What only the root holds beside the vocabulary: norms, and the biases that are added once."""

from dataclasses import dataclass

import numpy as np

from halo_mpi.model.config import ModelConfig
from halo_mpi.store.reader import ModelStore


@dataclass(slots=True)
class Norms:
    """All f32."""

    attention: np.ndarray  # [layers, D]
    ffn: np.ndarray  # [layers, D]
    final: np.ndarray  # [D]
    o_bias: np.ndarray | None  # [layers, D]
    down_bias: np.ndarray | None  # [layers, D]


def load_norms(store: ModelStore, config: ModelConfig) -> Norms:
    """Read it from model.h5. Raises DamagedFileError."""
    layout = store.layout("layer")
    records = [store.read("layer", layer, 0) for layer in range(config.layers)]

    def vectors(name: str) -> np.ndarray | None:
        return np.concatenate([layout.unpack(record, name) for record in records]) if name in layout.parts else None

    final = store.layout("final").unpack(store.read("final", 0, 0), "norm")[0]
    return Norms(vectors("attention_norm"), vectors("ffn_norm"), final, vectors("o.bias"), vectors("down.bias"))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x f32 [T, D] divided by the root of its mean square, times weight [D] (arXiv 1910.07467)."""
    square = np.vecdot(x, x)[:, None] / np.float32(x.shape[1])
    return x / np.sqrt(square + np.float32(eps)) * weight
