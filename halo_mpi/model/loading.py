"""From records to the fused f32 matrices that a rank computes with; only the records of its own share are read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import torch

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.llama import LayerWeights, Trunk, runs_of
from halo_mpi.model.records import VOCABULARY_BLOCK, vocabulary_blocks
from halo_mpi.model.sizes import Shapes, head_shapes, part_shapes
from halo_mpi.store.reader import ModelStore


@dataclass(slots=True)
class HeadBlock:
    """Some neighbouring rows of the head."""

    rows: torch.Tensor  # [rows, D]


@dataclass(frozen=True, slots=True)
class Part:
    """What is read at once: matrices of `owner`, their shapes by name, and what reads them into the room that `owner` has."""

    owner: LayerWeights | HeadBlock
    shapes: Shapes
    read: Callable[[], None]

    def make_room(self, memory: torch.Tensor | None = None) -> None:
        """Give the owner matrices of these shapes: in memory of their own, or one after the other in `memory`, f32 [their size]."""
        for name, shape in self.shapes.items():
            if memory is None:
                matrix = torch.empty(shape)
            else:
                matrix, memory = memory[: prod(shape)].view(shape), memory[prod(shape) :]
            setattr(self.owner, name, matrix)


def share_parts(
    store: ModelStore, config: ModelConfig, query_heads: list[list[int]], groups: list[list[int]]
) -> tuple[list[LayerWeights], list[Part]]:
    """The layers of a share, without room yet, and what they are read in: attention of layer 0, its FFN, attention of layer 1 ..."""
    none, shapes = torch.empty(0), part_shapes(config, query_heads, groups, set(store.meta["biases"]))
    layers = [LayerWeights(none, None, none, runs_of(own, config.heads_per_kv)[1], none, None, none) for own in query_heads]
    parts = []
    for layer, (weights, heads, own) in enumerate(zip(layers, query_heads, groups)):
        parts.append(Part(weights, shapes[2 * layer], partial(read_attention, store, config, layer, heads, weights)))
        parts.append(Part(weights, shapes[2 * layer + 1], partial(read_ffn, store, config, layer, own, weights)))
    return layers, parts


def head_parts(store: ModelStore, config: ModelConfig) -> tuple[list[HeadBlock], list[Part]]:
    """The head, cut as it is stored; without room yet."""
    blocks = [HeadBlock(torch.empty(0)) for _ in range(vocabulary_blocks(config))]
    return blocks, [
        Part(block, head_shapes(config, number), partial(read_head, store, config, number, block))
        for number, block in enumerate(blocks)
    ]


def load_layer(store: ModelStore, config: ModelConfig, layer: int, query_heads: list[int], groups: list[int]) -> LayerWeights:
    """Read the records of some query heads (ascending), their KV heads and some FFN groups of one layer.

    Raises InputError if one is on no shard here, DamagedFileError if its checksum differs.
    """
    everywhere = [[]] * layer
    layers, parts = share_parts(store, config, [*everywhere, query_heads], [*everywhere, groups])
    for part in parts[-2:]:
        part.make_room()
        part.read()
    return layers[-1]


def read_attention(store: ModelStore, config: ModelConfig, layer: int, query_heads: list[int], weights: LayerWeights) -> None:
    """Read query heads (ascending) and their KV heads into the room that the weights have for them."""
    dim, biased = config.head_dim, set(store.meta["biases"])
    kv_heads, _ = runs_of(query_heads, config.heads_per_kv)
    heads, keys = len(query_heads), len(kv_heads)
    qkv, o = weights.qkv.numpy(), weights.o.numpy()  # NumPy copies in this thread alone
    bias = None if weights.qkv_bias is None else weights.qkv_bias.numpy()
    if bias is not None:
        bias[:] = 0

    def place(table: str, entry: int, rows: dict[str, int]) -> None:
        """Copy matrices of a record to blocks of rows of qkv, counted in heads."""
        record, layout = store.read(table, layer, entry), store.layout(table)
        for name, block in rows.items():
            own = slice(block * dim, (block + 1) * dim)
            qkv[own] = layout.unpack(record, name)
            if name in biased:
                bias[own] = layout.unpack(record, f"{name}.bias")[0]
        if table == "query":
            o[:, own] = layout.unpack(record, "o")

    for local, head in enumerate(query_heads):
        place("query", head, {"q": local})
    for local, head in enumerate(kv_heads):
        place("kv", head, {"k": heads + local, "v": heads + keys + local})


def read_ffn(store: ModelStore, config: ModelConfig, layer: int, groups: list[int], weights: LayerWeights) -> None:
    """Read FFN groups into the room that the weights have for them."""
    biased = set(store.meta["biases"])
    gate_up, down, start = weights.gate_up.numpy(), weights.down.numpy(), 0
    bias = None if weights.gate_up_bias is None else weights.gate_up_bias.numpy()
    if bias is not None:
        bias[:] = 0
    for group in groups:
        record, layout, neurons = store.read("ffn", layer, group), store.layout("ffn"), len(config.group_neurons(group))
        for name, offset in (("gate", 0), ("up", len(gate_up) // 2)):
            own = slice(offset + start, offset + start + neurons)
            gate_up[own] = layout.unpack(record, name)[:neurons]
            if name in biased:
                bias[own] = layout.unpack(record, f"{name}.bias")[0, :neurons]
        down[:, start : start + neurons] = layout.unpack(record, "down")[:, :neurons]
        start += neurons


def read_vocabulary(store: ModelStore, config: ModelConfig, table: str, block: int) -> np.ndarray:
    """The rows of one block of the embedding or the head, f32 [rows, D]."""
    rows = store.layout(table).unpack(store.read(table, 0, block), "rows")
    return rows[: config.vocabulary - block * VOCABULARY_BLOCK]


def read_head(store: ModelStore, config: ModelConfig, number: int, block: HeadBlock) -> None:
    """Read one block of the head into the room that it has."""
    block.rows.numpy()[:] = read_vocabulary(store, config, "embedding" if config.tied else "head", number)


def load_trunk(store: ModelStore, config: ModelConfig, vocabulary: bool = True) -> Trunk:
    """Read norms, and embedding and head unless they are to be read at every token, from model.h5."""

    def whole(table: str) -> torch.Tensor:
        matrix = torch.empty(config.vocabulary if vocabulary else 0, config.hidden)
        for block in range(vocabulary_blocks(config) if vocabulary else 0):
            matrix.numpy()[block * VOCABULARY_BLOCK : (block + 1) * VOCABULARY_BLOCK] = read_vocabulary(
                store, config, table, block
            )
        return matrix

    layout = store.layout("layer")
    records = [store.read("layer", layer, 0) for layer in range(config.layers)]

    def vectors(name: str) -> torch.Tensor | None:
        if name not in layout.parts:
            return None
        return torch.cat([torch.from_numpy(layout.unpack(record, name)) for record in records])

    embedding = whole("embedding")
    return Trunk(
        embedding=embedding,
        head=embedding if config.tied else whole("head"),
        attention_norms=vectors("attention_norm"),
        ffn_norms=vectors("ffn_norm"),
        final_norm=torch.from_numpy(store.layout("final").unpack(store.read("final", 0, 0), "norm"))[0],
        o_bias=vectors("o.bias"),
        down_bias=vectors("down.bias"),
    )
