"""From records to the fused matrices that a rank computes with; only the records of its own share are read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.kernel import Copied, Kernel, OwnForm
from halo_mpi.model.kernels.tiles import Tiles
from halo_mpi.model.layer_weights import LayerWeights, runs_of
from halo_mpi.model.records import VOCABULARY_BLOCK, vocabulary_blocks
from halo_mpi.model.sizes import Shapes
from halo_mpi.store.encoding import BLOCK, TILE_ROWS
from halo_mpi.store.layout import RecordLayout
from halo_mpi.store.reader import ModelStore


@dataclass(slots=True)
class HeadBlock:
    """Some neighbouring rows of the head."""

    rows: Any = None  # [rows, D]


@dataclass(frozen=True, slots=True)
class Part:
    """What is read at once: matrices of `owner`, their shapes by name, and what reads them into the room that `owner` has.

    `expect`: tells that it will be read soon.
    """

    owner: LayerWeights | HeadBlock | None
    shapes: Shapes
    read: Callable[[], None]
    kernel: Kernel | None = None
    expect: Callable[[], None] = lambda: None

    def make_room(self, memory: np.ndarray | None = None) -> None:
        """Give the owner matrices of these shapes: in memory of their own, or one after the other in `memory` (uint8, at a cache line)."""
        for name, shape in self.shapes.items():
            setattr(self.owner, name, self.kernel.make(shape, memory))
            if memory is not None:
                memory = memory[shape.nbytes :]


@dataclass(frozen=True, slots=True)
class Held:
    """What is in memory already of some heads (ascending) and groups of a layer, and need not be read."""

    weights: LayerWeights = field(default_factory=LayerWeights)
    heads: list[int] = ()
    groups: list[int] = ()


NOTHING = Held()


def down_dtype(store: ModelStore) -> str:
    """In which the FFN's down is stored: calibration gives it more bits than the rest has."""
    return store.layout("ffn").parts["down"].dtype if store.entries("ffn") else store.meta["dtype"]


def share_parts(
    store: ModelStore, kernel: Kernel, query_heads: list[list[int]], groups: list[list[int]]
) -> tuple[list[LayerWeights], list[Part]]:
    """The layers of a share, without room yet, and what they are read in: attention of layer 0, its FFN, attention of layer 1 ..."""
    layers = [LayerWeights() for _ in query_heads]
    parts = [
        part
        for layer, (weights, heads, own) in enumerate(zip(layers, query_heads, groups))
        for part in (attention_part(store, kernel, layer, heads, weights), ffn_part(store, kernel, layer, own, weights))
    ]
    return layers, parts


def attention_part(
    store: ModelStore, kernel: Kernel, layer: int, query_heads: list[int], weights: LayerWeights, held: Held = NOTHING
) -> Part:
    """What reads query heads (ascending) of a layer, and their KV heads, into `weights`."""
    held = held if kernel.copies else NOTHING
    weights.runs = runs_of(query_heads, kernel.sizes.config.heads_per_kv)[1]
    shapes = kernel.sizes.attention(query_heads, set(store.meta["biases"]))
    config, read = kernel.sizes.config, partial(read_attention, store, kernel, layer, query_heads, weights, held)
    records = _blocks_of(config, query_heads).keys() - _blocks_of(config, held.heads).keys()
    return Part(weights, shapes, read, kernel, partial(store.expect, layer, sorted(records)))


def ffn_part(
    store: ModelStore, kernel: Kernel, layer: int, groups: list[int], weights: LayerWeights, held: Held = NOTHING
) -> Part:
    """What reads FFN groups of a layer into `weights`."""
    held = held if kernel.copies else NOTHING
    shapes = kernel.sizes.ffn(groups, set(store.meta["biases"]))
    read = partial(read_ffn, store, kernel, layer, groups, weights, held)
    records = [("ffn", group) for group in groups if group not in held.groups]
    return Part(weights, shapes, read, kernel, partial(store.expect, layer, records))


