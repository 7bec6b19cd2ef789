"""The model that a benchmark runs, also one of a well-known shape with random weights: python -m bench.shapes tinyllama OUT.halo

Shapes take the time and the memory of the real models, and write nonsense. The tokenizer is the demo model's; where its
vocabulary is larger than the shape's, the model gets the larger one (TinyLlama: 49152 instead of 32000, which adds 6 % to
its weights), so that every token has a row.
"""

import functools
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import h5py
import numpy as np

from bench.results import ROOT, run_benchmark
from halo_mpi.convert import write_model
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.shapes import SHAPES as KNOWN
from halo_mpi.model.tokenizer import Tokenizer, TokenizerFiles
from halo_mpi.store.encoding import BLOCK, DTYPES, Blocks
from halo_mpi.store.reader import MODEL_FILE

DEMO = ROOT / "models" / "smollm2-135m.halo"
SEED = 1
SHAPES = {
    "micro": ModelConfig("micro shape", 4, 128, 8, 4, 16, 384, 512, 2048, 1e-5, 10000.0),  # a sync takes next to no time
    "tinyllama": KNOWN["tinyllama"],
    "llama-2-7b": KNOWN["llama-2-7b"],  # never by default
}
CODE_SPREAD = {"int4": np.sqrt((16**2 - 1) / 12), "int8": np.sqrt((255**2 - 1) / 12)}  # standard deviation of uniform codes


class RandomSource:
    """A source (see halo_mpi.sources) whose weights are made when they are asked for, the same each time.

    The random numbers belong to the slice: it must always be asked for in the same pieces, as `write_model` does. Weights
    have the standard deviation 1 / sqrt(columns), so that activations stay near one.
    """

    def __init__(self, config: ModelConfig, tokenizer: TokenizerFiles, dtype: str):
        vocabulary = max(config.vocabulary, Tokenizer(tokenizer).vocabulary)
        self.config, self.tokenizer, self._dtype = replace(config, vocabulary=vocabulary), tokenizer, dtype
        self.native_dtype = dtype
        self.summary = {"random": SEED, "shape": config.name}
        c = self.config
        self._columns = dict.fromkeys(("q", "k", "v", "gate", "up", "embedding", "head"), c.hidden)
        self._columns |= {"o": c.heads * c.head_dim, "down": c.ffn}

    def rows(self, name: str, start: int, stop: int) -> np.ndarray | Blocks:
        columns = self._columns[name.rpartition(".")[2]]
        return self._random(name, start, (stop - start, columns), columns)

    def columns(self, name: str, start: int, stop: int) -> np.ndarray | Blocks:
        return self._random(name, start, (self.config.hidden, stop - start), self._columns[name.rpartition(".")[2]])

    def vector(self, name: str) -> np.ndarray | None:
        return None if name.endswith(".bias") else np.ones(self.config.hidden, np.float32)

    def _random(self, name: str, start: int, shape: tuple[int, int], inputs: int) -> np.ndarray | Blocks:
        random = np.random.default_rng([SEED, zlib.crc32(name.encode()), start])
        spread = 1.0 if name == "embedding" else 1 / np.sqrt(inputs)
        dtype = "int8" if self._dtype == "int4" and name in ("embedding", "head") else self._dtype
        if dtype not in CODE_SPREAD or shape[1] % BLOCK:
            return random.standard_normal(shape, np.float32) * np.float32(spread)
        planes, step = (shape[0], shape[1] // BLOCK), np.float16(spread / CODE_SPREAD[dtype])
        if dtype == "int4":
            codes = random.integers(0, 16, shape, np.uint8)
            return Blocks(codes, np.full(planes, step), np.full(planes, -7.5 * step, np.float16))
        return Blocks(random.integers(-127, 128, shape, np.int8), np.full(planes, step), None)


def meta_of(model: Path) -> dict:
    """What model.h5 says of the model. Raises ClickException if there is none."""
    try:
        with h5py.File(model / MODEL_FILE, "r", locking=False) as file:
            return json.loads(file["meta"][()].tobytes())
    except (OSError, KeyError, ValueError) as error:
        hint = "; launch/quickstart.sh makes the demo model" if model == DEMO else ""
        raise click.ClickException(f"{model} is no model ({' '.join(str(error).split())[:100]}){hint}") from None


def config_of(model: Path) -> ModelConfig:
    return ModelConfig.from_dict(meta_of(model)["config"])


def model_options(command: Callable) -> Callable:
    """--model and --shape, which the command gets as one path `model`."""

    @click.option("--model", type=click.Path(path_type=Path), default=DEMO, help="[default: the demo model]")
    @click.option("--shape", type=click.Choice(list(SHAPES)), help="Random weights of this shape instead; made once, in models/.")
    @functools.wraps(command)
    def with_model(*arguments, model: Path, shape: str | None, **options):
        return command(*arguments, model=(shape_model(shape) if shape else model).resolve(), **options)

    return with_model


def write_shape(config: ModelConfig, out: Path, dtype: str, shards: int, replace_it: bool = False) -> ModelConfig:
    tokenizer = TokenizerFiles.from_dict(meta_of(DEMO)["tokenizer"])
    source = RandomSource(config, tokenizer, dtype)
    if source.config.vocabulary != config.vocabulary:
        click.echo(
            f"{config.name}: vocabulary {source.config.vocabulary} of the borrowed tokenizer instead of {config.vocabulary}",
            err=True,
        )
    write_model(source, out, dtype, shards, replace_it)
    return source.config


def shape_model(shape: str) -> Path:
    """The shape's model in models/, made if it is not there."""
    return _made(shape, SHAPES[shape])


def weak_config(ranks: int) -> ModelConfig:
    """A model whose width grows with the ranks: each has 3 heads, 1 KV head and 768 neurons of each of 15 layers, whatever their number.

    Syncs and the length of their messages do not change, nor does the vocabulary, which the root scores.
    """
    return ModelConfig(f"weak shape of {ranks}", 15, 576, 3 * ranks, ranks, 64, 768 * ranks, 49152, 2048, 1e-5, 10000.0, tied=True)


def weak_model(ranks: int) -> Path:
    return _made(f"weak-{ranks}", weak_config(ranks))


def _made(name: str, config: ModelConfig) -> Path:
    path = ROOT / "models" / f"shape-{name}.halo"
    if not (path / MODEL_FILE).exists():
        write_shape(config, path, "int4", 4)
    return path


@click.command(help=__doc__)
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(DTYPES), default="int4", show_default=True)
@click.option("--shards", type=click.IntRange(1), default=4, show_default=True)
@click.option("--force", is_flag=True, help="Replace OUT.")
def main(shape: str, out: Path, dtype: str, shards: int, force: bool) -> None:
    config = write_shape(SHAPES[shape], out, dtype, shards, force)
    size = sum(path.stat().st_size for path in out.iterdir())
    click.echo(f"{out}: {config.name}, {config.parameters / 1e6:.0f} M random parameters as {dtype}, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    run_benchmark(main)
