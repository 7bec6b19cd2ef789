"""How one matrix becomes bytes. The quantized layouts are those that matrix-vector kernels read without repacking.

f32, f16, bf16: rows one after the other, little-endian (bf16 as the upper half of the f32).

int4 and int8 cut the matrix, padded with zero blocks, into tiles of 16 rows x 32 columns; a block is one row of a tile
(32 weights that share a scale). Three planes follow one another:

    codes     tile (b, g) of row block b and column group g, b-major
                int4, 256 bytes:  byte [j, r, i] (j < 4, r < 16, i < 4) = column 8j+i in the low nibble,
                                                                          column 8j+4+i in the high nibble, of row r
                int8, 512 bytes:  byte [j, r, i] (j < 8, r < 16, i < 4) = column 4j+i of row r, signed
    scale     f16 [b, g, 16]      one per block
    minimum   f16 [b, g, 16]      int4 only:  weight = scale * code + minimum;   int8:  weight = scale * code

So a vector register of 16 lanes holds 4 columns of 16 rows: what AVX-512 VNNI and (in four parts) NEON's sdot multiply.
The blocks hold the same numbers as GGUF's Q4_1 (arbitrary minimum), Q4_0 (minimum = -8 scale) and Q8_0.
"""

from dataclasses import dataclass

import numpy as np

from halo_mpi.errors import InputError

DTYPES = ("f32", "f16", "bf16", "int8", "int4")
BLOCK = 32  # columns that share a scale
TILE_ROWS = 16
RANGES_TRIED = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.7)  # of a 4-bit block


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix in 4-bit or 8-bit blocks of 32 columns.

    codes: uint8 0..15 (4 bits) or int8 (8 bits), [rows, columns]; scale and minimum: f16 [rows, columns / 32], minimum
    only with 4 bits.
    """

    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray | None

    @property
    def dtype(self) -> str:
        return "int8" if self.minimum is None else "int4"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    def dequantize(self) -> np.ndarray:
        """f32 [rows, columns]. Exact for 8 bits; for 4 bits one rounding, the same as in the gguf package."""
        rows, columns = self.shape
        codes = self.codes.reshape(rows, columns // BLOCK, BLOCK).astype(np.float32)
        codes *= self.scale.astype(np.float32)[..., None]
        if self.minimum is not None:
            codes += self.minimum.astype(np.float32)[..., None]
        return codes.reshape(rows, columns)

    def take(self, indices: np.ndarray, axis: int) -> "Blocks":
        """These rows (axis 0) or columns (axis 1), which must be whole blocks one after the other."""
        scales = indices if axis == 0 else indices[::BLOCK] // BLOCK
        minimum = None if self.minimum is None else self.minimum.take(scales, axis)
        return Blocks(self.codes.take(indices, axis), self.scale.take(scales, axis), minimum)

    @staticmethod
    def join(parts: list["Blocks"], axis: int) -> "Blocks":
        """Matrices below each other (axis 0) or side by side (axis 1)."""
        minimum = None if parts[0].minimum is None else np.concatenate([part.minimum for part in parts], axis)
        codes, scale = (np.concatenate([getattr(part, name) for part in parts], axis) for name in ("codes", "scale"))
        return Blocks(codes, scale, minimum)


def quantize(weights: np.ndarray, dtype: str) -> Blocks:
    """Round f32 [rows, columns] to blocks; columns a multiple of 32.

    8 bits: half a scale step of error at most. 4 bits: the least squared error of a few tries (see `_fit_4_bits`).
    """
    rows, columns = weights.shape
    blocks = weights.reshape(rows, columns // BLOCK, BLOCK)
    if dtype == "int8":
        scale = _as_f16(np.abs(blocks).max(-1) / 127)
        codes = np.rint(blocks / _divisor(scale)[..., None]).clip(-127, 127).astype(np.int8)
        return Blocks(codes.reshape(rows, columns), scale, None)
    codes, scale, minimum = _fit_4_bits(blocks)
    return Blocks(codes.reshape(rows, columns), scale, minimum)


def _fit_4_bits(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [..., 32], scale and minimum [...] of blocks f32 [..., 32], with the least squared error of a few tries.

    Each try covers a part of the block's range, so that an outlier does not coarsen the rest, and fits scale and minimum
    to its codes by least squares. The whole range comes first and wins a tie: weights that are on a 4-bit grid stay there.
    """
    low, high = blocks.min(-1), blocks.max(-1)
    best = None
    for covered in RANGES_TRIED:
        margin = (high - low) * (1 - covered) / 2
        scale, minimum = _as_f16((high - low - 2 * margin) / 15), _as_f16(low + margin)
        if covered < 1:
            codes = _codes_4_bits(blocks, scale, minimum)
            spread = codes - codes.mean(-1, keepdims=True)
            square = (spread**2).sum(-1)
            slope = (spread * blocks).sum(-1) / np.where(square == 0, np.float32(1), square)
            scale, minimum = _as_f16(slope), _as_f16(blocks.mean(-1) - slope * codes.mean(-1))
        codes = _codes_4_bits(blocks, scale, minimum)
        error = ((codes * scale.astype(np.float32)[..., None] + minimum.astype(np.float32)[..., None] - blocks) ** 2).sum(-1)
        if best is None:
            best = [codes, scale, minimum, error]
            continue
        better = error < best[3]
        for kept, tried in zip(best, (codes, scale, minimum, error)):
            kept[better] = tried[better]
    return best[0].astype(np.uint8), best[1], best[2]


