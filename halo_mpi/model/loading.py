"""From records to the fused f32 matrices that a rank computes with; only the records of its own share are read."""

import torch

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.llama import LayerWeights, Trunk, runs_of
from halo_mpi.model.records import VOCABULARY_BLOCK, vocabulary_blocks
from halo_mpi.store.reader import ModelStore


def load_layer(store: ModelStore, config: ModelConfig, layer: int, query_heads: list[int], groups: list[int]) -> LayerWeights:
    """Read the records of some query heads (ascending), their KV heads and some FFN groups of one layer.

    Raises InputError if one is on no shard here, DamagedFileError if its checksum differs.
    """
    dim, hidden = config.head_dim, config.hidden
    kv_heads, runs = runs_of(query_heads, config.heads_per_kv)
    heads, keys = len(query_heads), len(kv_heads)
    biased = set(store.meta["biases"])
    qkv, o = torch.empty((heads + 2 * keys) * dim, hidden), torch.empty(hidden, heads * dim)
    qkv_bias = torch.zeros(len(qkv)) if biased & {"q", "k", "v"} else None

    def place(table: str, entry: int, rows: dict[str, int]) -> None:
        """Copy matrices of a record to blocks of rows of qkv, counted in heads."""
        record, layout = store.read(table, layer, entry), store.layout(table)
        for name, block in rows.items():
            own = slice(block * dim, (block + 1) * dim)
            qkv[own] = torch.from_numpy(layout.unpack(record, name))
            if name in biased:
                qkv_bias[own] = torch.from_numpy(layout.unpack(record, f"{name}.bias"))[0]
        if table == "query":
            o[:, own] = torch.from_numpy(layout.unpack(record, "o"))

    for local, head in enumerate(query_heads):
        place("query", head, {"q": local})
    for local, head in enumerate(kv_heads):
        place("kv", head, {"k": heads + local, "v": heads + keys + local})

    neurons = [config.group_neurons(group) for group in groups]
    count = sum(map(len, neurons))
    gate_up, down = torch.empty(2 * count, hidden), torch.empty(hidden, count)
    gate_up_bias = torch.zeros(2 * count) if biased & {"gate", "up"} else None
    start = 0
    for group, own in zip(groups, neurons):
        record, layout, stop = store.read("ffn", layer, group), store.layout("ffn"), start + len(own)
        for name, offset in (("gate", 0), ("up", count)):
            gate_up[offset + start : offset + stop] = torch.from_numpy(layout.unpack(record, name))[: len(own)]
            if name in biased:
                gate_up_bias[offset + start : offset + stop] = torch.from_numpy(layout.unpack(record, f"{name}.bias"))[
                    0, : len(own)
                ]
        down[:, start:stop] = torch.from_numpy(layout.unpack(record, "down"))[:, : len(own)]
        start = stop
    return LayerWeights(qkv, qkv_bias, o, runs, gate_up, gate_up_bias, down)


def load_trunk(store: ModelStore, config: ModelConfig) -> Trunk:
    """Read embedding, head and norms from model.h5."""

    def vocabulary(table: str) -> torch.Tensor:
        matrix, layout = torch.empty(config.vocabulary, config.hidden), store.layout(table)
        for block in range(vocabulary_blocks(config)):
            own = matrix[block * VOCABULARY_BLOCK : (block + 1) * VOCABULARY_BLOCK]
            own[:] = torch.from_numpy(layout.unpack(store.read(table, 0, block), "rows"))[: len(own)]
        return matrix

    layout = store.layout("layer")
    records = [store.read("layer", layer, 0) for layer in range(config.layers)]

    def vectors(name: str) -> torch.Tensor | None:
        if name not in layout.parts:
            return None
        return torch.cat([torch.from_numpy(layout.unpack(record, name)) for record in records])

    embedding = vocabulary("embedding")
    return Trunk(
        embedding=embedding,
        head=embedding if config.tied else vocabulary("head"),
        attention_norms=vectors("attention_norm"),
        ffn_norms=vectors("ffn_norm"),
        final_norm=torch.from_numpy(store.layout("final").unpack(store.read("final", 0, 0), "norm"))[0],
        o_bias=vectors("o.bias"),
        down_bias=vectors("down.bias"),
    )
