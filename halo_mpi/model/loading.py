"""From records to the fused f32 matrices that a rank computes with; only the records of its own share are read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import torch

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.llama import LayerWeights, Trunk, runs_of
from halo_mpi.model.norms import load_norms
from halo_mpi.model.records import VOCABULARY_BLOCK, vocabulary_blocks
from halo_mpi.model.sizes import Shapes, attention_shapes, ffn_shapes, head_shapes
from halo_mpi.store.reader import ModelStore


@dataclass(slots=True)
class HeadBlock:
    """Some neighbouring rows of the head."""

    rows: torch.Tensor  # [rows, D]


@dataclass(frozen=True, slots=True)
class Part:
    """What is read at once: matrices of `owner`, their shapes by name, and what reads them into the room that `owner` has."""

    owner: LayerWeights | HeadBlock | None
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


@dataclass(frozen=True, slots=True)
class Held:
    """What is in memory already of some heads (ascending) and groups of a layer, and need not be read."""

    weights: LayerWeights
    heads: list[int]
    groups: list[int]


NOTHING = Held(LayerWeights.empty(), [], [])


def share_parts(
    store: ModelStore, config: ModelConfig, query_heads: list[list[int]], groups: list[list[int]]
) -> tuple[list[LayerWeights], list[Part]]:
    """The layers of a share, without room yet, and what they are read in: attention of layer 0, its FFN, attention of layer 1 ..."""
    layers = [LayerWeights.empty() for _ in query_heads]
    parts = [
        part
        for layer, (weights, heads, own) in enumerate(zip(layers, query_heads, groups))
        for part in (attention_part(store, config, layer, heads, weights), ffn_part(store, config, layer, own, weights))
    ]
    return layers, parts


def attention_part(
    store: ModelStore, config: ModelConfig, layer: int, query_heads: list[int], weights: LayerWeights, held: Held = NOTHING
) -> Part:
    """What reads query heads (ascending) of a layer, and their KV heads, into `weights`."""
    weights.runs = runs_of(query_heads, config.heads_per_kv)[1]
    shapes = attention_shapes(config, query_heads, set(store.meta["biases"]))
    return Part(weights, shapes, partial(read_attention, store, config, layer, query_heads, weights, held))


def ffn_part(
    store: ModelStore, config: ModelConfig, layer: int, groups: list[int], weights: LayerWeights, held: Held = NOTHING
) -> Part:
    """What reads FFN groups of a layer into `weights`."""
    shapes = ffn_shapes(config, groups, set(store.meta["biases"]))
    return Part(weights, shapes, partial(read_ffn, store, config, layer, groups, weights, held))


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


def read_attention(
    store: ModelStore, config: ModelConfig, layer: int, query_heads: list[int], weights: LayerWeights, held: Held = NOTHING
) -> None:
    """Read query heads (ascending) and their KV heads into the room that the weights have for them."""
    dim, biased = config.head_dim, set(store.meta["biases"])
    qkv, o = weights.qkv.numpy(), weights.o.numpy()  # NumPy copies in this thread alone
    bias = None if weights.qkv_bias is None else weights.qkv_bias.numpy()
    if bias is not None:
        bias[:] = 0
    here = _blocks_of(config, held.heads)

    def rows(block: int) -> slice:
        return slice(block * dim, (block + 1) * dim)

    for (table, entry), blocks in _blocks_of(config, query_heads).items():
        if (table, entry) in here:
            for name, block in blocks.items():
                before = rows(here[table, entry][name])
                qkv[rows(block)] = held.weights.qkv.numpy()[before]
                if bias is not None:
                    bias[rows(block)] = held.weights.qkv_bias.numpy()[before]
                if table == "query":
                    o[:, rows(block)] = held.weights.o.numpy()[:, before]
            continue
        record, layout = store.read(table, layer, entry), store.layout(table)
        for name, block in blocks.items():
            qkv[rows(block)] = layout.unpack(record, name)
            if name in biased:
                bias[rows(block)] = layout.unpack(record, f"{name}.bias")[0]
            if table == "query":
                o[:, rows(block)] = layout.unpack(record, "o")


def _blocks_of(config: ModelConfig, query_heads: list[int]) -> dict[tuple[str, int], dict[str, int]]:
    """By table and entry: where the matrices of a record lie in qkv, counted in heads. A query head's in o is its q's."""
    kv_heads, _ = runs_of(query_heads, config.heads_per_kv)
    heads, keys = len(query_heads), len(kv_heads)
    blocks = {("query", head): {"q": local} for local, head in enumerate(query_heads)}
    return blocks | {("kv", head): {"k": heads + local, "v": heads + keys + local} for local, head in enumerate(kv_heads)}


def read_ffn(
    store: ModelStore, config: ModelConfig, layer: int, groups: list[int], weights: LayerWeights, held: Held = NOTHING
) -> None:
    """Read FFN groups into the room that the weights have for them."""
    biased = set(store.meta["biases"])
    gate_up, down = weights.gate_up.numpy(), weights.down.numpy()
    bias = None if weights.gate_up_bias is None else weights.gate_up_bias.numpy()
    if bias is not None:
        bias[:] = 0
    here, half, half_before = _columns_of(config, held.groups), len(gate_up) // 2, len(held.weights.gate_up) // 2
    for group, own in _columns_of(config, groups).items():
        gate, up = own, slice(own.start + half, own.stop + half)
        if group in here:
            before = here[group]
            up_before = slice(before.start + half_before, before.stop + half_before)
            down[:, own] = held.weights.down.numpy()[:, before]
            for rows, rows_before in ((gate, before), (up, up_before)):
                gate_up[rows] = held.weights.gate_up.numpy()[rows_before]
                if bias is not None:
                    bias[rows] = held.weights.gate_up_bias.numpy()[rows_before]
            continue
        record, layout, neurons = store.read("ffn", layer, group), store.layout("ffn"), own.stop - own.start
        for name, rows in (("gate", gate), ("up", up)):
            gate_up[rows] = layout.unpack(record, name)[:neurons]
            if name in biased:
                bias[rows] = layout.unpack(record, f"{name}.bias")[0, :neurons]
        down[:, own] = layout.unpack(record, "down")[:, :neurons]


def _columns_of(config: ModelConfig, groups: list[int]) -> dict[int, slice]:
    """Where each group's neurons lie in a share."""
    ends = np.cumsum([len(config.group_neurons(group)) for group in groups]).tolist()
    return {group: slice(end - len(config.group_neurons(group)), end) for group, end in zip(groups, ends)}


