"""A calibrated version of a model: the same weights with sorted neurons, and what calibration found, in place of the old folder."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from halo_mpi.model.config import ModelConfig
from halo_mpi.predict.fits import LayerFit
from halo_mpi.predict.sorting import neurons
from halo_mpi.predict.stored import TABLES, calibration_records, calibration_tables
from halo_mpi.progress import progress
from halo_mpi.store.encoding import BLOCK, Blocks
from halo_mpi.store.layout import RecordLayout
from halo_mpi.store.reader import MODEL_FILE, ModelStore
from halo_mpi.store.writer import RecordFileWriter, new_folder


def write_calibrated(store: ModelStore, config: ModelConfig, fit_of: Callable[[int], LayerFit], facts: dict) -> None:
    """Replace the model's folder by one that is complete; the disk needs room for both, and other files in it are gone.

    Weights change places, not values, but for down where single neurons are sorted (see `sorted_layout`).
    """
    meta = {**store.meta, "calibration": facts, "model_id": store.model_id}
    tables = calibration_tables(config, facts["rank"])
    added = sum(layout.nbytes * layers * entries for layout, layers, entries in tables.values())
    grown = sorted_layout(store.layout("ffn"), facts["unit"]).nbytes - store.layout("ffn").nbytes
    size = sum(path.stat().st_size for path in store.folder.iterdir()) + grown * config.layers * config.groups
    with new_folder(store.folder, int(1.01 * (size + added)) + 2**20, MODEL_FILE, replace=True) as new:
        meta["shard_digests"] = _write_shards(store, config, fit_of, facts["unit"], new)
        with RecordFileWriter(new / MODEL_FILE) as file:
            for name, table in store.model.tables.items():
                if name not in TABLES:
                    file.add_table(name, table.layout, len(table.crc32), list(table.positions))
                    for layer, entry in np.ndindex(*table.crc32.shape):
                        file.write(name, layer, entry, store.model.read(name, layer, entry))
            for name, (layout, layers, entries) in tables.items():
                file.add_table(name, layout, layers, list(range(entries)))
            for layer in progress(range(config.layers), config.layers, "writing model.h5"):
                for name, records in calibration_records(fit_of(layer)).items():
                    for entry, matrices in enumerate(records):
                        file.write(name, layer, entry, tables[name][0].pack(matrices))
            file.close(meta)


def _write_shards(
    store: ModelStore, config: ModelConfig, fit_of: Callable[[int], LayerFit], unit: int, folder: Path
) -> list[str]:
    """The shards with sorted groups, layer by layer; their digests."""
    with contextlib.ExitStack() as stack:
        writers = {shard: stack.enter_context(RecordFileWriter(folder / file.path.name)) for shard, file in store.shards.items()}
        for shard, writer in writers.items():
            for name, table in store.shards[shard].tables.items():
                layout = sorted_layout(table.layout, unit) if name == "ffn" else table.layout
                writer.add_table(name, layout, config.layers, list(table.positions))
        for layer in progress(range(config.layers), config.layers, "writing shards"):
            groups = sorted_groups(store, config, layer, fit_of(layer).order, unit)
            for shard, writer in writers.items():
                file = store.shards[shard]
                for name, table in file.tables.items():
                    for entry in table.positions:
                        writer.write(name, layer, entry, groups[entry] if name == "ffn" else file.read(name, layer, entry))
        return [writer.close(store.shards[shard].meta) for shard, writer in sorted(writers.items())]


def sorted_layout(layout: RecordLayout, unit: int) -> RecordLayout:
    """Of the FFN's records with sorted neurons. Where single ones are sorted, 4-bit blocks of down are torn apart: it gets 8 bits."""
    torn = unit % BLOCK != 0
    parts = layout.parts.values()
    return RecordLayout([replace(p, dtype="int8") if torn and (p.name, p.dtype) == ("down", "int4") else p for p in parts])


def sorted_groups(store: ModelStore, config: ModelConfig, layer: int, order: np.ndarray, unit: int) -> list[np.ndarray]:
    """The records of one layer's FFN groups, their units of neurons in this order."""
    layout, size, padded = store.layout("ffn"), config.group_size, config.groups * config.group_size
    target = sorted_layout(layout, unit)
    chosen = np.concatenate(
        (neurons(order, unit, config.ffn), np.arange(config.ffn, padded))
    )  # what fills the last group up stays last
    records = [store.read("ffn", layer, group) for group in range(config.groups)]
    matrices = {}
    for name in layout.parts:
        along_columns = name == "down" or name.endswith("bias")  # do the neurons lie
        parts = [layout.stored(record, name) for record in records]
        if isinstance(parts[0], Blocks) and along_columns and unit % BLOCK:
            parts = [part.dequantize() for part in parts]
        whole = (Blocks.join if isinstance(parts[0], Blocks) else np.concatenate)(parts, int(along_columns))
        matrices[name] = [whole.take(chosen[start : start + size], int(along_columns)) for start in range(0, padded, size)]
    return [target.pack({name: parts[group] for name, parts in matrices.items()}) for group in range(config.groups)]
