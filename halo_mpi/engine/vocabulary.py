"""The vocabulary on the root: in memory, or with a head that is read in blocks, like a layer, and embeddings when they are needed."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.loading import HeadBlock, load_vocabulary, read_vocabulary
from halo_mpi.model.records import VOCABULARY_BLOCK
from halo_mpi.store.reader import ModelStore


class Vocabulary(Protocol):
    """`nbytes`: of it in memory, but for what a loader holds."""

    nbytes: int

    def embed(self, tokens: list[int]) -> np.ndarray:
        """The residual vectors f32 [T, D] with which tokens begin. Raises DamagedFileError."""

    def logits(self, x: np.ndarray) -> np.ndarray:
        """f32 [T, V] for the normed residual vectors x [T, D]. Raises DamagedFileError."""


class HeldVocabulary:
    """All in memory."""

    def __init__(self, store: ModelStore, config: ModelConfig):
        self._embedding = load_vocabulary(store, config, "embedding")
        self._head = self._embedding if config.tied else load_vocabulary(store, config, "head")
        self.nbytes = self._embedding.nbytes * (1 if config.tied else 2)

    def embed(self, tokens: list[int]) -> np.ndarray:
        return self._embedding[tokens].numpy()

    def logits(self, x: np.ndarray) -> np.ndarray:
        return F.linear(torch.from_numpy(x), self._head).numpy()


class ReadVocabulary:
    """`blocks`: of the head; `need(first + n)` makes the n-th one's rows be there."""

    nbytes = 0

    def __init__(self, store: ModelStore, config: ModelConfig, blocks: list[HeadBlock], need: Callable[[int], None], first: int):
        self._store, self._config, self._blocks, self._need, self._first = store, config, blocks, need, first

    def embed(self, tokens: list[int]) -> np.ndarray:
        x = np.empty((len(tokens), self._config.hidden), np.float32)
        for block in {token // VOCABULARY_BLOCK for token in tokens}:
            rows = read_vocabulary(self._store, self._config, "embedding", block)
            for place, token in enumerate(tokens):
                if token // VOCABULARY_BLOCK == block:
                    x[place] = rows[token % VOCABULARY_BLOCK]
        return x

    def logits(self, x: np.ndarray) -> np.ndarray:
        pieces = []
        for number, block in enumerate(self._blocks):
            self._need(self._first + number)
            pieces.append(F.linear(torch.from_numpy(x), block.rows).numpy())
        return np.concatenate(pieces, -1)