def head_parts(store: ModelStore, kernel: Kernel) -> tuple[list[HeadBlock], list[Part]]:
    """The head, cut as it is stored; without room yet."""
    config = kernel.sizes.config
    blocks = [HeadBlock() for _ in range(vocabulary_blocks(config))]
    parts = []
    for number, block in enumerate(blocks):
        read, expect = partial(read_head, store, config, number, block), partial(store.expect, 0, [(head_table(config), number)])
        parts.append(Part(block, kernel.sizes.head(number), read, kernel, expect))
    return blocks, parts


def scores_part(store: ModelStore, kernel: Kernel, start: int, stop: int, rows: HeadBlock) -> Part:
    """What reads the head's rows from `start`, at a tile, to `stop` into `rows`."""
    table = head_table(kernel.sizes.config)
    records = [(table, block) for block in range(start // VOCABULARY_BLOCK, -(-stop // VOCABULARY_BLOCK))]
    read = partial(read_scores, store, kernel, start, stop, rows)
    return Part(rows, kernel.sizes.scores(stop - start), read, kernel, partial(store.expect, 0, records))


def read_attention(
    store: ModelStore, kernel: Kernel, layer: int, query_heads: list[int], weights: LayerWeights, held: Held = NOTHING
) -> None:
    """Read query heads (ascending) and their KV heads into the room that the weights have for them."""
    sizes, biased = kernel.sizes, set(store.meta["biases"])
    dim, hidden = sizes.config.head_dim, slice(0, sizes.config.hidden)
    bias = None if weights.qkv_bias is None else np.asarray(weights.qkv_bias)
    if bias is not None:
        bias[:] = 0
    here = _blocks_of(sizes.config, held.heads)

    def rows(block: int) -> slice:
        return slice(block * sizes.head_rows, (block + 1) * sizes.head_rows)

    def columns(block: int) -> slice:
        return slice(block * sizes.head_columns, (block + 1) * sizes.head_columns)

    for (table, entry), blocks in _blocks_of(sizes.config, query_heads).items():
        if (table, entry) in here:
            for name, block in blocks.items():
                before = here[table, entry][name]
                copy(weights.qkv, rows(block), hidden, held.weights.qkv, rows(before), hidden)
                if bias is not None:
                    bias[rows(block)] = np.asarray(held.weights.qkv_bias)[rows(before)]
                if table == "query":
                    copy(weights.o, hidden, columns(block), held.weights.o, hidden, columns(before))
            continue
        record, layout = store.read(table, layer, entry), store.layout(table)
        for name, block in blocks.items():
            fill(weights.qkv, rows(block), hidden, layout, record, name)
            if name in biased:
                bias[rows(block)][:dim] = layout.unpack(record, f"{name}.bias")[0]
            if table == "query":
                fill(weights.o, hidden, columns(block), layout, record, "o")


def _blocks_of(config: ModelConfig, query_heads: list[int]) -> dict[tuple[str, int], dict[str, int]]:
    """By table and entry: where the matrices of a record lie in qkv, counted in heads. A query head's in o is its q's."""
    kv_heads, _ = runs_of(query_heads, config.heads_per_kv)
    heads, keys = len(query_heads), len(kv_heads)
    blocks = {("query", head): {"q": local} for local, head in enumerate(query_heads)}
    return blocks | {("kv", head): {"k": heads + local, "v": heads + keys + local} for local, head in enumerate(kv_heads)}


def read_ffn(
    store: ModelStore, kernel: Kernel, layer: int, groups: list[int], weights: LayerWeights, held: Held = NOTHING
) -> None:
    """Read FFN groups into the room that the weights have for them."""
    biased, hidden = set(store.meta["biases"]), slice(0, kernel.sizes.config.hidden)
    bias = None if weights.gate_up_bias is None else np.asarray(weights.gate_up_bias)
    if bias is not None:
        bias[:] = 0
    (columns, half), (columns_before, half_before) = _columns_of(kernel, groups), _columns_of(kernel, held.groups)
    for group, own in columns.items():
        gate, up = own, slice(own.start + half, own.stop + half)
        if group in columns_before:
            before = columns_before[group]
            up_before = slice(before.start + half_before, before.stop + half_before)
            copy(weights.down, hidden, own, held.weights.down, hidden, before)
            for rows, rows_before in ((gate, before), (up, up_before)):
                copy(weights.gate_up, rows, hidden, held.weights.gate_up, rows_before, hidden)
                if bias is not None:
                    bias[rows] = np.asarray(held.weights.gate_up_bias)[rows_before]
            continue
        record, layout = store.read("ffn", layer, group), store.layout("ffn")
        for name, rows in (("gate", gate), ("up", up)):
            fill(weights.gate_up, rows, hidden, layout, record, name)
            if name in biased:
                bias[rows] = layout.unpack(record, f"{name}.bias")[0, : rows.stop - rows.start]
        fill(weights.down, hidden, own, layout, record, "down")


def _columns_of(kernel: Kernel, groups: list[int]) -> tuple[dict[int, slice], int]:
    """Where each group's neurons lie in a share, and how many there are in all."""
    found, end = {}, 0
    for group in groups:
        found[group] = slice(end, end := end + kernel.sizes.neurons(group))
    return found, end


def read_head(store: ModelStore, config: ModelConfig, number: int, block: HeadBlock) -> None:
    """Read one block of the head into the room that it has."""
    fill_vocabulary(store, config, head_table(config), number, block.rows, 0)


def read_scores(store: ModelStore, kernel: Kernel, start: int, stop: int, rows: HeadBlock) -> None:
    """Read some rows of the head into the room that they have."""
    config = kernel.sizes.config
    table, hidden = head_table(config), slice(0, config.hidden)
    layout = store.layout(table)
    for block in range(start // VOCABULARY_BLOCK, -(-stop // VOCABULARY_BLOCK)):
        before = block * VOCABULARY_BLOCK
        first, last = max(start, before), min(stop, before + VOCABULARY_BLOCK)
        fill(rows.rows, slice(first - start, last - start), hidden, layout, store.read(table, 0, block), "rows", first - before)


def head_table(config: ModelConfig) -> str:
    """Where the head's rows are stored."""
    return "embedding" if config.tied else "head"


def fill_vocabulary(store: ModelStore, config: ModelConfig, table: str, block: int, matrix: Any, start: int) -> None:
    """Read one block of the embedding or the head into a matrix, from row `start` on."""
    rows = min(VOCABULARY_BLOCK, config.vocabulary - block * VOCABULARY_BLOCK)
    record, layout = store.read(table, 0, block), store.layout(table)
    fill(matrix, slice(start, start + rows), slice(0, config.hidden), layout, record, "rows")


def fill(matrix: Any, rows: slice, columns: slice, layout: RecordLayout, record: np.ndarray, name: str, skipped: int = 0) -> None:
    """Write a matrix of a record, or its first rows, but for some that are skipped, and columns, into a part of a larger one; tiles
    need whole ones."""
    if isinstance(matrix, Tiles):
        stored, bytes_in = layout.parts[name], layout.bytes_of(record, name)
        matrix.put_stored(bytes_in, stored.rows, stored.columns, *_in_tiles(rows, columns), skipped // TILE_ROWS)
    elif isinstance(matrix, OwnForm):
        matrix.write(rows, columns, layout, record, name, skipped)
    else:
        values = layout.unpack(record, name)
        np.asarray(matrix)[rows, columns] = values[skipped : skipped + rows.stop - rows.start, : columns.stop - columns.start]


def copy(matrix: Any, rows: slice, columns: slice, other: Any, other_rows: slice, other_columns: slice) -> None:
    """Write a part of one matrix into another of the same kind."""
    if isinstance(matrix, Tiles):
        matrix.part(*_in_tiles(rows, columns)).put(other.part(*_in_tiles(other_rows, other_columns)))
    elif isinstance(matrix, Copied):
        matrix.write_from(rows, columns, other, other_rows, other_columns)
    else:
        np.asarray(matrix)[rows, columns] = np.asarray(other)[other_rows, other_columns]


def _in_tiles(rows: slice, columns: slice) -> tuple[slice, slice]:
    return slice(rows.start // TILE_ROWS, -(-rows.stop // TILE_ROWS)), slice(columns.start // BLOCK, -(-columns.stop // BLOCK))
