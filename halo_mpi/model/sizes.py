"""What shares of a model take in memory, before anything is loaded: in f32, in bf16, or in the tiles that compiled kernels read."""

from collections.abc import Set
from dataclasses import dataclass
from math import prod

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.tiles import Tiles, tiles_across, tiles_down
from halo_mpi.model.records import VOCABULARY_BLOCK
from halo_mpi.store.encoding import BLOCK, TILE_ROWS

PLAIN = {"f32": 4, "bf16": 2}  # bytes of a weight that is not in tiles


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a matrix (or, in f32, a vector) in memory. `dtype`: f32, bf16, int4 or int8."""

    dims: tuple[int, ...]
    dtype: str = "f32"

    @property
    def nbytes(self) -> int:
        if self.dtype in PLAIN:
            return PLAIN[self.dtype] * prod(self.dims)
        rows, columns = self.dims
        return Tiles.bytes_of(tiles_down(rows), tiles_across(columns), self.dtype)


Shapes = dict[str, Shape]  # of matrices, by name


def shape_bytes(shapes: Shapes) -> int:
    return sum(shape.nbytes for shape in shapes.values())


@dataclass(frozen=True, slots=True)
class Sizes:
    """`dtype`, `vocabulary_dtype`, `down_dtype`: of matrices in memory, of the FFN's last one if it has another than the other layers'
    matrices; `cache_dtype`: f32 or f16, of the KV cache."""

    config: ModelConfig
    dtype: str = "f32"
    vocabulary_dtype: str = "f32"
    cache_dtype: str = "f32"
    down_dtype: str | None = None

    @property
    def head_rows(self) -> int:
        """What a head takes in qkv."""
        return self._filled_up(self.config.head_dim, TILE_ROWS)

    @property
    def head_columns(self) -> int:
        """What a head takes in o."""
        return self._filled_up(self.config.head_dim, BLOCK)

    def dtype_of(self, name: str) -> str:
        """Of a layer's matrix: q, k, v, o, gate, up or down."""
        return self.down_dtype or self.dtype if name == "down" else self.dtype

    def neurons(self, group: int) -> int:
        return len(self.config.group_neurons(group)) if self.dtype in PLAIN else self.config.group_size

    def attention(self, query_heads: list[int], biases: Set[str] = frozenset()) -> Shapes:
        """What some query heads of a layer, and their KV heads, need. `biases`: names of the matrices that have one ("q", ...)."""
        kv_heads = len({head // self.config.heads_per_kv for head in query_heads})
        rows, hidden = (len(query_heads) + 2 * kv_heads) * self.head_rows, self.config.hidden
        shapes = {
            "qkv": Shape((rows, hidden), self.dtype),
            "o": Shape((hidden, len(query_heads) * self.head_columns), self.dtype),
        }
        return shapes | ({"qkv_bias": Shape((rows,))} if biases & {"q", "k", "v"} else {})

    def query_bytes(self) -> int:
        """Of one query head of a layer, without its KV head."""
        hidden = self.config.hidden
        return Shape((self.head_rows, hidden), self.dtype).nbytes + Shape((hidden, self.head_columns), self.dtype).nbytes

    def ffn(self, groups: list[int], biases: Set[str] = frozenset()) -> Shapes:
        """What some FFN groups of a layer need."""
        neurons, hidden = sum(map(self.neurons, groups)), self.config.hidden
        down = Shape((hidden, neurons), self.dtype_of("down"))
        shapes = {"gate_up": Shape((2 * neurons, hidden), self.dtype), "down": down}
        return shapes | ({"gate_up_bias": Shape((2 * neurons,))} if biases & {"gate", "up"} else {})

    def head(self, block: int) -> Shapes:
        """What one block of the head needs."""
        return self.scores(min(VOCABULARY_BLOCK, self.config.vocabulary - block * VOCABULARY_BLOCK))

    def scores(self, rows: int) -> Shapes:
        """What so many rows of the head need."""
        return {"rows": Shape((rows, self.config.hidden), self.vocabulary_dtype)}

    def table(self) -> Shape:
        """The embedding, or the head."""
        return Shape((self.config.vocabulary, self.config.hidden), self.vocabulary_dtype)

    def parts(self, query_heads: list[list[int]], groups: list[list[int]], biases: Set[str] = frozenset()) -> list[Shapes]:
        """The parts of a share in the order in which a token needs them: a layer's attention, its FFN, the next layer's attention ..."""
        return [
            shapes
            for heads, own_groups in zip(query_heads, groups)
            for shapes in (self.attention(heads, biases), self.ffn(own_groups, biases))
        ]

    def cache_bytes(self, query_heads: list[list[int]], context: int) -> int:
        """The KV cache of a share's heads for `context` positions."""
        kv_heads = sum(len({head // self.config.heads_per_kv for head in heads}) for heads in query_heads)
        return 2 * (2 if self.cache_dtype == "f16" else 4) * kv_heads * context * self.config.head_dim

    def layer_bytes(self, query_heads: list[int], groups: list[int], context: int) -> int:
        """Some query heads and FFN groups of a layer, their cache for `context` positions included."""
        matrices = shape_bytes(self.attention(query_heads)) + shape_bytes(self.ffn(groups))
        return matrices + self.cache_bytes([query_heads], context)

    def vocabulary_bytes(self) -> int:
        """What the root needs besides its share: embedding and head."""
        return self.table().nbytes * (1 if self.config.tied else 2)

    def _filled_up(self, count: int, unit: int) -> int:
        return count if self.dtype in PLAIN else -(-count // unit) * unit
