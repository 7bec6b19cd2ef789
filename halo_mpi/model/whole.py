"""Whole layers and the whole vocabulary in f32, for torch: what calibration, and measurements of quality, compute with."""

import torch

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.reference import Reference
from halo_mpi.model.layer_weights import LayerWeights
from halo_mpi.model.llama import Trunk
from halo_mpi.model.loading import fill_vocabulary, share_parts
from halo_mpi.model.norms import load_norms
from halo_mpi.model.records import VOCABULARY_BLOCK, vocabulary_blocks
from halo_mpi.store.reader import ModelStore


def load_layer(store: ModelStore, config: ModelConfig, layer: int, query_heads: list[int], groups: list[int]) -> LayerWeights:
    """Read the records of some query heads (ascending), their KV heads and some FFN groups of one layer.

    Raises InputError if one is on no shard here, DamagedFileError if its checksum differs.
    """
    everywhere = [[]] * layer
    layers, parts = share_parts(store, Reference(config), [*everywhere, query_heads], [*everywhere, groups])
    for part in parts[-2:]:
        part.make_room()
        part.read()
    return layers[-1]


def load_trunk(store: ModelStore, config: ModelConfig) -> Trunk:
    """Read norms, embedding and head from model.h5."""

    def table(name: str) -> torch.Tensor:
        matrix = torch.empty(config.vocabulary, config.hidden)
        for block in range(vocabulary_blocks(config)):
            fill_vocabulary(store, config, name, block, matrix, block * VOCABULARY_BLOCK)
        return matrix

    embedding, norms = table("embedding"), load_norms(store, config)
    return Trunk(
        embedding=embedding,
        head=embedding if config.tied else table("head"),
        attention_norms=torch.from_numpy(norms.attention),
        ffn_norms=torch.from_numpy(norms.ffn),
        final_norm=torch.from_numpy(norms.final),
        o_bias=None if norms.o_bias is None else torch.from_numpy(norms.o_bias),
        down_bias=None if norms.down_bias is None else torch.from_numpy(norms.down_bias),
    )
