"""The head over several ranks: each scores its rows of the vocabulary, and the root puts the logits together.

root      HEAD, the normed x --> workers with rows        own rows meanwhile        logits, in the order of the ranks
workers                          their rows' logits, packed into vectors of the width that all messages have

The root holds all rows, so nobody is needed: whose answer is not there when the root could have computed it itself, whose process has
ended, or who is away or has not loaded its rows yet, is not waited for, and the logits are the same bit for bit. With f16 or q8 on the wire
scores travel as f16 distances from the part's largest one, which itself is exact; what the root computes in somebody's place it rounds
likewise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from halo_mpi.engine.loader import Loader
from halo_mpi.engine.vocabulary import HeldVocabulary
from halo_mpi.model.kernels.kernel import Head, Kernel
from halo_mpi.model.loading import HeadBlock
from halo_mpi.schedule.head import FURTHER, MOST_VECTORS
from halo_mpi.wire.messages import Kind
from halo_mpi.wire.root_link import RootLink

MARGIN_S = 5e-4  # that an answer may take longer than the root would
MOST_SKIPPED = 63  # calls in which a worker that was late again and again is not asked
F16_MAX = 65504.0


def ranges(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Counts of rows by rank as (start, stop)."""
    stops = list(accumulate(rows))
    return list(zip([0, *stops], stops))


