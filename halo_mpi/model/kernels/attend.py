"""Attention of some rows over a KV head's cache, tile by tile, so that keys and values are read from memory once for all queries.

A tile is 32 positions, counted from position 0. Of every tile, a query's scores are turned into weights relative to the largest
score so far, and what was mixed before is scaled down when a larger one appears (online softmax, arXiv 1805.02867). Each query
goes through the same operations in the same order, whatever other rows and heads are there.
"""

import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import cgutils
from numba.extending import intrinsic

from halo_mpi.model.kernels.jit import step
from halo_mpi.model.kernels.tiles import LINE
from halo_mpi.model.kernels.vectors import F32, LANES, Lanes, compiled, floats_at, from_half, halves_at

TILE = 32  # positions; with their values 16 KiB at head dimension 64, half of a Cortex-A76's L1
VECTOR = 4 * LANES  # bytes
MOST_COLUMNS = 8  # vectors of the mix that are kept in registers at once
STATE = 4  # f32 by query: largest score, sum of weights, factor for what was mixed before, unused


@intrinsic
def score_keys(typing, query, keys, vectors, scores):
    """Scores of 8 keys below each other: the products of 8 * vectors values each."""

    def emit(lanes, query, keys, vectors, scores):
        build, kind = lanes.builder, ir.VectorType(F32, LANES)
        sums = [cgutils.alloca_once_value(build, lanes.fill(0.0)) for _ in range(LANES)]
        stride = build.mul(vectors, vectors.type(VECTOR))
        starts = [keys]
        for _ in sums[1:]:
            starts.append(build.add(starts[-1], stride))
        with cgutils.for_range(build, vectors) as loop:
            offset = build.mul(loop.index, vectors.type(VECTOR))
            part = lanes.load(build.add(query, offset))
            for total, start in zip(sums, starts):
                key = lanes.load(build.add(start, offset))
                build.store(lanes.fma(part, key, build.load(total, typ=kind)), total)
        lanes.store(lanes.sums([build.load(total, typ=kind) for total in sums]), scores)

    return compiled(emit, 4)


@intrinsic
def weigh(typing, scores, count, state):
    """Scores of a tile -> weights, in their place, and the new state of the query."""

    def emit(lanes, scores, count, state):
        build, kind = lanes.builder, ir.VectorType(F32, LANES)
        word = count.type
        vectors = build.udiv(build.add(count, word(LANES - 1)), word(LANES))
        least = lanes.fill(float("-inf"))
        most = cgutils.alloca_once_value(build, least)
        places = ir.Constant(ir.VectorType(word, LANES), list(range(LANES)))
        with cgutils.for_range(build, vectors) as loop:
            first = build.mul(loop.index, word(LANES))
            there = build.icmp_signed("<", build.add(lanes.fill(first), places), lanes.fill(count))
            address = build.add(scores, build.mul(loop.index, word(VECTOR)))
            part = build.select(there, lanes.load(address), least)
            lanes.store(part, address)
            build.store(lanes.greater(part, build.load(most, typ=kind)), most)
        before = lanes.load(state, 1)
        largest = lanes.greater(lanes.single(lanes.fold(build.load(most, typ=kind), lanes.greater)), before)
        factor = lanes.exp(build.fsub(before, largest))
        total = cgutils.alloca_once_value(build, lanes.fill(0.0))
        everywhere = lanes.fill(lanes.only(largest))
        with cgutils.for_range(build, vectors) as loop:
            address = build.add(scores, build.mul(loop.index, word(VECTOR)))
            part = lanes.exp(build.fsub(lanes.load(address), everywhere))
            lanes.store(part, address)
            build.store(build.fadd(build.load(total, typ=kind), part), total)
        added = lanes.single(lanes.fold(build.load(total, typ=kind), build.fadd))
        lanes.store(largest, state)
        lanes.store(lanes.fma(lanes.load(lanes.after(state, 4), 1), factor, added), lanes.after(state, 4))
        lanes.store(factor, lanes.after(state, 8))

    return compiled(emit, 3)


def _emit_mix(lanes: Lanes, columns: int, weights, count, values, stride, state, mixed) -> None:
    build, kind = lanes.builder, ir.VectorType(F32, LANES)
    factor = lanes.fill(lanes.only(lanes.load(lanes.after(state, 8), 1)))
    sums = []
    for column in range(columns):
        before = lanes.load(lanes.after(mixed, column * VECTOR))
        sums.append(cgutils.alloca_once_value(build, build.fmul(before, factor)))
    with cgutils.for_range(build, count) as loop:
        weight = lanes.fill(lanes.only(lanes.load(build.add(weights, build.mul(loop.index, count.type(4))), 1)))
        row = build.add(values, build.mul(loop.index, stride))
        for column, total in enumerate(sums):
            value = lanes.load(lanes.after(row, column * VECTOR))
            build.store(lanes.fma(weight, value, build.load(total, typ=kind)), total)
    for column, total in enumerate(sums):
        lanes.store(build.load(total, typ=kind), lanes.after(mixed, column * VECTOR))


