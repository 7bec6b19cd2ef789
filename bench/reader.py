"""A thread that reads weights beside the token loop: python -m bench.reader [--json FILE]

One rank's layers are computed again and again, all heads and groups, on one thread, while another thread reads the model's ffn records
one after the other, as fast as it can: by h5py, or as the program does, by preadv at the chunks' offsets, with and without their
checksums. What a layer's attention or FFN takes then, against nobody reading: h5py holds Python's lock while it reads, preadv does not.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import click
import h5py
import numpy as np

from bench.budget import loading, products
from bench.load import prepare, source_options, stored_as
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import conclude, failures, measure
from bench.stats import percentile
from bench.tables import Table, number
from halo_mpi.engine.loader import Loader
from halo_mpi.model.kernels.kernel import Share
from halo_mpi.store.reader import ModelStore, RecordFile

TOKENS, WARM_UP = 60, 5
WAYS = {
    "nobody": "nobody reads",
    "preadv": "preadv at the chunks' offsets",
    "checked": "the same and crc32, as the program",
    "h5py": "h5py",
}


def by_preadv(shard: RecordFile) -> Iterator[int]:
    table = shard.tables["ffn"]
    descriptor = os.open(shard.path, os.O_RDONLY)
    try:
        for offset in table.offsets.flat:
            yield os.preadv(descriptor, [np.empty(table.layout.nbytes, np.uint8)], int(offset))
    finally:
        os.close(descriptor)


def checked(shard: RecordFile) -> Iterator[int]:
    table = shard.tables["ffn"]
    for layer in range(len(table.offsets)):
        for entry in table.positions:
            yield shard.read("ffn", layer, entry).nbytes


def by_h5py(shard: RecordFile) -> Iterator[int]:
    with h5py.File(shard.path) as file:
        records = file["ffn"]["records"]
        for layer, position in np.ndindex(*records.shape[:2]):
            yield records[layer, position].nbytes


READERS: dict[str, Callable[[RecordFile], Iterator[int]]] = {"preadv": by_preadv, "checked": checked, "h5py": by_h5py}


@contextmanager
def reading(model: Path, way: str) -> Iterator[list[int]]:
    """Somebody reads the shards in turns, or nobody; yields a list with the number of bytes so far."""
    stop, read, store = threading.Event(), [0], ModelStore(model)

    def run() -> None:
        for shard in cycle(store.shards.values()):
            for count in READERS[way](shard):
                read[0] += count
                if stop.is_set():
                    return

    thread = threading.Thread(target=run if way in READERS else lambda: None)
    thread.start()
    try:
        yield read
    finally:
        stop.set()
        thread.join()
        store.close()


def part_times_ms(share: Share, loader: Loader) -> list[float]:
    """Of each layer's attention and FFN, for one token."""
    times = []
    for part, product in products(share):
        begin = time.perf_counter()
        loader.need(part)
        product()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def run_reader(cell: dict, model: Path) -> dict:
    prepare(model, "warm")
    with loading(model, 1.0, False) as (share, loader), reading(model, cell["way"]) as read:
        for _ in range(WARM_UP):
            part_times_ms(share, loader)
        began, before = time.perf_counter(), read[0]
        times = [ms for _ in range(TOKENS) for ms in part_times_ms(share, loader)]
        wall_s = time.perf_counter() - began
        mb_s = (read[0] - before) / wall_s / 1e6
    return {"status": "ok", "error": None, "wall_s": wall_s, "mb_s": round(mb_s, 1), "part_ms": [round(ms, 4) for ms in times]}


def figures(runs: list[dict]) -> tuple[float, float]:
    """Mean and p99 of a part, ms: the median of the runs'."""
    return tuple(float(np.median([of(run["part_ms"]) for run in runs])) for of in (np.mean, lambda times: percentile(times, 99)))


def table(content: dict) -> Table:
    columns = ["dtype", "beside it", "reads MB/s", "mean ms", "p99 ms", "mean: times", "p99: times"]
    drawn = Table("What a layer's attention or FFN takes while a thread reads weights", columns, texts=2)
    runs = [run for run in content["runs"] if run["status"] == "ok"]
    for dtype in content["settings"]["dtypes"]:
        alone = None
        for way, words in WAYS.items():
            own = [run for run in runs if (run["dtype"], run["way"]) == (dtype, way)]
            if not own:
                continue
            mean, p99 = figures(own)
            alone = alone or (mean, p99)
            speed = float(np.median([run["mb_s"] for run in own]))
            compared = mean / alone[0], p99 / alone[1]
            drawn.rows.append([dtype, words, *(number(each) for each in (speed, mean, p99, *compared))])
    drawn.notes.append("medians of the repeats; times: of what it takes while nobody reads")
    drawn.notes += failures(content, name_of)
    return drawn


def name_of(cell: dict) -> str:
    return f"{cell['dtype']}, {WAYS[cell['way']]}, repeat {cell['repeat'] + 1}"


def line_of(run: dict) -> str:
    mean, p99 = figures([run])
    return f"{name_of(run)}: mean {mean:.3f} ms, p99 {p99:.3f} ms"


@click.command(help=__doc__)
@source_options
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@shared_options("minutes", "json", minutes=10)
def main(source, dtypes, repeats, minutes, out) -> int:
    with stored_as(source, dtypes) as (shape, models):
        results = Results("reader", out, 0, model=shape, dtypes=dtypes, repeats=repeats, tokens=TOKENS)
        groups = [
            [{"dtype": dtype, "way": way, "repeat": repeat} for way in WAYS] for repeat in range(repeats) for dtype in dtypes
        ]
        measure(groups, lambda cell: run_reader(cell, models[cell["dtype"]]), line_of, lambda cell: 15, minutes, results)
    return conclude(results, table, lambda *_: None, None)


if __name__ == "__main__":
    run_benchmark(main)