def vectors_of(rows: int, tokens: int, width: int, wire: str) -> int:
    """Vectors that so many tokens' scores of some rows take."""
    return -(-tokens * (rows + (0 if wire == "f32" else FURTHER)) // width)


def packed(scores: np.ndarray, width: int, wire: str) -> np.ndarray:
    """Scores f32 [T, rows] as vectors f32 [_, width] that lose little in f16."""
    values = scores if wire == "f32" else _distances(scores)
    vectors = np.zeros((-(-values.size // width), width), np.float32)
    vectors.reshape(-1)[: values.size] = values.reshape(-1)
    return vectors


def unpacked(vectors: np.ndarray, tokens: int, rows: int, wire: str) -> np.ndarray:
    """The scores f32 [T, rows] again."""
    values = rows if wire == "f32" else rows + FURTHER
    values = vectors.reshape(-1)[: tokens * values].reshape(tokens, values)
    return values if wire == "f32" else _absolute(values)


def as_sent(scores: np.ndarray, wire: str) -> np.ndarray:
    """Scores f32 [T, rows] as they arrive if somebody else computes them."""
    return scores if wire == "f32" else _absolute(_distances(scores).astype(np.float16).astype(np.float32))


def _distances(scores: np.ndarray) -> np.ndarray:
    """The largest score of each token as a sum of two numbers of f16, and how far below it each score is."""
    high = scores.max(1, keepdims=True).astype(np.float16).astype(np.float32)
    low = (scores.max(1, keepdims=True) - high).astype(np.float16).astype(np.float32)
    return np.concatenate([high, low, np.maximum(scores - (high + low), -F16_MAX)], 1)


def _absolute(values: np.ndarray) -> np.ndarray:
    return values[:, FURTHER:] + (values[:, :1] + values[:, 1:FURTHER])


class OwnRows:
    """A worker's rows, once its `loader` has read everything."""

    def __init__(self, kernel: Kernel, rows: int, block: HeadBlock, loader: Loader, wire: str):
        self._kernel, self._rows, self._block, self._loader = kernel, rows, block, loader
        self.wire = "f32" if wire == "f32" else "f16"
        self._head: Head | None = None

    def scores(self, x: np.ndarray) -> np.ndarray | None:
        """The answer to x f32 [T, D]; None as long as they are not there. Raises what reading them raised."""
        if self._head is None:
            if not self._loader.is_done():
                return None
            self._head = self._kernel.head(self._block.rows, self._rows)
        return packed(self._head.logits(x), x.shape[1], self.wire)


@dataclass(slots=True)
class Part:
    """A worker's rows, as the root sees them. `misses`: answers, one after the other, that were late; `skipped`: calls left without it."""

    start: int
    stop: int
    head: Head
    misses: int = 0
    skipped: int = 0

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def missed(self) -> None:
        self.skipped = min(2**self.misses - 1, MOST_SKIPPED)
        self.misses = min(self.misses + 1, 10)


class SplitHead:
    """A `Vocabulary` whose head is split. `rows`: counts by rank; a worker whose scores of all tokens at once do not fit into a message is
    not asked, and nobody for more than `most_tokens`. `does_without`: nor is this worker."""

    def __init__(self, whole: HeldVocabulary, rows: Sequence[int], link: RootLink, wire: str, most_tokens: int,
                 does_without: Callable[[int], bool]):  # fmt: skip
        self.embed, self.nbytes, self.rows = whole.embed, whole.nbytes, rows
        self._whole, self._link, self._does_without = whole.head, link, does_without
        self._wire = "f32" if wire == "f32" else "f16"
        (_, self._own_rows), *others = ranges(rows)
        self._own = whole.head.part(0, self._own_rows)
        self._parts = {rank: Part(*ends, whole.head.part(*ends)) for rank, ends in enumerate(others, 1) if ends[0] < ends[1]}
        self._most_tokens = most_tokens
        self.late = 0  # answers that were not waited for

    def logits(self, x: np.ndarray) -> np.ndarray:
        """f32 [T, V] for the normed residual vectors x [T, D]."""
        asked = self._asked(*x.shape)
        if not asked:
            return self._alone(x)
        link, waiter = self._link, self._link.waiter
        logits = np.empty((len(x), sum(self.rows)), np.float32)
        seq = link.ask(Kind.HEAD, 0, 0, x, asked, wire="f32")
        begin = waiter.now()
        logits[:, : self._own_rows] = self._own.logits(x)
        row_s, missing = (waiter.now() - begin) / self._own_rows, set(asked)
        for rank in self._parts.keys() - missing:
            self._compute(rank, x, logits)
        own_done = waiter.now()
        while missing:
            for answer in link.poll_scores():
                if answer.seq == seq:
                    missing.discard(answer.rank)
                    self._take(answer.rank, answer.y, x, logits)
            now, ended = waiter.now(), link.ended | link.failures.keys()
            for rank in sorted(missing):
                part = self._parts[rank]
                if rank in ended or now > own_done + row_s * part.rows + link.peers[rank].rtt_ms / 1e3 + MARGIN_S:
                    missing.discard(rank)
                    part.missed()
                    self.late += 1
                    self._compute(rank, x, logits)
                    break  # others may have answered meanwhile
                link.kick(rank)
            if missing:
                waiter.wait()
        return logits

    def _asked(self, tokens: int, width: int) -> list[int]:
        """The workers whose answer is to be waited for."""
        asked = []
        if tokens > self._most_tokens:
            return asked
        for rank, part in self._parts.items():
            if self._does_without(rank) or vectors_of(part.rows, tokens, width, self._wire) > MOST_VECTORS:
                continue
            if part.skipped:
                part.skipped -= 1
            else:
                asked.append(rank)
        return asked

    def _take(self, rank: int, vectors: np.ndarray, x: np.ndarray, logits: np.ndarray) -> None:
        """An answer came; without vectors if the worker has not loaded its rows yet."""
        part = self._parts[rank]
        if len(vectors):
            part.misses = 0
            logits[:, part.start : part.stop] = unpacked(vectors, len(x), part.rows, self._wire)
        else:
            self._compute(rank, x, logits)

    def _compute(self, rank: int, x: np.ndarray, logits: np.ndarray) -> None:
        """In a worker's place."""
        part = self._parts[rank]
        logits[:, part.start : part.stop] = as_sent(part.head.logits(x), self._wire)

    def _alone(self, x: np.ndarray) -> np.ndarray:
        logits = self._whole.logits(x)
        if self._wire != "f32":
            for part in self._parts.values():
                logits[:, part.start : part.stop] = as_sent(logits[:, part.start : part.stop], self._wire)
        return logits
