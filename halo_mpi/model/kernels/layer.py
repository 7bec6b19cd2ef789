"""The two halves of a layer as one compiled call each; see model/llama.py for what they compute.

    attention   x -> int8 -> qkv -> rotate, append to the cache -> attend -> int8 -> o
    ffn         x -> int8 -> gate, up -> silu(gate) * up -> int8 -> down

What they work on is described by records of addresses and sizes, written once for a layer and its cache. Rows go through in chunks of
at most 64, whose intermediate values stay in the second-level cache; a row's result does not depend on the others'.
"""

import numpy as np
from numba import carray, njit

from halo_mpi.model.kernels.attend import attend
from halo_mpi.model.kernels.compiled import multiply
from halo_mpi.model.kernels.vectors import BLOCK, activate_block, floats_at, halves_at, quantize_block, to_half, words_at

ROWS = 64  # of a chunk

WORD = np.int64
MATRIX = np.dtype(
    [("products", WORD, 4)] + [(name, WORD) for name in ("codes", "scale", "minimum", "bias", "row_tiles", "column_tiles")]
)
ATTENTION = np.dtype(
    [(name, MATRIX) for name in ("qkv", "kv", "o")]  # kv: the last rows of qkv
    + [(name, WORD) for name in ("keys", "values", "runs", "cos", "sin", "heads", "kv_heads", "hidden", "dim", "context", "half")]
)
FFN = np.dtype([("gate_up", MATRIX), ("down", MATRIX), ("hidden", WORD)])
WORK = np.dtype([(name, WORD) for name in ("codes", "scale", "total", "wide", "mixed", "scratch", "result")])  # for a chunk


@njit(nogil=True, error_model="numpy")
def quantize_rows(x, columns, rows, column_tiles, work):
    """f32 [rows, columns] -> int8 codes [rows, 32 * column_tiles] of `work`, their scales and sums; zeros follow the columns."""
    tile, whole = 0, columns // BLOCK
    for row in range(rows):
        source = x + 4 * row * columns
        for block in range(whole):
            quantize_block(source + 4 * BLOCK * block, work.codes + BLOCK * tile, work.scale + 4 * tile, work.total + 4 * tile)
            tile += 1
        if whole < column_tiles:
            filled = np.zeros(BLOCK, np.float32)
            filled[: columns - whole * BLOCK] = carray(floats_at(source), columns)[whole * BLOCK :]
            quantize_block(filled.ctypes.data, work.codes + BLOCK * tile, work.scale + 4 * tile, work.total + 4 * tile)
            tile += 1


@njit(nogil=True, error_model="numpy")
def activate_rows(rows, column_tiles, work):
    """work.wide f32 [rows, gate, up] -> silu(gate) * up as int8 codes [rows, 32 * column_tiles], their scales and sums."""
    tile, neurons = 0, BLOCK * column_tiles
    for row in range(rows):
        for block in range(column_tiles):
            gate = work.wide + 4 * (2 * row * neurons + BLOCK * block)
            activate_block(gate, gate + 4 * neurons, work.codes + BLOCK * tile, work.scale + 4 * tile, work.total + 4 * tile)
            tile += 1


@njit(nogil=True, error_model="numpy")
def add_bias(y, bias, rows, columns):
    """Add a vector to each row of f32 [rows, columns]."""
    if bias:
        to, added = carray(floats_at(y), (rows, columns)), carray(floats_at(bias), columns)
        for row in range(rows):
            for column in range(columns):
                to[row, column] += added[column]


@njit(nogil=True, error_model="numpy")
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


@njit(nogil=True, error_model="numpy")
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


