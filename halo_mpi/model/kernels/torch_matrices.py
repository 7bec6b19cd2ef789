"""Matrices that torch multiplies without making them f32 first.

    Halves   bf16, half the bytes of f32: storage in 8 and 16 bits
    Packed   4-bit blocks in torch's own order of codes, as many bytes as in the shards: weight = scale * (code - 8) + zero,
             scale and zero bf16 by block

Inputs of a product, and what it gives, are rounded to bf16.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from halo_mpi.model.kernels.tiles import stored_tiles, tiles_across, tiles_down
from halo_mpi.store.encoding import BLOCK, TILE_ROWS
from halo_mpi.store.layout import RecordLayout

PACKED_ROWS = 64  # that torch puts together at most: what is packed in such pieces is packed as a whole
MIDDLE = 8  # the code that stands for zero
INNER_TILES = 2  # an argument of torch's that only other devices heed


class Halves:
    """bf16 [rows, columns]."""

    def __init__(self, values: torch.Tensor):
        self.values, self.shape, self.nbytes = values, tuple(values.shape), values.nbytes

    def write(self, rows: slice, columns: slice, layout: RecordLayout, record: np.ndarray, name: str, skipped: int = 0) -> None:
        """Write a matrix of a record, but for its first rows, into a part of this one."""
        values = layout.unpack(record, name)[skipped : skipped + rows.stop - rows.start, : columns.stop - columns.start]
        self.values[rows, columns] = torch.from_numpy(values)

    def write_from(self, rows: slice, columns: slice, other: "Halves", other_rows: slice, other_columns: slice) -> None:
        self.values[rows, columns] = other.values[other_rows, other_columns]

    def product(self, x: torch.Tensor, first: int = 0) -> torch.Tensor:
        """f32 [T, rows] for x f32 [T, columns], by the rows from `first` on."""
        with onednn(len(x) > 1):  # 149 and 73 us with and without it for one row of 576, 148 and more than 300 for two
            return F.linear(x.bfloat16(), self.values[first:]).float()

    def part(self, start: int, stop: int) -> "Halves":
        return Halves(self.values[start:stop])


class Packed:
    """In `memory`, uint8, of the size of as many int4 tiles. What is written into it is packed when the last tile is there."""

    def __init__(self, memory: np.ndarray, rows: int, columns: int):
        down, across = tiles_down(rows), tiles_across(columns)
        self.shape, self.nbytes = (down * TILE_ROWS, across * BLOCK), memory.nbytes
        codes, scales = self.shape[0] * self.shape[1] // 2, self.shape[0] * across * 4
        self._codes = memory[:codes].reshape(down, across, TILE_ROWS * BLOCK // 2)
        self._packed = torch.from_numpy(memory[:codes]).view(self.shape[0], self.shape[1] // 2)
        self._scales = torch.from_numpy(memory[codes : codes + scales]).view(torch.bfloat16).view(across, self.shape[0], 2)
        self._missing = down * across

    def write(self, rows: slice, columns: slice, layout: RecordLayout, record: np.ndarray, name: str, skipped: int = 0) -> None:
        """Write a matrix of a record, but for its first rows, into whole tiles of this one."""
        stored = layout.parts[name]
        source = stored_tiles(layout.bytes_of(record, name), stored.rows, stored.columns, stored.dtype)
        down = slice(rows.start // TILE_ROWS, tiles_down(rows.stop))
        across = slice(columns.start // BLOCK, tiles_across(columns.stop))
        above, beside = skipped // TILE_ROWS, slice(0, across.stop - across.start)
        part = source.part(slice(above, above + down.stop - down.start), beside)
        self._codes[down, across] = part.codes
        scale, minimum = (_by_row(plane) for plane in (part.scale, part.minimum))
        self._scales[across, down.start * TILE_ROWS : down.stop * TILE_ROWS] = torch.stack((scale, minimum + MIDDLE * scale), -1).bfloat16()
        self._missing -= part.codes.shape[0] * part.codes.shape[1]
        if not self._missing:
            self._pack()

    def product(self, x: torch.Tensor, first: int = 0) -> torch.Tensor:
        """f32 [T, rows] for x f32 [T, columns], by the rows from `first` on."""
        if not self._packed.numel():
            return torch.zeros(len(x), self.shape[0] - first)
        start = first // PACKED_ROWS * PACKED_ROWS
        scales = self._scales[:, start:].contiguous() if start else self._scales
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), self._packed[start:], BLOCK, scales)
        return y[:, first - start :].float()

    def _pack(self) -> None:
        """Put the codes of the tiles into torch's order, in place."""
        for start in range(0, self.shape[0], PACKED_ROWS):
            stop = min(start + PACKED_ROWS, self.shape[0])
            tiles = self._codes[start // TILE_ROWS : stop // TILE_ROWS]
            codes = codes_of(tiles, stop - start, self.shape[1])
            self._packed[start:stop] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(codes), INNER_TILES)
        self._missing = self._codes.shape[0] * self._codes.shape[1]


def codes_of(tiles: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """int32 [rows, columns] from int4 tiles, uint8 [b, g, 256]."""
    pieces = tiles.reshape(rows // TILE_ROWS, columns // BLOCK, 4, TILE_ROWS, 4)
    halves = np.stack((pieces & 15, pieces >> 4), axis=3)  # [b, g, j, half, r, i]
    return halves.transpose(0, 4, 1, 2, 3, 5).reshape(rows, columns).astype(np.int32)


@contextmanager
def onednn(wanted: bool) -> Iterator[None]:
    """With or without products by oneDNN, if torch has it and uses it."""
    usual = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = usual and wanted
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = usual


def can_pack() -> bool:
    """Whether this torch has the products of 4-bit blocks."""
    return hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


def _by_row(plane: np.ndarray) -> torch.Tensor:
    """f32 [g, rows] from f16 [b, g, 16]."""
    return torch.from_numpy(plane.transpose(1, 0, 2).reshape(plane.shape[1], -1).astype(np.float32))
