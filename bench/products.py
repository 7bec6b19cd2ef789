"""How fast quantized matrices are multiplied: python -m bench.products [--json FILE]

The matrices of a layer of SmolLM2-135M's size, 60 different ones of each shape in turn, so that they come from memory each time, as
in generation; a long prompt goes through the same one. One thread; the least processor time of some rounds, in which all numbers of
tokens alternate with a plain read of as many bytes: on a busy machine compare what stands in one table.
"""

import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from numba import njit

from bench.results import Results, run_benchmark, shared_options
from halo_mpi.model.kernels.compiled import multiply, products
from halo_mpi.model.kernels.tiles import CODE_BYTES, Tiles, aligned_bytes, tiles_across, tiles_down

SHAPES = ((3072, 576), (576, 1536))  # gate and up of SmolLM2-135M, and down
MATRICES = 60  # of each shape: 65 MB of int4 at least, more than a cache holds
TOKENS = (1, 2, 4, 8, 512)
LONG = 64  # tokens; from here on one matrix is enough


@njit
def multiply_each(addresses, matrices, tokens, a, a_scale, a_sum, y):
    for i in range(len(matrices)):
        codes, scale, minimum, down, across = matrices[i]
        multiply(addresses, codes, scale, minimum, a, a_scale, a_sum, y, tokens, down, across, down * 16)


@njit(fastmath=True)
def read(words):
    total = 0
    for i in range(len(words)):
        total += words[i]
    return total


def random_tiles(rows: int, columns: int, dtype: str) -> Tiles:
    down, across = tiles_down(rows), tiles_across(columns)
    tiles = Tiles.of(aligned_bytes(Tiles.bytes_of(down, across, dtype)), down, across, dtype)
    tiles.codes[:] = np.random.default_rng(0).integers(0, 256, tiles.codes.shape, np.uint8)
    for plane in tiles.planes[1:]:
        plane[:] = 0.01
    return tiles


def described(tiles: Tiles) -> list[int]:
    minimum = 0 if tiles.minimum is None else tiles.minimum.ctypes.data
    return [tiles.codes.ctypes.data, tiles.scale.ctypes.data, minimum, *tiles.codes.shape[:2]]


def least_seconds(jobs: dict[str, Callable], rounds: int) -> dict[str, float]:
    seconds = dict.fromkeys(jobs, np.inf)
    for _ in range(rounds + 1):  # the first one compiles, and is never the fastest
        for name, job in jobs.items():
            begin = time.thread_time()
            job()
            seconds[name] = min(seconds[name], time.thread_time() - begin)
    return seconds


def measure(dtype: str, rows: int, columns: int, rounds: int) -> list[dict]:
    tiles = [random_tiles(rows, columns, dtype) for _ in range(MATRICES)]
    matrices, nbytes = np.array([described(each) for each in tiles], np.int64), tiles[0].nbytes
    a, factors = np.ones((max(TOKENS), columns), np.int8), np.ones((max(TOKENS), columns), np.float32)
    y, words = np.zeros((max(TOKENS), rows), np.float32), np.ones(MATRICES * nbytes // 8, np.int64)
    arrays = [array.ctypes.data for array in (a, factors, factors, y)]

    def job(tokens: int) -> Callable:
        few = matrices[:1] if tokens >= LONG else matrices
        return lambda: multiply_each(getattr(products(), dtype), few, tokens, *arrays)

    seconds = least_seconds({0: lambda: read(words), **{tokens: job(tokens) for tokens in TOKENS}}, rounds)
    found = []
    for tokens, taken in seconds.items():
        count = 1 if tokens >= LONG else MATRICES
        speed = {"gbps": count * nbytes / taken / 1e9, "gmacs": count * rows * columns * tokens / taken / 1e9}
        found.append({"dtype": dtype, "rows": rows, "columns": columns, "tokens": tokens, **speed})
    return found


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True, help="The fastest of which counts.")
@shared_options("json")
def main(rounds: int, out: Path | None) -> None:
    results = Results("products", out, 0, isa=products().isa, matrices=MATRICES, rounds=rounds)
    click.echo(f"{products().isa}\nmatrix            tokens    GB/s  GMAC/s")
    for dtype in CODE_BYTES:
        for rows, columns in SHAPES:
            for run in measure(dtype, rows, columns, rounds):
                results.add(run)
                speed = f"{run['gbps']:7.1f}" if run["tokens"] < LONG else " " * 7
                speed += f" {run['gmacs']:7.1f}" if run["tokens"] else ""
                click.echo(f"{dtype} {rows:5} x {columns:4} {run['tokens'] or 'read':>6} {speed}")
    results.finish()


if __name__ == "__main__":
    run_benchmark(main)
