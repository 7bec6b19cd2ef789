"""What shares of a model take in memory, before anything is loaded."""

from math import prod

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.records import VOCABULARY_BLOCK

Shapes = dict[str, tuple[int, ...]]  # of matrices, by name


def attention_shapes(config: ModelConfig, query_heads: list[int], biases: set[str] = frozenset()) -> Shapes:
    """What some query heads of a layer, and their KV heads, need. `biases`: names of the matrices that have one ("q", ...)."""
    kv_heads = len({head // config.heads_per_kv for head in query_heads})
    rows = (len(query_heads) + 2 * kv_heads) * config.head_dim
    shapes: Shapes = {"qkv": (rows, config.hidden), "o": (config.hidden, len(query_heads) * config.head_dim)}
    return shapes | ({"qkv_bias": (rows,)} if biases & {"q", "k", "v"} else {})


def ffn_shapes(config: ModelConfig, groups: list[int], biases: set[str] = frozenset()) -> Shapes:
    """What some FFN groups of a layer need."""
    neurons = sum(len(config.group_neurons(group)) for group in groups)
    shapes: Shapes = {"gate_up": (2 * neurons, config.hidden), "down": (config.hidden, neurons)}
    return shapes | ({"gate_up_bias": (2 * neurons,)} if biases & {"gate", "up"} else {})


def head_shapes(config: ModelConfig, block: int) -> Shapes:
    """What one block of the head needs."""
    return {"rows": (min(VOCABULARY_BLOCK, config.vocabulary - block * VOCABULARY_BLOCK), config.hidden)}


def shape_bytes(shapes: Shapes) -> int:
    """In f32."""
    return 4 * sum(map(prod, shapes.values()))


def part_shapes(
    config: ModelConfig, query_heads: list[list[int]], groups: list[list[int]], biases: set[str] = frozenset()
) -> list[Shapes]:
    """The parts of a share in the order in which a token needs them: a layer's attention, its FFN, the next layer's attention ..."""
    return [
        shapes
        for heads, own_groups in zip(query_heads, groups)
        for shapes in (attention_shapes(config, heads, biases), ffn_shapes(config, own_groups, biases))
    ]


def cache_bytes(config: ModelConfig, query_heads: list[list[int]], context: int) -> int:
    """The KV cache of a share's heads for `context` positions."""
    kv_heads = sum(len({head // config.heads_per_kv for head in heads}) for heads in query_heads)
    return 2 * 4 * kv_heads * context * config.head_dim


def layer_bytes(config: ModelConfig, query_heads: list[int], groups: list[int], context: int) -> int:
    """Some query heads and FFN groups of a layer, their cache for `context` positions included."""
    matrices = shape_bytes(attention_shapes(config, query_heads)) + shape_bytes(ffn_shapes(config, groups))
    return matrices + cache_bytes(config, [query_heads], context)


def trunk_bytes(config: ModelConfig) -> int:
    """What the root needs besides its share: embedding and head."""
    return 4 * config.hidden * config.vocabulary * (1 if config.tied else 2)
