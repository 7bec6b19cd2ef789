"""The two halves of a layer as one compiled call each; see model/llama.py for what they compute.

    attention   x -> int8 -> qkv -> rotate, append to the cache -> attend -> int8 -> o
    ffn         x -> int8 -> gate, up -> silu(gate) * up -> int8 -> down

Rows go through in chunks of at most 64, whose intermediate values stay in the second-level cache; a row's result does not depend on the
others'. All threads of a team run the same function, and meet where a step needs what the others made.
"""

from functools import cache

from numba import carray, from_dtype, types
from numba.extending import intrinsic

from halo_mpi.model.kernels.jit import entry, step
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
from halo_mpi.model.kernels.team import JOB, LINE_WORDS, QUIT, await_call, call, meet
from halo_mpi.model.kernels.vectors import BLOCK, pointer_to, words_at

ROWS = 64  # of a chunk
ATTEND, APPEND, FEED, MULTIPLY = range(QUIT + 1, QUIT + 5)  # kinds of jobs


@step
def attention_part(a, work, x, count, position, result, thread):
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


@step
def append_part(a, work, x, count, position, thread):
    board, threads = work.board, work.threads
    for first in range(0, count, ROWS):
        rows = min(ROWS, count - first)
        quantize_rows(x + 4 * first * a.hidden, a.hidden, rows, a.kv.column_tiles, work, thread)
        meet(board, threads)
        product(a.kv, work, work.wide, rows, thread)
        meet(board, threads)
        place_rows(a, work.wide, a.kv.row_tiles * TILE_ROWS, 0, position + first, rows, threads, thread)
        meet(board, threads)


@step
def ffn_part(f, work, x, count, result, thread):
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


@step
def product_part(matrix, work, x, count, columns, result, thread):
    board, threads = work.board, work.threads
    for first in range(0, count, ROWS):
        rows = min(ROWS, count - first)
        quantize_rows(x + 4 * first * columns, columns, rows, matrix.column_tiles, work, thread)
        meet(board, threads)
        product(matrix, work, result + 4 * first * matrix.row_tiles * TILE_ROWS, rows, thread)
        meet(board, threads)


@entry
def attention(layers, works, x, position, result):
    """result [T, hidden] = what the heads of layers[0] add, for the normed input x [T, hidden]; appends K and V at `position`."""
    work = works[0]
    if x.shape[1] != layers[0].hidden or result.shape != x.shape:
        raise ValueError("input or result has another shape than the layer's")
    if work.threads > 1:
        call(work.board, ATTEND, layers.ctypes.data, works.ctypes.data, x.ctypes.data, len(x), position, result.ctypes.data)
    attention_part(layers[0], work, x.ctypes.data, len(x), position, result.ctypes.data, 0)


@entry
def append(layers, works, x, position):
    """Only append K and V of the normed input x [T, hidden] at `position`."""
    work = works[0]
    if x.shape[1] != layers[0].hidden:
        raise ValueError("input has another width than the layer's")
    if work.threads > 1:
        call(work.board, APPEND, layers.ctypes.data, works.ctypes.data, x.ctypes.data, len(x), position, 0)
    append_part(layers[0], work, x.ctypes.data, len(x), position, 0)


@entry
def ffn(layers, works, x, result):
    """result [T, hidden] = what the neurons of layers[0] add, for the normed input x [T, hidden]."""
    work = works[0]
    if x.shape[1] != layers[0].hidden or result.shape != x.shape:
        raise ValueError("input or result has another shape than the layer's")
    if work.threads > 1:
        call(work.board, FEED, layers.ctypes.data, works.ctypes.data, x.ctypes.data, len(x), 0, result.ctypes.data)
    ffn_part(layers[0], work, x.ctypes.data, len(x), result.ctypes.data, 0)


@entry
def rows_product(matrices, works, x, result):
    """result [T, matrix rows] = matrices[0] * x [T, columns]."""
    work, columns = works[0], x.shape[1]
    if matrices[0].column_tiles != -(-columns // BLOCK) or result.shape != (len(x), matrices[0].row_tiles * TILE_ROWS):
        raise ValueError("input or result has another shape than the matrix")
    if work.threads > 1:
        data = matrices.ctypes.data
        call(work.board, MULTIPLY, data, works.ctypes.data, x.ctypes.data, len(x), columns, result.ctypes.data)
    product_part(matrices[0], work, x.ctypes.data, len(x), columns, result.ctypes.data, 0)


def _record_at(dtype):
    @intrinsic
    def at(typing, address):
        """A pointer to a record."""
        return pointer_to(from_dtype(dtype))

    return at


attention_at, ffn_at, matrix_at, work_at = (_record_at(dtype) for dtype in (ATTENTION, FFN, MATRIX, WORK))


@entry
def serve(board, thread):
    """Take part in all calls of a team until it is told to quit."""
    address, calls = board.ctypes.data, 0
    job = carray(words_at(address + 8 * JOB), LINE_WORDS)
    while True:
        calls = await_call(address, calls)
        kind, data, x, count, position, result = job[0], job[1], job[3], job[4], job[5], job[6]
        if kind == QUIT:
            return
        work = carray(work_at(job[2]), 1)[0]
        if kind == ATTEND:
            attention_part(carray(attention_at(data), 1)[0], work, x, count, position, result, thread)
        elif kind == APPEND:
            append_part(carray(attention_at(data), 1)[0], work, x, count, position, thread)
        elif kind == FEED:
            ffn_part(carray(ffn_at(data), 1)[0], work, x, count, result, thread)
        else:
            product_part(carray(matrix_at(data), 1)[0], work, x, count, position, result, thread)


@cache
def prepare() -> None:
    """Compile all entries, or take them from the disk, for the only types that they accept from then on."""
    rows, words = types.float32[:, ::1], types.int64
    attention_record, ffn_record, matrix_record, work = (from_dtype(dtype)[::1] for dtype in (ATTENTION, FFN, MATRIX, WORK))
    for function, signature in (
        (attention, (attention_record, work, rows, words, rows)),
        (append, (attention_record, work, rows, words)),
        (ffn, (ffn_record, work, rows, rows)),
        (rows_product, (matrix_record, work, rows, rows)),
    ):
        function.compile(signature)
        function.disable_compile()