def read_vocabulary(store: ModelStore, config: ModelConfig, table: str, block: int) -> np.ndarray:
    """The rows of one block of the embedding or the head, f32 [rows, D]."""
    rows = store.layout(table).unpack(store.read(table, 0, block), "rows")
    return rows[: config.vocabulary - block * VOCABULARY_BLOCK]


def read_head(store: ModelStore, config: ModelConfig, number: int, block: HeadBlock) -> None:
    """Read one block of the head into the room that it has."""
    block.rows.numpy()[:] = read_vocabulary(store, config, "embedding" if config.tied else "head", number)


def load_vocabulary(store: ModelStore, config: ModelConfig, table: str) -> torch.Tensor:
    """The whole embedding or head, f32 [V, D]."""
    matrix = torch.empty(config.vocabulary, config.hidden)
    for block in range(vocabulary_blocks(config)):
        rows = matrix.numpy()[block * VOCABULARY_BLOCK : (block + 1) * VOCABULARY_BLOCK]
        rows[:] = read_vocabulary(store, config, table, block)
    return matrix


def load_trunk(store: ModelStore, config: ModelConfig) -> Trunk:
    """Read norms, embedding and head from model.h5."""
    embedding = load_vocabulary(store, config, "embedding")
    norms = load_norms(store, config)
    return Trunk(
        embedding=embedding,
        head=embedding if config.tied else load_vocabulary(store, config, "head"),
        attention_norms=torch.from_numpy(norms.attention),
        ffn_norms=torch.from_numpy(norms.ffn),
        final_norm=torch.from_numpy(norms.final),
        o_bias=None if norms.o_bias is None else torch.from_numpy(norms.o_bias),
        down_bias=None if norms.down_bias is None else torch.from_numpy(norms.down_bias),
    )
