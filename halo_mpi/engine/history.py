"""Inputs of attention, kept by the root, for a worker that was cut off and missed K and V, and for one that gets other heads."""

import numpy as np

from halo_mpi.wire.messages import Kind
from halo_mpi.wire.root_link import RootLink

CHUNK_BYTES = 32 * 2**10  # of one message: below the size from which MPI waits for the receiver
PORTION_BYTES = 256 * 2**10  # at once: more would fill the link and the worker's memory
LAST_ROWS = 64  # so few may still be under way when a worker is asked again: it computes them in some ms
F16_MAX = 65504.0


def history_bytes(layers: int, context: int, width: int, wire: str) -> int:
    return layers * context * width * (4 if wire == "f32" else 2)


class AttentionInputs:
    """Normed inputs of every attention layer, [layers, context, D], and which of them each worker was sent.

    They are kept, and sent again, in f32 if that is on the wire, else in f16.
    """

    def __init__(self, layers: int, context: int, width: int, ranks: int, wire: str):
        self._wire = "f32" if wire == "f32" else "f16"
        self._rows = np.zeros((layers, context, width), np.float32 if self._wire == "f32" else np.float16)
        self._workers: list[list[int]] = [[] for _ in range(layers)]  # that hold heads
        self._sent = np.zeros((ranks, layers), int)  # rows
        self._row_bytes = width * self._rows.itemsize
        self._chunk = max(1, min(64, CHUNK_BYTES // self._row_bytes))

    def begin_text(self) -> None:
        self._sent[:] = 0

    def follow(self, workers: list[list[int]]) -> None:
        """These hold heads from now on, by layer."""
        self._workers = workers

    def keep(self, layer: int, position: int, normed: np.ndarray, sent_to: list[int]) -> None:
        """normed f32 [T, D] was the layer's input, and these workers were sent it."""
        end = position + len(normed)
        self._rows[layer, position:end] = normed if self._wire == "f32" else normed.clip(-F16_MAX, F16_MAX)
        sent = self._sent[:, layer]
        np.minimum(sent, position, out=sent)  # more was computed for guesses that were wrong
        sent[sent_to] = end

    def rows(self, layer: int, start: int, end: int) -> np.ndarray:
        """Some of a layer's inputs, f32 [end - start, D]."""
        return self._rows[layer, start:end].astype(np.float32)

    def refill(self, link: RootLink, rank: int, layer: int, start: int, end: int, epoch: int, plan: int) -> None:
        """Send a worker some of a layer's inputs, for heads that it will have."""
        for first in range(start, end, self._chunk):
            rows = self.rows(layer, first, min(end, first + self._chunk))
            link.replay(rank, Kind.REFILL, layer, first, rows, epoch, plan, self._wire)
        self._sent[rank, layer] = max(end, self._sent[rank, layer]) if rank in self._workers[layer] else end

    def portion(self, size: int) -> int:
        """How many rows so many bytes are."""
        return max(1, size // self._row_bytes)

    def replay(self, link: RootLink, rank: int, position: int, computed: int, next_layer: int, epoch: int, plan: int) -> bool:
        """Send a worker some of the rows that it lacks; whether these were the last, and few.

        The next attention to compute is that of `next_layer` over `computed` rows from `position` on; the layers before have done theirs.
        """
        portion = max(LAST_ROWS, self.portion(PORTION_BYTES))
        left = portion
        for layer, sent in enumerate(self._sent[rank].tolist()):
            if rank not in self._workers[layer]:
                continue
            rows = position + (computed if layer < next_layer else 0)
            for start in range(sent, rows, self._chunk):
                end = min(rows, start + self._chunk, start + left)
                if end <= start:
                    return False
                link.replay(rank, Kind.REPLAY, layer, start, self.rows(layer, start, end), epoch, plan, self._wire)
                self._sent[rank, layer] = end
                left -= end - start
        return portion - left <= LAST_ROWS
