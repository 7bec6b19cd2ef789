"""What a kernel is: how a rank keeps the matrices of its share, and what multiplies with them.

    reference   f32 matrices, torch; exact but for rounding; any model
    torch       4-bit blocks and bf16, torch; inputs and results of products in bf16; any model
    llvm        4-bit and 8-bit tiles as they lie in the shards, code compiled for this processor; inputs of products in 8 bits
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np

from halo_mpi.model.layer_weights import Cache, LayerWeights
from halo_mpi.model.sizes import Shape, Sizes
from halo_mpi.store.layout import RecordLayout


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


@runtime_checkable
class OwnForm(Protocol):
    """A matrix that is neither an array nor tiles."""

    def write(self, rows: slice, columns: slice, layout: RecordLayout, record: np.ndarray, name: str, skipped: int = 0) -> None:
        """Write a matrix of a record, but for its first `skipped` rows, into a part of this one."""


@runtime_checkable
class Copied(OwnForm, Protocol):
    """One of a kernel that copies."""

    def write_from(self, rows: slice, columns: slice, other: "Copied", other_rows: slice, other_columns: slice) -> None:
        """Write a part of another one of the same kind into a part of this one."""


class Kernel(Protocol):
    """Of one model. `sizes`: what its matrices take; `threads`: that compute; `isa`: the instructions that it uses;
    `program_bytes`: what a rank takes beside weights and cache; `copies`: whether its matrices can be written from one another."""

    name: str
    isa: str
    sizes: Sizes
    threads: int
    program_bytes: int
    copies: bool

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
