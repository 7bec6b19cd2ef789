"""The steps of a layer's halves, each on the part of one thread; between steps the threads meet.

What they work on is described by records of addresses and sizes, written once for a layer and its cache. Matrices of 16-row
tiles are split by tiles, all else by rows, heads or blocks, so that every number is computed by one thread, in one order.
"""

import numpy as np
from numba import carray

from halo_mpi.model.kernels.attend import attend
from halo_mpi.model.kernels.compiled import multiply
from halo_mpi.model.kernels.jit import step
from halo_mpi.model.kernels.team import own
from halo_mpi.model.kernels.tiles import CODE_BYTES, TILE_ROWS
from halo_mpi.model.kernels.vectors import BLOCK, activate_block, floats_at, halves_at, quantize_block, to_half, words_at

INT4_BYTES, INT8_BYTES = CODE_BYTES["int4"], CODE_BYTES["int8"]

WORD = np.int64
MATRIX = np.dtype(
    [("products", WORD, 4)] + [(name, WORD) for name in ("codes", "scale", "minimum", "bias", "row_tiles", "column_tiles")]
)
ATTENTION = np.dtype(
    [(name, MATRIX) for name in ("qkv", "kv", "o")]  # kv: the last rows of qkv
    + [(name, WORD) for name in ("keys", "values", "runs", "cos", "sin", "heads", "kv_heads", "hidden", "dim", "context", "half")]
)
FFN = np.dtype([("gate_up", MATRIX), ("down", MATRIX), ("hidden", WORD)])
BUFFERS = ("codes", "scale", "total", "wide", "mixed", "result", "scratch")  # for a chunk of rows; scratch: for each thread
WORK = np.dtype([(name, WORD) for name in (*BUFFERS, "scratch_bytes", "board", "threads")])


@step
def quantize_rows(x, columns, rows, column_tiles, work, thread):
    """f32 [rows, columns] -> int8 codes [rows, 32 * column_tiles] of `work`, their scales and sums; zeros follow the columns."""
    first, last = own(rows * column_tiles, thread, work.threads)
    for tile in range(first, last):
        row, column = tile // column_tiles, tile % column_tiles * BLOCK
        source = x + 4 * (row * columns + column)
        if column + BLOCK > columns:
            filled = work.scratch + thread * work.scratch_bytes
            values, to = carray(floats_at(source), BLOCK), carray(floats_at(filled), BLOCK)
            for i in range(BLOCK):
                to[i] = values[i] if column + i < columns else np.float32(0)
            source = filled
        quantize_block(source, work.codes + BLOCK * tile, work.scale + 4 * tile, work.total + 4 * tile)


@step
def activate_rows(rows, column_tiles, work, thread):
    """work.wide f32 [rows, gate, up] -> silu(gate) * up as int8 codes [rows, 32 * column_tiles], their scales and sums."""
    neurons = BLOCK * column_tiles
    first, last = own(rows * column_tiles, thread, work.threads)
    for tile in range(first, last):
        row, column = tile // column_tiles, tile % column_tiles * BLOCK
        gate = work.wide + 4 * (2 * row * neurons + column)
        activate_block(gate, gate + 4 * neurons, work.codes + BLOCK * tile, work.scale + 4 * tile, work.total + 4 * tile)


@step
def product(matrix, work, y, rows, thread):
    """y [rows, matrix rows] = matrix * the quantized rows, + its bias."""
    first, last = own(matrix.row_tiles, thread, work.threads)
    if last == first:
        return
    stride, start, tile = matrix.row_tiles * TILE_ROWS, first * TILE_ROWS, first * matrix.column_tiles
    multiply(
        matrix.products,
        matrix.codes + tile * (INT4_BYTES if matrix.minimum else INT8_BYTES),
        matrix.scale + tile * 2 * TILE_ROWS,
        matrix.minimum + tile * 2 * TILE_ROWS if matrix.minimum else 0,
        work.codes,
        work.scale,
        work.total,
        y + 4 * start,
        rows,
        last - first,
        matrix.column_tiles,
        stride,
    )
    if matrix.bias:
        columns = (last - first) * TILE_ROWS
        added = carray(floats_at(matrix.bias + 4 * start), columns)
        for row in range(rows):
            to = carray(floats_at(y + 4 * (row * stride + start)), columns)
            for column in range(columns):
                to[column] += added[column]