def _codes_4_bits(blocks: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """The nearest codes 0..15, as f32."""
    return np.rint((blocks - minimum.astype(np.float32)[..., None]) / _divisor(scale)[..., None]).clip(0, 15)


def _as_f16(values: np.ndarray) -> np.ndarray:
    if values.size and not np.abs(values).max() <= np.finfo(np.float16).max:
        raise InputError("a weight is too large for the f16 scale of a quantized block; convert with --dtype f32 or bf16")
    return values.astype(np.float16)


def _divisor(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(1), scale.astype(np.float32))


def encoded_bytes(rows: int, columns: int, dtype: str) -> int:
    """Size in bytes of a matrix in this encoding."""
    if dtype in ("f32", "f16", "bf16"):
        return rows * columns * (4 if dtype == "f32" else 2)
    blocks = -(-rows // TILE_ROWS) * TILE_ROWS * -(-columns // BLOCK)
    return blocks * (BLOCK // 2 + 4 if dtype == "int4" else BLOCK + 2)


def encode(matrix: np.ndarray | Blocks, dtype: str) -> bytes:
    """The bytes of f32 [rows, columns], or of blocks, which pass unchanged if they are of this dtype already."""
    if dtype in ("f32", "f16", "bf16"):
        weights = matrix.dequantize() if isinstance(matrix, Blocks) else np.ascontiguousarray(matrix, "<f4")
        return _encode_plain(weights, dtype)
    if isinstance(matrix, Blocks) and matrix.dtype == dtype:
        blocks = matrix
    else:
        weights = matrix.dequantize() if isinstance(matrix, Blocks) else matrix
        blocks = quantize(np.pad(weights, ((0, 0), (0, -weights.shape[1] % BLOCK))), dtype)
    padding = ((0, -blocks.shape[0] % TILE_ROWS), (0, 0))
    planes = [_tile_codes(np.pad(blocks.codes, padding), dtype)]
    for plane in (blocks.scale, blocks.minimum):
        if plane is not None:
            padded = np.pad(plane, padding)
            planes.append(padded.reshape(-1, TILE_ROWS, padded.shape[1]).transpose(0, 2, 1).astype("<f2"))
    return b"".join(plane.tobytes() for plane in planes)


def decode_blocks(data: np.ndarray, rows: int, columns: int, dtype: str) -> Blocks:
    """The blocks of an int4 or int8 matrix from its bytes (uint8), padding columns included, padding rows cut off."""
    tiles_down, tiles_across = -(-rows // TILE_ROWS), -(-columns // BLOCK)
    count = tiles_down * tiles_across * TILE_ROWS  # blocks
    code_bytes = count * (BLOCK // 2 if dtype == "int4" else BLOCK)
    codes = data[:code_bytes]
    if dtype == "int4":
        pieces = codes.reshape(tiles_down, tiles_across, 4, TILE_ROWS, 4)
        codes = np.stack((pieces & 15, pieces >> 4), axis=3)  # [b, g, j, half, r, i]
        codes = codes.transpose(0, 4, 1, 2, 3, 5)
    else:
        codes = codes.view(np.int8).reshape(tiles_down, tiles_across, 8, TILE_ROWS, 4).transpose(0, 3, 1, 2, 4)
    codes = codes.reshape(tiles_down * TILE_ROWS, tiles_across * BLOCK)[:rows]

    def plane(start: int) -> np.ndarray:
        values = data[start : start + 2 * count].view("<f2").reshape(tiles_down, tiles_across, TILE_ROWS)
        return values.transpose(0, 2, 1).reshape(tiles_down * TILE_ROWS, tiles_across)[:rows]

    return Blocks(codes, plane(code_bytes), plane(code_bytes + 2 * count) if dtype == "int4" else None)


def decode(data: np.ndarray, rows: int, columns: int, dtype: str) -> np.ndarray:
    """f32 [rows, columns] from the bytes (uint8 [encoded_bytes]) of a matrix."""
    if dtype == "f32":
        return data.view("<f4").reshape(rows, columns)
    if dtype == "f16":
        return data.view("<f2").reshape(rows, columns).astype(np.float32)
    if dtype == "bf16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(rows, columns)
    return decode_blocks(data, rows, columns, dtype).dequantize()[:, :columns]


def _encode_plain(weights: np.ndarray, dtype: str) -> bytes:
    if dtype == "f32":
        return weights.tobytes()
    if dtype == "f16":
        if weights.size and not np.abs(weights).max() <= np.finfo(np.float16).max:
            raise InputError("a weight is too large for f16; convert with --dtype f32 or bf16")
        return weights.astype("<f2").tobytes()
    bits = weights.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    return rounded.astype("<u2").tobytes()


def _tile_codes(codes: np.ndarray, dtype: str) -> np.ndarray:
    tiles_down, tiles_across = codes.shape[0] // TILE_ROWS, codes.shape[1] // BLOCK
    if dtype == "int8":
        return codes.reshape(tiles_down, TILE_ROWS, tiles_across, 8, 4).transpose(0, 2, 3, 1, 4)
    nibbles = codes.reshape(tiles_down, TILE_ROWS, tiles_across, 4, 2, 4)  # [b, r, g, j, half, i]
    return (nibbles[:, :, :, :, 0] | nibbles[:, :, :, :, 1] << 4).transpose(0, 2, 3, 1, 4)
