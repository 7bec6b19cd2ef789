"""Attention of some rows over a KV head's cache, tile by tile, so that keys and values are read from memory once for all queries.

A tile is 32 positions, counted from position 0. Of every tile, a query's scores are turned into weights relative to the largest
score so far, and what was mixed before is scaled down when a larger one appears (online softmax, arXiv 1805.02867). Each query
goes through the same operations in the same order, whatever other rows and heads are there.

One row reads an f16 cache as it is, and up to 3 heads share what a register holds of it; many rows share a copy of the tile in f32.
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
GROUP = 3  # heads that are computed together, if there are so many
MOST = 8  # vectors of sums that one head keeps in registers; three heads 12, of the 16 registers that AVX2 has
KEYS = {1: MOST, GROUP: MOST // 2}  # that are scored at once, and
COLUMNS = {1: MOST, GROUP: MOST // 2}  # vectors of the mix that are made at once, by so many heads
STATE = 4  # f32 by query: largest score, sum of weights, factor for what was mixed before, unused


def _numbers(lanes: Lanes, address, half: bool):
    """A vector of the cache, as f32."""
    if not half:
        return lanes.load(address)
    return lanes.builder.fpext(lanes.load(address, kind=ir.HalfType()), ir.VectorType(F32, LANES))


def _emit_scores(lanes: Lanes, heads: int, half: bool, query, query_step, keys, vectors, scores) -> None:
    build, kind, word = lanes.builder, ir.VectorType(F32, LANES), vectors.type
    width = word(VECTOR // 2 if half else VECTOR)
    stride = build.mul(vectors, width)
    queries, starts = [query], [keys]
    for _ in range(1, heads):
        queries.append(build.add(queries[-1], query_step))
    for _ in range(1, LANES):
        starts.append(build.add(starts[-1], stride))
    sums = [[cgutils.alloca_once_value(build, lanes.fill(0.0)) for _ in starts] for _ in queries]
    for first in range(0, LANES, KEYS[heads]):
        with cgutils.for_range(build, vectors) as loop:
            offset, at = build.mul(loop.index, word(VECTOR)), build.mul(loop.index, width)
            parts = [lanes.load(build.add(start, offset)) for start in queries]
            for number in range(first, first + KEYS[heads]):
                key = _numbers(lanes, build.add(starts[number], at), half)
                for part, totals in zip(parts, sums):
                    build.store(lanes.fma(part, key, build.load(totals[number], typ=kind)), totals[number])
    for head, totals in enumerate(sums):
        lanes.store(lanes.sums([build.load(total, typ=kind) for total in totals]), lanes.after(scores, 4 * TILE * head))


def _scores(heads: int, half: bool):
    """Scores of 8 keys below each other, for some heads: the products of 8 * vectors values each."""

    @intrinsic
    def score(typing, query, query_step, keys, vectors, scores):
        return compiled(lambda lanes, *values: _emit_scores(lanes, heads, half, *values), 5)

    return score


score_1, score_3, score_1_half, score_3_half = (_scores(heads, half) for half in (False, True) for heads in KEYS)


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


def _emit_mix(
    lanes: Lanes, heads: int, columns: int, half: bool, weights, count, values, stride, state, mixed, mixed_step
) -> None:
    build, kind, word = lanes.builder, ir.VectorType(F32, LANES), count.type
    width, sums, places = VECTOR // 2 if half else VECTOR, [], [mixed]
    for _ in range(1, heads):
        places.append(build.add(places[-1], mixed_step))
    for head, place in enumerate(places):
        factor = lanes.fill(lanes.only(lanes.load(lanes.after(state, 4 * (STATE * head + 2)), 1)))
        before = [lanes.load(lanes.after(place, column * VECTOR)) for column in range(columns)]
        sums.append([cgutils.alloca_once_value(build, build.fmul(part, factor)) for part in before])
    with cgutils.for_range(build, count) as loop:
        weight = build.add(weights, build.mul(loop.index, word(4)))
        row = build.add(values, build.mul(loop.index, stride))
        by_head = [lanes.fill(lanes.only(lanes.load(lanes.after(weight, 4 * TILE * head), 1))) for head in range(heads)]
        for column in range(columns):
            value = _numbers(lanes, lanes.after(row, column * width), half)
            for own, totals in zip(by_head, sums):
                build.store(lanes.fma(own, value, build.load(totals[column], typ=kind)), totals[column])
    for place, totals in zip(places, sums):
        for column, total in enumerate(totals):
            lanes.store(build.load(total, typ=kind), lanes.after(place, column * VECTOR))


def _mix(heads: int, half: bool, columns: int):
    """Add weighted values to what some heads mixed before, in 8 * columns; stride: bytes from one position's values to the next."""

    @intrinsic
    def mix(typing, weights, count, values, stride, state, mixed, mixed_step):
        return compiled(lambda lanes, *values: _emit_mix(lanes, heads, columns, half, *values), 7)

    return mix


