"""What shares of a model take in memory, before anything is loaded."""

from halo_mpi.model.config import ModelConfig


def share_bytes(config: ModelConfig, query_heads: list[list[int]], groups: list[list[int]], context: int) -> tuple[int, int]:
    """Bytes of weights and of KV cache that a share needs in memory, before anything is loaded.

    `query_heads` and `groups`: the own ones of each layer; `context`: positions of the KV cache.
    """
    weights = cache = 0
    for heads, own_groups in zip(query_heads, groups):
        kv = len({head // config.heads_per_kv for head in heads})
        neurons = sum(len(config.group_neurons(group)) for group in own_groups)
        weights += 4 * config.hidden * (2 * config.head_dim * (len(heads) + kv) + 3 * neurons)
        cache += 2 * 4 * kv * context * config.head_dim
    return weights, cache


def trunk_bytes(config: ModelConfig) -> int:
    """Bytes that the root needs besides its share: embedding and head."""
    return 4 * config.hidden * config.vocabulary * (1 if config.tied else 2)
