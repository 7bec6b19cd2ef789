"""Single rows of a quantized matrix as f32: the embedding of tokens."""

import numpy as np

from halo_mpi.model.kernels.jit import entry
from halo_mpi.model.kernels.tiles import TILE_ROWS, Tiles
from halo_mpi.model.kernels.vectors import BLOCK, from_half


def dequantized_rows(tiles: Tiles, indices: list[int] | np.ndarray, columns: int) -> np.ndarray:
    """f32 [indices, columns]."""
    indices = np.asarray(indices, np.int64)
    if len(indices) and not 0 <= indices.min() <= indices.max() < tiles.shape[0]:
        raise ValueError(f"rows {indices.min()} to {indices.max()} of {tiles.shape[0]}")
    result = np.empty((len(indices), columns), np.float32)
    if tiles.minimum is None:
        read_int8(tiles.codes.view(np.int8), tiles.scale.view(np.uint16), indices, result)
    else:
        read_int4(tiles.codes, tiles.scale.view(np.uint16), tiles.minimum.view(np.uint16), indices, result)
    return result


@entry
def read_int8(codes, scale, indices, result):
    """codes int8 [b, g, 512]; scale: bits of f16 [b, g, 16]."""
    for number, index in enumerate(indices):
        down, row = index // TILE_ROWS, index % TILE_ROWS
        for column in range(result.shape[1]):
            across, inner = column // BLOCK, column % BLOCK
            code = codes[down, across, inner // 4 * 64 + row * 4 + inner % 4]
            result[number, column] = np.float32(code) * from_half(scale[down, across, row])


@entry
def read_int4(codes, scale, minimum, indices, result):
    """codes uint8 [b, g, 256]; scale, minimum: bits of f16 [b, g, 16]."""
    for number, index in enumerate(indices):
        down, row = index // TILE_ROWS, index % TILE_ROWS
        for column in range(result.shape[1]):
            across, inner = column // BLOCK, column % BLOCK
            both = codes[down, across, inner // 8 * 64 + row * 4 + inner % 4]
            code = np.float32(both >> 4 if inner & 4 else both & 15)
            result[number, column] = code * from_half(scale[down, across, row]) + from_half(minimum[down, across, row])
