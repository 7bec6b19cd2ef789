"""`halo-mpi convert`: a GGUF file or a Hugging Face folder becomes a `.halo` folder of sharded HDF5 files."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from halo_mpi.cli import run_command
from halo_mpi.errors import UsageError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.choice import TILED
from halo_mpi.model.records import VOCABULARY_BLOCK, model_tables, shard_index, shard_tables, vocabulary_blocks
from halo_mpi.progress import progress
from halo_mpi.sources import Source, open_source
from halo_mpi.store.encoding import DTYPES
from halo_mpi.store.reader import MODEL_FILE
from halo_mpi.store.writer import RecordFileWriter, new_folder
from halo_mpi.versions import version_option

EXAMPLES = """\b
Examples:
  halo-mpi convert models/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2-135m.halo --shards 4
  halo-mpi convert downloads/TinyLlama-1.1B-Chat models/tinyllama.halo --dtype int8
"""
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@click.command(epilog=EXAMPLES, short_help="Make a .halo folder of a GGUF file or a Hugging Face folder.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(DTYPES), show_default="the nearest to the source's own",
              help="Storage of the weights; int4 and int8 are computed as they are, the others as f32, slowly.")  # fmt: skip
@click.option("--shards", default=4, show_default=True, metavar="K", help="Files the heads and FFN groups are spread over.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--verbose", is_flag=True, help="Show a traceback if something fails.")
@version_option
def convert(source: Path, out: Path, dtype: str | None, shards: int, force: bool, verbose: bool) -> None:
    """Convert SOURCE, a .gguf file or a Hugging Face folder of the LLaMA architecture, to the folder OUT (NAME.halo).

    int4 and int8 keep groups of 32 weights with an f16 scale (int4 also a minimum); 4-bit and 8-bit blocks of a GGUF
    file pass unchanged. With int4 the embedding and the head stay at 8 bits. Copy OUT, or only model.h5 and some of its
    shards, to every host.
    """
    if shards < 1:
        raise UsageError(f"--shards {shards}: at least 1 is needed")
    with open_source(source) as opened:
        stored = dtype or opened.native_dtype
        write_model(opened, out, stored, shards, force)
    size = sum(path.stat().st_size for path in out.iterdir())
    click.echo(f"{out}: {opened.config.name}, {opened.config.parameters / 1e6:.1f} M parameters as {stored}, "
               f"{shards} shards, {size / 1e6:.1f} MB", err=True)  # fmt: skip
    if not dtype and stored not in TILED:
        click.echo(f"{out}: tokens come several times faster from --dtype int8 or int4", err=True)


def write_model(source: Source, out: Path, dtype: str, shards: int, replace: bool = False) -> None:
    """Write the folder `out`, which appears only when it is complete. One record is in memory at a time."""
    config = source.config
    biases = {name for name in MATRICES if source.vector(f"layers.0.{name}.bias") is not None}
    shard_layouts = shard_tables(config, dtype, biases)
    tables = model_tables(config, dtype, biases)
    indexes = [shard_index(config, shard, shards) for shard in range(shards)]
    size = sum(config.layers * len(index[name]) * layout.nbytes for index in indexes for name, layout in shard_layouts.items())
    size += sum(layout.nbytes * layers * entries for layout, layers, entries in tables.values())
    common = {"config": config.to_dict(), "dtype": dtype, "shards": shards}
    with new_folder(out, int(size * 1.01) + 2**20, MODEL_FILE, replace) as folder:
        digests = []
        for shard in progress(range(shards), shards, "writing shards"):
            with RecordFileWriter(folder / f"shard-{shard:02d}.h5") as file:
                for name, layout in shard_layouts.items():
                    file.add_table(name, layout, config.layers, indexes[shard][name])
                    for layer, entry in itertools.product(range(config.layers), indexes[shard][name]):
                        file.write(name, layer, entry, layout.pack(_matrices(source, config, name, layer, entry, biases)))
                digests.append(file.close({**common, "shard": shard}))
        with RecordFileWriter(folder / MODEL_FILE) as file:
            for name, (layout, layers, entries) in tables.items():
                file.add_table(name, layout, layers, list(range(entries)))
            records = sum(layers * entries for _, layers, entries in tables.values())
            for name, layer, entry, matrices in progress(_model_records(source, config, biases), records, "writing model.h5"):
                file.write(name, layer, entry, tables[name][0].pack(matrices))
            meta = {**common, "tokenizer": source.tokenizer.to_dict(), "source": source.summary, "biases": sorted(biases)}
            file.close({**meta, "shard_digests": digests})


def _matrices(source: Source, config: ModelConfig, table: str, layer: int, entry: int, biases: set[str]) -> dict:
    """The matrices of one record of a shard, as slices of the source."""
    base = f"layers.{layer}"
    if table == "ffn":
        neurons = config.group_neurons(entry)
        rows, columns, start, stop = ("gate", "up"), ("down",), neurons.start, neurons.stop
    else:
        rows, columns = (("q",), ("o",)) if table == "query" else (("k", "v"), ())
        start, stop = entry * config.head_dim, (entry + 1) * config.head_dim
    matrices = {name: source.rows(f"{base}.{name}", start, stop) for name in rows}
    matrices |= {name: source.columns(f"{base}.{name}", start, stop) for name in columns}
    for name in rows:
        if name in biases:
            matrices[f"{name}.bias"] = source.vector(f"{base}.{name}.bias")[None, start:stop]
    return matrices


def _model_records(source: Source, config: ModelConfig, biases: set[str]) -> Iterator[tuple[str, int, int, dict]]:
    """Table, layer, entry and matrices of every record of model.h5."""
    for layer in range(config.layers):
        names = ["attention_norm", "ffn_norm", *(f"{name}.bias" for name in ("o", "down") if name in biases)]
        yield "layer", layer, 0, {name: source.vector(f"layers.{layer}.{name}")[None] for name in names}
    yield "final", 0, 0, {"norm": np.asarray(source.vector("final_norm"))[None]}
    for name in ("embedding",) if config.tied else ("embedding", "head"):
        for block in range(vocabulary_blocks(config)):
            start = block * VOCABULARY_BLOCK
            stop = min(config.vocabulary, start + VOCABULARY_BLOCK)
            yield name, 0, block, {"rows": source.rows(name, start, stop)}


if __name__ == "__main__":
    run_command(convert)
