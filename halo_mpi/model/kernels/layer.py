"""The two halves of a layer as one compiled call each; see model/llama.py for what they compute.

    attention   x -> int8 -> qkv -> rotate, append to the cache -> attend -> int8 -> o
    ffn         x -> int8 -> gate, up -> silu(gate) * up -> int8 -> down

Rows go through in chunks of at most 64, whose intermediate values stay in the second-level cache; a row's result does not
depend on the others'. All threads of a team run the same function, and meet where a step needs what the others made.
"""

from dataclasses import dataclass
from functools import cache

from numba import carray, from_dtype
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from halo_mpi.model.kernels.jit import part
from halo_mpi.model.kernels.steps import (
    ATTENTION,
    FFN,
    MATRIX,
    TILE_ROWS,
    WORK,
    activate_rows,
    mix,
    place_rows,
    product,
    quantize_rows,
    result_product,
)
from halo_mpi.model.kernels.team import meet
from halo_mpi.model.kernels.vectors import BLOCK, pointer_to

ROWS = 64  # of a chunk


def _record_at(dtype):
    @intrinsic
    def at(typing, address):
        """A pointer to a record."""
        return pointer_to(from_dtype(dtype))

    return at


attention_at, ffn_at, matrix_at, work_at = (_record_at(dtype) for dtype in (ATTENTION, FFN, MATRIX, WORK))


def attention(data, works, x, count, position, result, thread):
    """result = what a layer's heads add, [count, hidden], for the normed input x [count, hidden]; appends K and V."""
    a, work = carray(attention_at(data), 1)[0], carray(work_at(works), 1)[0]
    board, threads = work.board, work.threads
    stride, mixed = a.qkv.row_tiles * TILE_ROWS, a.o.column_tiles * BLOCK
    for first in range(0, count, ROWS):
        rows, here, offset = min(ROWS, count - first), position + first, 4 * first * a.hidden
        quantize_rows(x + offset, a.hidden, rows, a.qkv.column_tiles, work, thread)
        meet(board, threads)
        product(a.qkv, work, work.wide, rows, thread)
        meet(board, threads)
        place_rows(a, work.wide, stride, a.heads, here, rows, threads, thread)
        meet(board, threads)
        mix(a, work, here, rows, thread)
        meet(board, threads)
        quantize_rows(work.mixed, mixed, rows, a.o.column_tiles, work, thread)
        meet(board, threads)
        result_product(a.o, work, result + offset, rows, a.hidden, thread)
        meet(board, threads)


def append(data, works, x, count, position, result, thread):
    """Only append K and V of the normed input x [count, hidden] at `position`."""
    a, work = carray(attention_at(data), 1)[0], carray(work_at(works), 1)[0]
    board, threads = work.board, work.threads
    for first in range(0, count, ROWS):
        rows = min(ROWS, count - first)
        quantize_rows(x + 4 * first * a.hidden, a.hidden, rows, a.kv.column_tiles, work, thread)
        meet(board, threads)
        product(a.kv, work, work.wide, rows, thread)
        meet(board, threads)
        place_rows(a, work.wide, a.kv.row_tiles * TILE_ROWS, 0, position + first, rows, threads, thread)
        meet(board, threads)


def ffn(data, works, x, count, position, result, thread):
    """result [count, hidden] = what the neurons of a layer add, for the normed input x [count, hidden]."""
    f, work = carray(ffn_at(data), 1)[0], carray(work_at(works), 1)[0]
    board, threads = work.board, work.threads
    for first in range(0, count, ROWS):
        rows, offset = min(ROWS, count - first), 4 * first * f.hidden
        quantize_rows(x + offset, f.hidden, rows, f.gate_up.column_tiles, work, thread)
        meet(board, threads)
        product(f.gate_up, work, work.wide, rows, thread)
        meet(board, threads)
        activate_rows(rows, f.down.column_tiles, work, thread)
        meet(board, threads)
        result_product(f.down, work, result + offset, rows, f.hidden, thread)
        meet(board, threads)


def multiply_rows(data, works, x, count, columns, result, thread):
    """result [count, matrix rows] = matrix * x [count, columns]."""
    matrix, work = carray(matrix_at(data), 1)[0], carray(work_at(works), 1)[0]
    board, threads = work.board, work.threads
    for first in range(0, count, ROWS):
        rows = min(ROWS, count - first)
        quantize_rows(x + 4 * first * columns, columns, rows, matrix.column_tiles, work, thread)
        meet(board, threads)
        product(matrix, work, result + 4 * first * matrix.row_tiles * TILE_ROWS, rows, thread)
        meet(board, threads)


@dataclass(frozen=True, slots=True)
class Parts:
    """Addresses of the functions above."""

    attention: int
    append: int
    ffn: int
    multiply_rows: int
    _functions: tuple[CFunc, ...]  # own the code


@cache
def parts() -> Parts:
    """Compiled, or taken from the disk."""
    functions = tuple(part(function, 7) for function in (attention, append, ffn, multiply_rows))
    return Parts(*(function.address for function in functions), functions)
