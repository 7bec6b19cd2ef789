"""The vocabulary of a root whose memory does not hold it: its head is read in blocks, like a layer; embeddings when they are needed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.loading import HeadBlock, read_vocabulary
from halo_mpi.model.records import VOCABULARY_BLOCK
from halo_mpi.store.reader import ModelStore


class ReadVocabulary:
    """`blocks`: of the head; `need(first + n)` makes the n-th one's rows be there."""

    def __init__(self, store: ModelStore, config: ModelConfig, blocks: list[HeadBlock], need: Callable[[int], None], first: int):
        self._store, self._config, self._blocks, self._need, self._first = store, config, blocks, need, first

    def embed(self, tokens: list[int]) -> torch.Tensor:
        """The residual vectors [T, D] with which tokens begin. Raises DamagedFileError."""
        x = torch.empty(len(tokens), self._config.hidden)
        for block in {token // VOCABULARY_BLOCK for token in tokens}:
            rows = torch.from_numpy(read_vocabulary(self._store, self._config, "embedding", block))
            for place, token in enumerate(tokens):
                if token // VOCABULARY_BLOCK == block:
                    x[place] = rows[token % VOCABULARY_BLOCK]
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[T, V] for the normed residual vectors x [T, D]. Raises DamagedFileError."""
        pieces = []
        for number, block in enumerate(self._blocks):
            self._need(self._first + number)
            pieces.append(F.linear(x, block.rows))
        return torch.cat(pieces, -1)