@intrinsic
def mix_many(typing, weights, count, values, stride, state, mixed):
    """Add weighted values to what a query mixed before, in 64 columns; stride: bytes from one position's values to the next."""
    return compiled(lambda lanes, *values: _emit_mix(lanes, MOST_COLUMNS, *values), 6)


@intrinsic
def mix_few(typing, weights, count, values, stride, state, mixed):
    """Same, in 8 columns."""
    return compiled(lambda lanes, *values: _emit_mix(lanes, 1, *values), 6)


@intrinsic
def prefetch(typing, address):
    """Ask for a cache line that will be read soon."""

    def emit(lanes, address):
        place, word = lanes.builder.inttoptr(address, ir.IntType(8).as_pointer()), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, word, word, word])
        function = cgutils.get_or_insert_function(lanes.builder.module, kind, "llvm.prefetch.p0")
        lanes.builder.call(function, [place, word(0), word(3), word(1)])

    return compiled(emit, 1)


@step
def ask_for(tile, size, part, parts):
    """One of the parts of a tile in the cache, at the address and of so many bytes."""
    lines = size // LINE
    for line in range(lines * part // parts, lines * (part + 1) // parts):
        prefetch(tile + line * LINE)


@step
def copy_tile(cache, first, count, dim, half, tile):
    """Positions from a cache [context, dim] to a tile [32, dim filled up to 8] of f32, whose columns beyond dim are 0."""
    width = -(-dim // LANES) * LANES
    to = carray(floats_at(tile), (TILE, width))
    if half:
        halves = carray(halves_at(cache), (first + count, dim))
        for i in range(count):
            for j in range(dim):
                to[i, j] = from_half(halves[first + i, j])
            for j in range(dim, width):
                to[i, j] = 0
    else:
        floats = carray(floats_at(cache), (first + count, dim))
        for i in range(count):
            for j in range(dim):
                to[i, j] = floats[first + i, j]
            for j in range(dim, width):
                to[i, j] = 0


@step
def attend(queries, query_stride, heads, head_rows, keys, values, dim, context, half, position, rows, mixed, mixed_stride,
           head_columns, scratch):  # fmt: skip
    """Rows at `position` ... of neighbouring query heads that share a KV head; its keys and values [context, dim] include them.

    queries     f32 [rows, query_stride], scaled and rotated; a head's begin `head_rows` after another's
    mixed       f32 [rows, mixed_stride]; a head's begin `head_columns` after another's
    scratch     scores [heads, 32], states [rows, heads, 4], tiles of keys and of values [32, dim filled up to 8]
    """
    vectors = -(-dim // LANES)
    stride = vectors * VECTOR
    states = scratch + 4 * TILE * heads
    own_keys = states + 4 * STATE * rows * heads
    own_values = own_keys + TILE * stride
    state = carray(floats_at(states), (rows * heads, STATE))
    for query in range(rows * heads):
        state[query, 0] = -np.inf
        state[query, 1] = 0
    for row in range(rows):
        for head in range(heads):
            into = carray(floats_at(mixed + 4 * (row * mixed_stride + head * head_columns)), vectors * LANES)
            for column in range(vectors * LANES):
                into[column] = 0
    item = 2 if half else 4
    for first in range(0, position + rows, TILE):
        most = min(TILE, position + rows - first)
        if half or dim % LANES or first + TILE > context:
            copy_tile(keys, first, most, dim, half, own_keys)
            copy_tile(values, first, most, dim, half, own_values)
            tile_keys, tile_values = own_keys, own_values
        else:
            tile_keys, tile_values = keys + first * dim * item, values + first * dim * item
        size = max(0, min(TILE, position + rows - first - TILE)) * dim * item  # of the next tile
        next_keys, next_values = keys + (first + TILE) * dim * item, values + (first + TILE) * dim * item
        for row in range(max(0, first - position), rows):
            count = min(TILE, position + row + 1 - first)
            if row > 0:
                size = 0
            for head in range(heads):
                ask_for(next_keys, size, head, heads)
                query, to = queries + 4 * (row * query_stride + head * head_rows), scratch + 4 * TILE * head
                for key in range(0, count, LANES):
                    score_keys(query, tile_keys + key * stride, vectors, to + 4 * key)
            for head in range(heads):
                weigh(scratch + 4 * TILE * head, count, states + 4 * STATE * (row * heads + head))
            for head in range(heads):
                ask_for(next_values, size, head, heads)
                weights, here = scratch + 4 * TILE * head, states + 4 * STATE * (row * heads + head)
                into = mixed + 4 * (row * mixed_stride + head * head_columns)
                column = 0
                while column + MOST_COLUMNS <= vectors:
                    mix_many(weights, count, tile_values + column * VECTOR, stride, here, into + column * VECTOR)
                    column += MOST_COLUMNS
                while column < vectors:
                    mix_few(weights, count, tile_values + column * VECTOR, stride, here, into + column * VECTOR)
                    column += 1
    for row in range(rows):
        for head in range(heads):
            into = carray(floats_at(mixed + 4 * (row * mixed_stride + head * head_columns)), vectors * LANES)
            share = np.float32(1) / state[row * heads + head, 1]
            for column in range(vectors * LANES):
                into[column] *= share
