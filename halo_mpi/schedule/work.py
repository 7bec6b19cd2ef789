"""What there is to share out."""

from dataclasses import dataclass

from halo_mpi.model.sizes import Sizes, shape_bytes
from halo_mpi.wire.messages import Kind


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to share out, the same for all layers; bytes are those of all layers together.

    `kv_bytes`: weights and cache of a KV head, which every device needs that has one of its `heads_per_kv` query heads.
    """

    layers: int
    heads: int
    groups: int
    heads_per_kv: int
    head_bytes: int
    kv_bytes: int
    group_bytes: int
    root_bytes: int  # on top of its share
    context: int
    cache_bytes: int = 0  # of `kv_bytes`: always in memory
    trunk_bytes: int = 0  # of `root_bytes`: embedding and head, in memory only if all of the root's weights are
    output_bytes: int = 0  # the head alone, which the root reads otherwise
    block_bytes: int = 0  # of the embedding or the head: what is read at once
    vocabulary: int = 0  # rows of the head

    @classmethod
    def of(cls, sizes: Sizes, context: int, root_bytes: int = 0) -> "Work":
        """`context`: tokens that the cache must hold; `root_bytes`: what the root needs beside its share and the vocabulary."""
        config, layers = sizes.config, sizes.config.layers
        query = sizes.query_bytes()
        kv = shape_bytes(sizes.attention([0])) - query
        cache = sizes.cache_bytes([[0]], context)
        return cls(
            layers,
            config.heads,
            config.groups,
            config.heads_per_kv,
            layers * query,
            layers * (kv + cache),
            layers * shape_bytes(sizes.ffn([0])),
            sizes.vocabulary_bytes() + root_bytes,
            context,
            layers * cache,
            sizes.vocabulary_bytes(),
            sizes.table().nbytes,
            shape_bytes(sizes.head(0)),
            config.vocabulary,
        )

    def count(self, kind: Kind) -> int:
        return self.heads if kind == Kind.ATTENTION else self.groups

    def kv_heads(self, heads: int) -> int:
        """Of heads that are neighbours: at most, or where all have whole KV heads, exactly."""
        each = self.heads_per_kv
        return heads // each if heads % each == 0 else min(self.heads // each, 1 + (heads + each - 2) // each)

    def bytes_of(self, heads: int, groups: int) -> int:
        return heads * self.head_bytes + self.kv_heads(heads) * self.kv_bytes + groups * self.group_bytes