@step
def result_product(matrix, work, result, rows, hidden, thread):
    """Same, of a matrix whose rows beyond `hidden` are fillers: result [rows, hidden]."""
    stride = matrix.row_tiles * TILE_ROWS
    if stride == hidden:
        product(matrix, work, result, rows, thread)
        return
    product(matrix, work, work.result, rows, thread)
    first, last = own(matrix.row_tiles, thread, work.threads)
    to, source = carray(floats_at(result), (rows, hidden)), carray(floats_at(work.result), (rows, stride))
    for row in range(rows):
        for column in range(first * TILE_ROWS, min(hidden, last * TILE_ROWS)):
            to[row, column] = source[row, column]


@step
def rotate(y, dim, cos, sin, scale):
    """Rotary embedding of one head, in place, then times `scale`; cos, sin: of its position."""
    half = dim // 2
    head = carray(floats_at(y), dim)
    low, high = head[:half], head[half:]
    real, imaginary = carray(floats_at(cos), half), carray(floats_at(sin), half)
    for i in range(half):
        first, second = low[i], high[i]
        low[i] = (first * real[i] - second * imaginary[i]) * scale
        high[i] = (second * real[i] + first * imaginary[i]) * scale


@step
def put(source, cache, at, dim, half):
    """Copy f32 [dim] to element `at` ... of a cache of f32 or f16."""
    values = carray(floats_at(source), dim)
    if half:
        halves = carray(halves_at(cache + 2 * at), dim)
        for i in range(dim):
            halves[i] = to_half(values[i])
    else:
        floats = carray(floats_at(cache + 4 * at), dim)
        for i in range(dim):
            floats[i] = values[i]


@step
def place_rows(a, y, stride, heads, position, rows, threads, thread):
    """Rotate queries and keys of f32 [rows, stride], `heads` queries first; keys and values go to the cache at `position` ..."""
    head_rows, scale = stride // (heads + 2 * a.kv_heads), np.float32(a.dim**-0.5)
    first, last = own(rows * (heads + a.kv_heads), thread, threads)
    for item in range(first, last):
        row, head = item // (heads + a.kv_heads), item % (heads + a.kv_heads)
        angle, values = 4 * (position + row) * (a.dim // 2), y + 4 * (row * stride + head * head_rows)
        rotate(values, a.dim, a.cos + angle, a.sin + angle, scale if head < heads else np.float32(1))
        if head >= heads:
            at = ((head - heads) * a.context + position + row) * a.dim
            put(values, a.keys, at, a.dim, a.half)
            put(values + 4 * a.kv_heads * head_rows, a.values, at, a.dim, a.half)


@step
def mix(a, work, position, rows, thread):
    """work.mixed [rows, heads * head_columns] = what the query heads of work.wide [rows, stride] read in the cache."""
    stride, mixed_stride = a.qkv.row_tiles * TILE_ROWS, a.o.column_tiles * BLOCK
    head_rows, head_columns = stride // (a.heads + 2 * a.kv_heads), mixed_stride // a.heads
    by_rows = rows >= work.threads
    first_row, last_row = own(rows, thread, work.threads) if by_rows else (0, rows)
    first_head, last_head = (0, a.heads) if by_rows else own(a.heads, thread, work.threads)
    runs = carray(words_at(a.runs), (a.kv_heads, 3))
    for run in range(a.kv_heads):
        kv, first, last = runs[run]
        first, last = max(first, first_head), min(last, last_head)
        if first >= last:
            continue
        start = kv * a.context * a.dim * (2 if a.half else 4)
        attend(
            work.wide + 4 * (first_row * stride + first * head_rows),
            stride,
            last - first,
            head_rows,
            a.keys + start,
            a.values + start,
            a.dim,
            a.context,
            a.half,
            position + first_row,
            last_row - first_row,
            work.mixed + 4 * (first_row * mixed_stride + first * head_columns),
            mixed_stride,
            head_columns,
            work.scratch + thread * work.scratch_bytes,
        )
