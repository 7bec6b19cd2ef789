"""The matrices of a rank's share of one layer, whatever kernel multiplies with them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Cache = tuple[Any, Any]  # keys, values [KV heads, context, head_dim]


@dataclass(slots=True)
class LayerWeights:
    """Fused so that each step is one product. A matrix is whatever its kernel makes; None where there is no part of it.

    Kernels with tiles fill a head's rows up to a multiple of 16 with zeros, and its columns in o, and the neurons, to one of 32.
    `runs` lists (local KV head, first, last + 1 query head) for query heads that share a KV head.
    """

    qkv: Any = None  # [(query heads + 2 KV heads) * head_dim, D]
    qkv_bias: Any = None
    o: Any = None  # [D, query heads * head_dim]
    runs: list[tuple[int, int, int]] = ()
    gate_up: Any = None  # [2 neurons, D]
    gate_up_bias: Any = None
    down: Any = None  # [D, neurons]

    @property
    def nbytes(self) -> int:
        matrices = (self.qkv, self.qkv_bias, self.o, self.gate_up, self.gate_up_bias, self.down)
        return sum(matrix.nbytes for matrix in matrices if matrix is not None)


def runs_of(query_heads: list[int], heads_per_kv: int) -> tuple[list[int], list[tuple[int, int, int]]]:
    """The KV heads that these query heads (in ascending order) need, and the runs of local query heads that share one."""
    kv_heads = sorted({head // heads_per_kv for head in query_heads})
    of_head = np.array([head // heads_per_kv for head in query_heads])
    bounds = [np.searchsorted(of_head, (kv, kv + 1)) for kv in kv_heads]
    return kv_heads, [(local, int(first), int(last)) for local, (first, last) in enumerate(bounds)]
