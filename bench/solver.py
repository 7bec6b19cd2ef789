"""How long the scheduler looks for shares, for each known shape: python -m bench.solver [--devices 16] [--clusters 12] [--json FILE]

Clusters are drawn: devices of up to fourfold different speed, one to four bad links, memory for 1.1 to 1.6 times the model in uneven
parts, and disks to read from in every other one. Nothing is run on them: what a token would take is the cost model's word, and its mean the
geometric one.
"""

import time

import click
import numpy as np

from bench.results import Results, run_benchmark, shared_options
from bench.stats import percentile
from bench.tables import Table
from halo_mpi.errors import MemoryBudgetError
from halo_mpi.model.shapes import SHAPES
from halo_mpi.model.sizes import Sizes
from halo_mpi.progress import progress
from halo_mpi.schedule.advice import advise
from halo_mpi.schedule.cost import Cluster, Device
from halo_mpi.schedule.work import Work

CONTEXT = 512
BYTES_MS = 4e6  # that a device of speed 1 multiplies in a millisecond, about those of a Pi 5
READ_GBPS = 0.05


def drawn(rng: np.random.Generator, sizes: Sizes, work: Work, count: int, disks: bool) -> Cluster:
    """A cluster of `count` devices; the same for the same state of `rng`."""
    needed = work.bytes_of(work.heads, work.groups) / count * rng.uniform(1.1, 1.6)
    bad = rng.choice(np.arange(1, count), min(count - 1, int(rng.integers(1, 5))), replace=False).tolist()
    layer_ms = [sum(shape.nbytes for shape in shapes.values()) / BYTES_MS for shapes in
                (sizes.attention(list(range(work.heads))), sizes.ffn(list(range(work.groups))))]  # fmt: skip
    devices = []
    for rank in range(count):
        slower, memory = 4 ** rng.uniform(), needed * rng.uniform(0.6, 1.4) + work.root_bytes * (rank == 0)
        link = (rng.uniform(0.3, 1.0), *((rng.uniform(0.1, 0.4), rng.uniform(20, 200)) if rank in bad else ()))
        devices.append(Device(f"pi{rank}", *(slower * ms for ms in layer_ms), 0.05, *(link if rank else ()), memory=int(memory),
                              read_gbps=READ_GBPS if disks else None))  # fmt: skip
    return Cluster(devices, 0.2, 0.05)


def table(content: dict) -> Table:
    """Seconds and the predicted time per token, by shape."""
    found = Table("Seconds that looking for shares takes", ["model", "clusters", "no shares", "median", "most", "ms per token, mean"], texts=1)
    for shape in dict.fromkeys(run["shape"] for run in content["runs"]):
        runs = [run for run in content["runs"] if run["shape"] == shape]
        seconds, tokens = [run["seconds"] for run in runs], [run["tpot_ms"] for run in runs if run["tpot_ms"]]
        times = f"{percentile(seconds, 50):.2f}", f"{max(seconds):.2f}", f"{np.exp(np.mean(np.log(tokens))):.2f}" if tokens else "-"
        found.rows.append([shape, f"{len(runs)}", f"{len(runs) - len(tokens)}", *times])
    return found


@click.command(help=__doc__)
@click.option("--devices", type=click.IntRange(2), default=16, show_default=True)
@click.option("--clusters", type=click.IntRange(1), default=12, show_default=True, help="For each shape.")
@shared_options("seed", "json")
def main(devices, clusters, seed, out) -> int:
    results = Results("solver", out, seed, devices=devices, clusters=clusters)
    for shape in SHAPES:
        sizes = Sizes(SHAPES[shape])
        work = Work.of(sizes, CONTEXT)
        for number in progress(range(clusters), clusters, shape):
            cluster = drawn(np.random.default_rng([seed, number]), sizes, work, devices, bool(number % 2))
            begin, tpot_ms = time.perf_counter(), None
            try:
                tpot_ms = advise(cluster, work, True).options["measured"].cost.tpot_ms
            except MemoryBudgetError:
                pass
            seconds = time.perf_counter() - begin
            results.add({"shape": shape, "cluster": number, "seconds": seconds, "tpot_ms": tpot_ms})
    results.finish()
    table(results.content).print()
    return 0


if __name__ == "__main__":
    run_benchmark(main)