@njit(nogil=True, error_model="numpy")
def append_rows(a, kv, stride, head_rows, position, rows):
    """Rotate keys, and write keys and values of f32 [rows, stride], which begin at kv, to the cache at `position` ..."""
    for row in range(rows):
        angle = 4 * (position + row) * (a.dim // 2)
        for head in range(a.kv_heads):
            key = kv + 4 * (row * stride + head * head_rows)
            at = (head * a.context + position + row) * a.dim
            rotate(key, a.dim, a.cos + angle, a.sin + angle, np.float32(1))
            put(key, a.keys, at, a.dim, a.half)
            put(key + 4 * a.kv_heads * head_rows, a.values, at, a.dim, a.half)


@njit(nogil=True, error_model="numpy")
def product(matrix, work, y, rows):
    """y [rows, matrix rows] = matrix * the quantized rows, + its bias."""
    m, stride = matrix, matrix.row_tiles * 16
    multiply(
        m.products, m.codes, m.scale, m.minimum, work.codes, work.scale, work.total, y, rows, m.row_tiles, m.column_tiles, stride
    )
    add_bias(y, m.bias, rows, stride)


@njit(nogil=True, error_model="numpy")
def result_product(matrix, work, result, rows, hidden):
    """Same, of a matrix whose rows beyond `hidden` are fillers: result [rows, hidden]."""
    stride = matrix.row_tiles * 16
    if stride == hidden:
        product(matrix, work, result, rows)
        return
    product(matrix, work, work.result, rows)
    to, source = carray(floats_at(result), (rows, hidden)), carray(floats_at(work.result), (rows, stride))
    for row in range(rows):
        for column in range(hidden):
            to[row, column] = source[row, column]


@njit(nogil=True, error_model="numpy")
def mix(a, work, stride, head_rows, head_columns, position, rows):
    """work.mixed [rows, heads * head_columns] = what the query heads of work.wide [rows, stride] read in the cache."""
    scale, mixed_stride = np.float32(a.dim**-0.5), a.heads * head_columns
    for row in range(rows):
        angle = 4 * (position + row) * (a.dim // 2)
        for head in range(a.heads):
            rotate(work.wide + 4 * (row * stride + head * head_rows), a.dim, a.cos + angle, a.sin + angle, scale)
    runs = carray(words_at(a.runs), (a.kv_heads, 3))
    for run in range(a.kv_heads):
        kv, first, last = runs[run]
        start = kv * a.context * a.dim * (2 if a.half else 4)
        attend(
            work.wide + 4 * first * head_rows,
            stride,
            last - first,
            head_rows,
            a.keys + start,
            a.values + start,
            a.dim,
            a.context,
            a.half,
            position,
            rows,
            work.mixed + 4 * first * head_columns,
            mixed_stride,
            head_columns,
            work.scratch,
        )


@njit(nogil=True, error_model="numpy", cache=True)
def attention(layers, works, x, position, result):
    """result [T, hidden] = what the heads of layers[0] add, for the normed input x [T, hidden]; appends K and V at `position`."""
    a, work = layers[0], works[0]
    stride, mixed_stride = a.qkv.row_tiles * 16, a.o.column_tiles * BLOCK
    head_rows = stride // (a.heads + 2 * a.kv_heads)
    for first in range(0, len(x), ROWS):
        rows, here, offset = min(ROWS, len(x) - first), position + first, 4 * first * a.hidden
        quantize_rows(x.ctypes.data + offset, a.hidden, rows, a.qkv.column_tiles, work)
        product(a.qkv, work, work.wide, rows)
        append_rows(a, work.wide + 4 * a.heads * head_rows, stride, head_rows, here, rows)
        mix(a, work, stride, head_rows, mixed_stride // a.heads, here, rows)
        quantize_rows(work.mixed, mixed_stride, rows, a.o.column_tiles, work)
        result_product(a.o, work, result.ctypes.data + offset, rows, a.hidden)


@njit(nogil=True, error_model="numpy", cache=True)
def append(layers, works, x, position):
    """Only append K and V of the normed input x [T, hidden] at `position`."""
    a, work = layers[0], works[0]
    stride = a.kv.row_tiles * 16
    for first in range(0, len(x), ROWS):
        rows = min(ROWS, len(x) - first)
        quantize_rows(x.ctypes.data + 4 * first * a.hidden, a.hidden, rows, a.kv.column_tiles, work)
        product(a.kv, work, work.wide, rows)
        append_rows(a, work.wide, stride, stride // (2 * a.kv_heads), position + first, rows)


@njit(nogil=True, error_model="numpy", cache=True)
def ffn(layers, works, x, result):
    """result [T, hidden] = what the neurons of layers[0] add, for the normed input x [T, hidden]."""
    f, work = layers[0], works[0]
    for first in range(0, len(x), ROWS):
        rows, offset = min(ROWS, len(x) - first), 4 * first * f.hidden
        quantize_rows(x.ctypes.data + offset, f.hidden, rows, f.gate_up.column_tiles, work)
        product(f.gate_up, work, work.wide, rows)
        activate_rows(rows, f.down.column_tiles, work)
        result_product(f.down, work, result.ctypes.data + offset, rows, f.hidden)


@njit(nogil=True, error_model="numpy", cache=True)
def rows_product(matrices, works, x, result):
    """result [T, matrix rows] = matrices[0] * x [T, columns]."""
    work = works[0]
    for first in range(0, len(x), ROWS):
        rows = min(ROWS, len(x) - first)
        quantize_rows(x[first:].ctypes.data, x.shape[1], rows, matrices[0].column_tiles, work)
        product(matrices[0], work, result[first:].ctypes.data, rows)
