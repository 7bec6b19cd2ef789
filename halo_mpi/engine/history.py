"""Inputs of attention, kept by the root, so that a worker that was cut off gets the K and V that it missed."""

import numpy as np
import torch

from halo_mpi.wire.root_link import RootLink

CHUNK_BYTES = 32 * 2**10  # of one message: below the size from which MPI waits for the receiver
PORTION_BYTES = 256 * 2**10  # at once: more would fill the link and the worker's memory
LAST_ROWS = 64  # so few may still be under way when a worker is asked again: it computes them in some ms
F16_MAX = 65504.0


def history_bytes(layers: int, context: int, width: int) -> int:
    return layers * context * width * 2


class AttentionInputs:
    """Normed inputs of every attention layer, f16 [layers, context, D], and which of them each worker was sent."""

    def __init__(self, layers: int, context: int, width: int, workers: list[list[int]]):
        """`workers`: those that hold heads, by layer."""
        self._rows = torch.zeros(layers, context, width, dtype=torch.float16)
        self._workers = workers
        self._sent = {rank: np.zeros(layers, int) for rank in sorted(set().union(*workers))}  # rows, by layer
        self._chunk = max(1, min(64, CHUNK_BYTES // (2 * width)))

    def begin_text(self) -> None:
        for sent in self._sent.values():
            sent[:] = 0

    def keep(self, layer: int, position: int, normed: torch.Tensor, sent_to: list[int]) -> None:
        """normed f32 [T, D] was the layer's input, and these workers were sent it."""
        end = position + len(normed)
        self._rows[layer, position:end] = normed.clamp(-F16_MAX, F16_MAX)
        for rank in sent_to:
            self._sent[rank][layer] = end

    def replay(self, link: RootLink, rank: int, position: int, next_layer: int, epoch: int) -> bool:
        """Send a worker some of the rows that it lacks; whether these were the last, and few.

        The next attention to compute is that of `next_layer` at `position`; the layers before have done theirs.
        """
        portion = max(LAST_ROWS, PORTION_BYTES // (2 * self._rows.shape[-1]))
        left = portion
        for layer, sent in enumerate(self._sent.get(rank, np.empty(0, int)).tolist()):
            if rank not in self._workers[layer]:
                continue
            rows = position + (layer < next_layer)
            for start in range(sent, rows, self._chunk):
                end = min(rows, start + self._chunk, start + left)
                if end <= start:
                    return False
                link.replay(rank, layer, start, self._rows[layer, start:end].float().numpy(), epoch)
                self._sent[rank][layer] = end
                left -= end - start
        return portion - left <= LAST_ROWS