mix_1, mix_3, mix_1_half, mix_3_half = (_mix(heads, half, COLUMNS[heads]) for half in (False, True) for heads in COLUMNS)
mix_few = _mix(1, False, 1)


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
def ask_for(tile, size, first, last, of):
    """Parts `first` to `last` of a tile of so many bytes."""
    lines = size // LINE
    for line in range(lines * first // of, lines * last // of):
        prefetch(tile + line * LINE)


@step
def score_tile(group, half, query, query_step, keys, count, vectors, scores, coming, size):
    """Scores f32 [group, 32] of a tile's first `count` keys; `coming`: the next tile's, which are asked for meanwhile."""
    stride = vectors * (VECTOR // 2 if half else VECTOR)
    for key in range(0, count, LANES):
        ask_for(coming, size, key, key + LANES, TILE)
        here, to = keys + key * stride, scores + 4 * key
        if group == 1 and half:
            score_1_half(query, query_step, here, vectors, to)
        elif group == 1:
            score_1(query, query_step, here, vectors, to)
        elif half:
            score_3_half(query, query_step, here, vectors, to)
        else:
            score_3(query, query_step, here, vectors, to)


@step
def mix_tile(group, half, weights, count, values, vectors, state, mixed, mixed_step, coming, size):
    """Add a tile's first `count` values, weighted, to f32 [group, 8 * vectors]. Whole registers: of several heads, and of f16."""
    width, many, column = VECTOR // 2 if half else VECTOR, MOST if group == 1 else MOST // 2, 0
    stride = vectors * width
    while column < vectors:
        taken = many if column + many <= vectors else 1
        ask_for(coming, size, column, column + taken, vectors)
        here, to = values + column * width, mixed + column * VECTOR
        if taken == 1:
            mix_few(weights, count, here, stride, state, to, mixed_step)
        elif group == 1 and half:
            mix_1_half(weights, count, here, stride, state, to, mixed_step)
        elif group == 1:
            mix_1(weights, count, here, stride, state, to, mixed_step)
        elif half:
            mix_3_half(weights, count, here, stride, state, to, mixed_step)
        else:
            mix_3(weights, count, here, stride, state, to, mixed_step)
        column += taken


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
    item, whole = 2 if half else 4, vectors % MOST == 0 and dim % LANES == 0  # registers of the mix
    for first in range(0, position + rows, TILE):
        most = min(TILE, position + rows - first)
        if first + TILE > context or dim % LANES or half and not (whole and rows == 1):
            copy_tile(keys, first, most, dim, half, own_keys)
            copy_tile(values, first, most, dim, half, own_values)
            tile_keys, tile_values, halves = own_keys, own_values, False
        else:
            tile_keys, tile_values, halves = keys + first * dim * item, values + first * dim * item, half
        size = max(0, min(TILE, position + rows - first - TILE)) * dim * item  # of the next tile
        next_keys, next_values = keys + (first + TILE) * dim * item, values + (first + TILE) * dim * item
        for row in range(max(0, first - position), rows):
            count, head = min(TILE, position + row + 1 - first), 0
            while head < heads:
                group = GROUP if whole and heads - head >= GROUP else 1
                query, scores = queries + 4 * (row * query_stride + head * head_rows), scratch + 4 * TILE * head
                score_tile(group, halves, query, 4 * head_rows, tile_keys, count, vectors, scores, next_keys, size)
                for each in range(head, head + group):
                    weigh(scratch + 4 * TILE * each, count, states + 4 * STATE * (row * heads + each))
                here, into = states + 4 * STATE * (row * heads + head), mixed + 4 * (row * mixed_stride + head * head_columns)
                mix_tile(group, halves, scores, count, tile_values, vectors, here, into, 4 * head_columns, next_values, size)
                head, size = head + group, 0
    for row in range(rows):
        for head in range(heads):
            into = carray(floats_at(mixed + 4 * (row * mixed_stride + head * head_columns)), vectors * LANES)
            share = np.float32(1) / state[row * heads + head, 1]
            for column in range(vectors * LANES):
                into[column] *= share
