"""Matrices of 4-bit or 8-bit blocks in memory, laid out as in the shards, so that loading is copying.

    row tile b, column tile g:   16 rows x 32 columns; a row's 32 codes share a scale (and, with 4 bits, a minimum)

    codes     [b, g, 256 | 512]  int4: byte [j, r, i] (j < 4, r < 16, i < 4) = column 8j+i in the low nibble, 8j+4+i in the high
                                 int8: byte [j, r, i] (j < 8, r < 16, i < 4) = column 4j+i of row r, signed
    scale     [b, g, 16]         f16
    minimum   [b, g, 16]         f16, int4 only: weight = scale * code + minimum

Several matrices below each other are one with more row tiles; side by side, one with more column tiles. A matrix whose rows are not
a multiple of 16, or columns of 32, is filled up with zeros.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from halo_mpi.store.encoding import BLOCK, TILE_ROWS

CODE_BYTES = {"int4": TILE_ROWS * BLOCK // 2, "int8": TILE_ROWS * BLOCK}  # of a tile
LINE = 64  # bytes of a cache line, and of the widest register
_SCALES = (2 * TILE_ROWS, np.float16, TILE_ROWS)
PLANES = {  # bytes by tile, type and number of what each plane holds
    "int4": [(CODE_BYTES["int4"], np.uint8, CODE_BYTES["int4"]), _SCALES, _SCALES],
    "int8": [(CODE_BYTES["int8"], np.uint8, CODE_BYTES["int8"]), _SCALES],
}


def tiles_down(rows: int) -> int:
    return -(-rows // TILE_ROWS)


def tiles_across(columns: int) -> int:
    return -(-columns // BLOCK)


@dataclass(slots=True)
class Tiles:
    """codes: uint8 [b, g, 256 | 512]; scale, minimum: f16 [b, g, 16], minimum only with 4 bits. All contiguous, at cache lines."""

    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray | None

    @classmethod
    def of(cls, memory: np.ndarray, down: int, across: int, dtype: str) -> "Tiles":
        """In the first bytes of `memory`, uint8, which begins at a cache line."""
        count, planes = down * across, []
        for size, kind, width in PLANES[dtype]:
            planes.append(memory[: count * size].view(kind).reshape(down, across, width))
            memory = memory[-(-count * size // LINE) * LINE :]
        return cls(*planes, *([None] if dtype == "int8" else []))

    @classmethod
    def bytes_of(cls, down: int, across: int, dtype: str) -> int:
        """What `of` needs."""
        return sum(-(-down * across * size // LINE) * LINE for size, _, _ in PLANES[dtype])

    @property
    def dtype(self) -> str:
        return "int8" if self.minimum is None else "int4"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, filled up."""
        return len(self.codes) * TILE_ROWS, self.codes.shape[1] * BLOCK

    @property
    def planes(self) -> list[np.ndarray]:
        return [self.codes, self.scale] + ([] if self.minimum is None else [self.minimum])

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    def part(self, rows: slice = slice(None), columns: slice = slice(None)) -> "Tiles":
        """Some row and column tiles, as a view."""
        return Tiles(*(None if plane is None else plane[rows, columns] for plane in (self.codes, self.scale, self.minimum)))

    def put(self, other: "Tiles") -> None:
        """Copy what another matrix of this size holds."""
        for mine, theirs in zip(self.planes, other.planes):
            mine[...] = theirs

    def put_stored(self, data: np.ndarray, rows: int, columns: int, down: slice, across: slice, above: int = 0) -> None:
        """Copy a matrix of so many rows and columns as it is stored (uint8), from row tile `above` on, to some row and column tiles.

        The same as `put` from `stored_tiles` with half of its calls: whoever reads at every token keeps the computing thread from
        Python's lock meanwhile."""
        for plane, stored in zip((self.codes, self.scale, self.minimum), _stored_planes(data, rows, columns, self.dtype)):
            target = plane[down, across]
            target[...] = stored[above : above + target.shape[0], : target.shape[1]]


def stored_tiles(data: np.ndarray, rows: int, columns: int, dtype: str) -> Tiles:
    """An int4 or int8 matrix as a view of its bytes in a record (uint8)."""
    return Tiles(*_stored_planes(data, rows, columns, dtype), *([None] if dtype == "int8" else []))


def _stored_planes(data: np.ndarray, rows: int, columns: int, dtype: str) -> Iterator[np.ndarray]:
    down, across, start = tiles_down(rows), tiles_across(columns), 0
    for size, kind, width in PLANES[dtype]:
        end = start + down * across * size
        yield data[start:end].view(kind).reshape(down, across, width)
        start = end


def aligned_bytes(size: int) -> np.ndarray:
    """Memory, uint8 [size], that begins at a cache line."""
    memory = np.zeros(size + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + size]
