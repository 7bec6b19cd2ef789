"""The vocabulary on the root: in memory, or with a head that is read in blocks, like a layer, and embeddings when they are needed."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from halo_mpi.model.kernels.kernel import Head, Kernel
from halo_mpi.model.loading import HeadBlock, fill_vocabulary
from halo_mpi.model.records import VOCABULARY_BLOCK, vocabulary_blocks
from halo_mpi.store.reader import ModelStore


class Vocabulary(Protocol):
    """`nbytes`: of it in memory, but for what a loader holds."""

    nbytes: int

    def embed(self, tokens: list[int]) -> np.ndarray:
        """The residual vectors f32 [T, D] with which tokens begin. Raises DamagedFileError."""

    def logits(self, x: np.ndarray) -> np.ndarray:
        """f32 [T, V] for the normed residual vectors x [T, D]; valid until the next call. Raises DamagedFileError."""


class HeldVocabulary:
    """All in memory."""

    def __init__(self, store: ModelStore, kernel: Kernel):
        self._embedding = load_table(store, kernel, "embedding")
        self.head = self._embedding if kernel.sizes.config.tied else load_table(store, kernel, "head")
        self.embed, self.logits = self._embedding.rows, self.head.logits
        self.nbytes = kernel.sizes.vocabulary_bytes()


class ReadVocabulary:
    """`blocks`: of the head; `need(first + n)` makes the n-th one's rows be there."""

    nbytes = 0

    def __init__(self, store: ModelStore, kernel: Kernel, blocks: list[HeadBlock], need: Callable[[int], None], first: int):
        self._store, self._kernel, self._blocks, self._need, self._first = store, kernel, blocks, need, first
        self._sizes = [kernel.sizes.head(number)["rows"] for number in range(len(blocks))]

    def embed(self, tokens: list[int]) -> np.ndarray:
        config = self._kernel.sizes.config
        x = np.empty((len(tokens), config.hidden), np.float32)
        for block in {token // VOCABULARY_BLOCK for token in tokens}:
            matrix = self._kernel.make(self._sizes[block])
            fill_vocabulary(self._store, config, "embedding", block, matrix, 0)
            places = [place for place, token in enumerate(tokens) if token // VOCABULARY_BLOCK == block]
            x[places] = self._head(matrix, block).rows([tokens[place] % VOCABULARY_BLOCK for place in places])
        return x

    def logits(self, x: np.ndarray) -> np.ndarray:
        pieces = []
        for number, block in enumerate(self._blocks):
            self._need(self._first + number)
            pieces.append(self._head(block.rows, number).logits(x))
        return np.concatenate(pieces, -1)

    def _head(self, matrix, block: int) -> Head:
        return self._kernel.head(matrix, self._sizes[block].dims[0])


def load_table(store: ModelStore, kernel: Kernel, table: str) -> Head:
    """The whole embedding or head."""
    config = kernel.sizes.config
    matrix = kernel.make(kernel.sizes.table())
    for block in range(vocabulary_blocks(config)):
        fill_vocabulary(store, config, table, block, matrix, block * VOCABULARY_BLOCK)
    return kernel.head(matrix, config.vocabulary)
