"""What a kernel is: how a rank keeps the matrices of its share, and what multiplies with them.

    reference   f32 matrices, torch; exact but for rounding; any model
    llvm        4-bit and 8-bit tiles as they lie in the shards, code compiled for this processor; inputs of products in 8 bits
"""

from typing import Any, Protocol

import numpy as np

from halo_mpi.model.layer_weights import Cache, LayerWeights
from halo_mpi.model.sizes import Shape, Sizes


class Share(Protocol):
    """A rank's heads and neurons of every layer, with the KV cache of those heads; see model/llama.py.

    The cache holds `context` positions; a call at position p overwrites what was there from p on, so a new sequence
    begins at position 0 without a reset. `filled`: positions of the cache that were ever filled.
    """

    layers: list[LayerWeights]
    kv: list[Cache]
    context: int
    filled: int

    def empty_cache(self, kv_heads: int) -> Cache:
        """For so many KV heads of a layer."""

    def attention(self, layer: int, x: np.ndarray, position: int) -> np.ndarray:
        """Partial sum of the own query heads, f32 [T, D], for the normed input x f32 [T, D]; appends K and V at `position`.

        Valid until the next call.
        """

    def append(self, layer: int, x: np.ndarray, position: int, coming: tuple[LayerWeights, Cache] | None = None) -> None:
        """Only append K and V of the normed input x f32 [T, D] at `position`. `coming`: of the heads that the layer will have."""

    def ffn(self, layer: int, x: np.ndarray) -> np.ndarray:
        """Partial sum of the own FFN neurons, f32 [T, D], for the normed input x f32 [T, D]. Valid until the next call."""


class Head(Protocol):
    """A part of the vocabulary, by rows."""

    def logits(self, x: np.ndarray) -> np.ndarray:
        """f32 [T, rows] for the normed residual vectors x f32 [T, D]. Valid until the next call."""

    def part(self, start: int, stop: int) -> "Head":
        """Some of the rows, without copying them; `start` is at a tile, `stop` too or the end. A row's logit is the same, bit for bit."""

    def rows(self, tokens: list[int]) -> np.ndarray:
        """The residual vectors f32 [T, D] with which tokens begin."""


class Kernel(Protocol):
    """Of one model. `sizes`: what its matrices take; `threads`: that compute; `isa`: the instructions that it uses;
    `program_bytes`: what a rank takes beside weights and cache."""

    name: str
    isa: str
    sizes: Sizes
    threads: int
    program_bytes: int

    def prepare(self) -> None:
        """Compile whatever was not compiled before on this machine, which may take a minute."""

    def make(self, shape: Shape, memory: np.ndarray | None = None) -> Any:
        """A matrix without content: in memory of its own, or in the first bytes of `memory` (uint8, at a cache line)."""

    def norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """x f32 [T, D] divided by the root of its mean square, times weight [D]."""

    def share(self, layers: list[LayerWeights], context: int) -> Share:
        """With an empty cache."""

    def head(self, matrix: Any, rows: int) -> Head:
        """The first rows of a matrix [rows filled up, D]."""
