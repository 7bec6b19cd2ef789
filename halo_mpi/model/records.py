"""How a LLaMA is cut into records: which matrices make a query head, a KV head and an FFN group, and in which shard each lies.

    shard-KK.h5   query  [layers, heads]      q [head_dim, hidden], o [hidden, head_dim]
                  kv     [layers, KV heads]   k, v [head_dim, hidden]
                  ffn    [layers, groups]     gate, up [group, hidden], down [hidden, group]
    model.h5      layer  [layers, 1]          attention_norm, ffn_norm [1, hidden]
                  final  [1, 1]               norm [1, hidden]
                  embedding, head [1, blocks] rows [4096, hidden] of the vocabulary (no head where it is tied)

Biases, where the model has them, lie in f32 beside their matrix as `q.bias` and so on; those of o and down, which are
added once, in `layer`. The last FFN group and the last vocabulary block are filled up with zeros.
"""

from halo_mpi.model.config import ModelConfig
from halo_mpi.store.layout import Part, RecordLayout

VOCABULARY_BLOCK = 4096  # rows


def split_evenly(count: int, parts: int) -> list[int]:
    """Sizes of `parts` shares of `count` things; the last shares take the remainder, since rank 0 has other work."""
    share, remainder = divmod(count, parts)
    return [share + (part >= parts - remainder) for part in range(parts)]


def owners(sizes: list[int]) -> list[int]:
    """Shares of these sizes, one after the other: the share's number for each thing."""
    return [share for share, size in enumerate(sizes) for _ in range(size)]


def vocabulary_blocks(config: ModelConfig) -> int:
    return -(-config.vocabulary // VOCABULARY_BLOCK)


def shard_tables(config: ModelConfig, dtype: str, biases: set[str]) -> dict[str, RecordLayout]:
    """Record layouts of the tables of a shard. `biases`: names of the matrices that have one ("q", "gate", ...)."""
    hidden, dim, group = config.hidden, config.head_dim, config.group_size

    def layout(*matrices: tuple[str, int, int]) -> RecordLayout:
        parts = [Part(name, rows, columns, dtype) for name, rows, columns in matrices]
        parts += [Part(f"{name}.bias", 1, rows, "f32") for name, rows, _ in matrices if name in biases - {"o", "down"}]
        return RecordLayout(parts)

    return {
        "query": layout(("q", dim, hidden), ("o", hidden, dim)),
        "kv": layout(("k", dim, hidden), ("v", dim, hidden)),
        "ffn": layout(("gate", group, hidden), ("up", group, hidden), ("down", hidden, group)),
    }


def model_tables(config: ModelConfig, dtype: str, biases: set[str]) -> dict[str, tuple[RecordLayout, int, int]]:
    """Record layout, layers and entries of the tables of model.h5. With int4 the vocabulary stays at 8 bits: 4 bits
    cost SmolLM2-135M 0.065 nats in the prototype."""
    hidden = config.hidden
    vectors = ["attention_norm", "ffn_norm", *(f"{name}.bias" for name in ("o", "down") if name in biases)]
    rows = RecordLayout([Part("rows", VOCABULARY_BLOCK, hidden, "int8" if dtype == "int4" else dtype)])
    tables = {
        "layer": (RecordLayout([Part(name, 1, hidden, "f32") for name in vectors]), config.layers, 1),
        "final": (RecordLayout([Part("norm", 1, hidden, "f32")]), 1, 1),
        "embedding": (rows, 1, vocabulary_blocks(config)),
    }
    if not config.tied:
        tables["head"] = (rows, 1, vocabulary_blocks(config))
    return tables


def shard_index(config: ModelConfig, shard: int, shards: int) -> dict[str, list[int]]:
    """The entries of each table that shard number `shard` of `shards` holds.

    FFN groups are striped by number; query heads go in runs, so that few shards need a copy of the same KV head.
    """
    holder = owners(split_evenly(config.heads, shards))
    query = [head for head in range(config.heads) if holder[head] == shard]
    return {
        "query": query,
        "kv": sorted({head // config.heads_per_kv for head in query}),
        "ffn": list(range(shard, config.groups, shards)),
    }
