"""A share that is larger than its memory: python -m bench.budget [--json FILE]

All heads and groups of the model on one rank, without the vocabulary, on one thread, for weights stored as f32 and as int4 and with
a part of them staying in memory; the rest is read again at every token. In turns in one run, some tokens one right after the other: with
all weights in memory (computing), the reading of what does not stay without computing (reading), and both at once, as the program does it.
Cold: the model's files are taken out of the page cache before, and again after each part that was read; the kernel reads
nothing ahead by itself. A device, cold too: as in the lab, a layer's attention or FFN takes at least 0.7 ms, and each record as long as
from a disk of so many MB/s.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import numpy as np

from bench.load import CACHES, all_layers, disk_of, prepare, source_options, stored_as
from bench.modes import Numbers
from bench.pagecache import drop_records, resident, without_readahead
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import conclude, failures, measure
from bench.shapes import config_of
from bench.tables import Table, number
from halo_mpi.engine.loader import Loader
from halo_mpi.engine.marks import sleep_as_disk
from halo_mpi.model.kernels.kernel import Share
from halo_mpi.model.sizes import shape_bytes
from halo_mpi.schedule.residence import reside
from halo_mpi.store.reader import ModelStore

CONTEXT = 64  # tokens in the KV cache
PACE_S = 0.7e-3  # of a device, for attention or FFN of a layer
COLD_ENOUGH = 0.05  # of the pages still in memory: the loader has read ahead
ROUNDS, TOKENS = 4, 6  # of each kind; the first token of a round is not counted, since the loader begins it with two parts read


@contextmanager
def loading(model: Path, held: float, cold: bool, read_mbps: float | None = None):
    """A share of everything, of whose weights so much stays, and its loader. `read_mbps`: of a disk that is slower than the real one."""

    def pace(begin: float, size: int) -> None:
        if read_mbps:
            sleep_as_disk(begin, size, read_mbps)

    store, config = ModelStore(model, pace), config_of(model)
    kernel, layers, parts = all_layers(store, config)
    sizes = [shape_bytes(part.shapes) for part in parts]
    if cold:
        without_readahead(store)
        parts = [replace(part, read=partial(read_and_drop, part.read, store, *divmod(number, 2))) for number, part in enumerate(parts)]
    loader = Loader(parts, reside(sizes, int(held * sum(sizes))))
    loader.load()
    try:
        yield kernel.share(layers, CONTEXT), loader
    finally:
        loader.close()
        store.close()


def read_and_drop(read: Callable[[], None], store: ModelStore, layer: int, is_ffn: int) -> None:
    read()
    drop_records(store, layer, {"ffn"} if is_ffn else {"query", "kv"})


def products(share: Share) -> Iterator[tuple[int, Callable[[], object]]]:
    """The parts of a token by their numbers in the loader, each with what computes it."""
    x = np.full((1, share.config.hidden), 0.5, np.float32)
    for layer in range(share.config.layers):
        yield 2 * layer, lambda: share.attention(layer, x, CONTEXT - 1)
        yield 2 * layer + 1, lambda: share.ffn(layer, x)


def token_ms(share: Share, loader: Loader, compute: bool, pace_s: float = 0.0) -> float:
    """One pass over the layers; without computing, their parts are only needed. `pace_s`: the least that computing one takes."""
    begin = time.perf_counter()
    for part, product in products(share):
        loader.need(part)
        if compute:
            until = time.perf_counter() + pace_s
            product()
            if (left_s := until - time.perf_counter()) > 0:
                time.sleep(left_s)
    return (time.perf_counter() - begin) * 1e3


def run_budget(cell: dict, model: Path) -> dict:
    began, cold, mbps = time.perf_counter(), cell["cache"] == "cold", cell["read_mbps"]
    pace_s = PACE_S if mbps else 0.0
    times: dict[str, list[float]] = {"compute_ms": [], "read_ms": [], "both_ms": []}
    error = None
    with loading(model, 1.0, False) as (whole, all_held), loading(model, cell["held"], cold, mbps) as (share, loader):
        kinds: dict[str, Callable[[], float]] = {
            "compute_ms": lambda: token_ms(whole, all_held, True, pace_s),
            "read_ms": lambda: token_ms(share, loader, False),
            "both_ms": lambda: token_ms(share, loader, True, pace_s),
        }
        for _ in range(ROUNDS):
            for name, once in kinds.items():
                prepare(model, cell["cache"])
                taken = [once() for _ in range(TOKENS)][1:]
                times[name].append(round(float(np.mean(taken)), 3))
                if cold and (left := resident(model)) > COLD_ENOUGH:
                    error = f"{left:.0%} of the model cannot be dropped from the page cache here"
        streamed = loader.residence.streamed_bytes
    kept = {name: taken[1:] for name, taken in times.items()}  # the first round warms up
    return {
        "status": "failed" if error else "ok",
        "error": error,
        "wall_s": time.perf_counter() - began,
        "streamed_bytes": streamed,
    } | kept


def medians(run: dict) -> tuple[float, float, float]:
    return tuple(float(np.median(run[name])) for name in ("compute_ms", "read_ms", "both_ms"))


def ratio(run: dict) -> float:
    compute, read, both = medians(run)
    return both / max(compute, read)


def table(content: dict) -> Table:
    columns = ["dtype", "from", "held", "read again", "computing", "reading", "both", "both / the longer", "least .. most"]
    drawn = Table("Weights that do not stay in memory, ms per token, medians", columns, texts=2)
    found: dict[tuple, list[dict]] = {}
    for run in content["runs"]:
        if run["status"] == "ok":
            found.setdefault((run["dtype"], disk_of(run), run["held"]), []).append(run)
    for (dtype, disk, held), runs in found.items():
        typical = np.median([medians(run) for run in runs], axis=0)
        ratios = [ratio(run) for run in runs]
        drawn.rows.append(
            [dtype, disk, f"{held:.0%}", f"{runs[0]['streamed_bytes'] / 1e6:.0f} MB", *(number(ms) for ms in typical),
             number(float(np.median(ratios))), f"{min(ratios):.2f} .. {max(ratios):.2f}"]
        )  # fmt: skip
    drawn.notes.append("read again: bytes of f32 weights that each token reads and decodes anew")
    drawn.notes += failures(content, name_of)
    return drawn


def name_of(cell: dict) -> str:
    return f"{cell['dtype']}, {disk_of(cell)}, {cell['held']:.0%} held, repeat {cell['repeat'] + 1}"


def line_of(run: dict) -> str:
    return f"{name_of(run)}: {ratio(run):.2f} times the longer of {medians(run)[0]:.0f} ms computing and {medians(run)[1]:.0f} ms reading"


@click.command(help=__doc__)
@source_options
@click.option(
    "--held", type=Numbers(float, 0, 1), default="0.9,0.5,0.25", show_default=True, help="Shares of the weights that stay."
)
@click.option("--read-mbps", type=Numbers(float, 1, 1e5), default="90,250", show_default=True, help="Disks of devices.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@shared_options("minutes", "json", minutes=15)
def main(source, dtypes, held, read_mbps, repeats, minutes, out) -> int:
    with stored_as(source, dtypes) as (shape, models):
        settings = {"dtypes": dtypes, "held": held, "read_mbps": read_mbps, "repeats": repeats, "rounds": ROUNDS, "tokens": TOKENS}
        results = Results("budget", out, 0, model=shape, pace_ms=PACE_S * 1e3, **settings)
        disks = [*((cache, None) for cache in CACHES), *(("cold", mbps) for mbps in read_mbps)]
        groups = [
            [{"dtype": dtype, "cache": cache, "read_mbps": mbps, "held": part, "repeat": repeat}]
            for repeat in range(repeats)
            for dtype in dtypes
            for cache, mbps in disks
            for part in held
        ]
        measure(groups, lambda cell: run_budget(cell, models[cell["dtype"]]), line_of, lambda cell: 15, minutes, results)
    return conclude(results, table, lambda *_: None, None)


if __name__ == "__main__":
    run_benchmark(main)
