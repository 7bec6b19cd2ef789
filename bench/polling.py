"""What a sync costs by the way of waiting: mpirun -n RANKS python -m bench.polling [--json FILE]

The root asks every worker for an answer that takes `--work-ms` of computing, does as much itself and collects the answers:
the shape of one sync, without a model. Ways of waiting alternate (A B C A B C ...), so that a change of the machine's load
hits all alike. Median and 90th percentile in ms.
"""

import json
import os
import platform
import time
from pathlib import Path

import click
import numpy as np
from mpi4py import MPI

from halo_mpi.versions import git_revision
from halo_mpi.wire.mailbox import Mailbox
from halo_mpi.wire.messages import Kind
from halo_mpi.wire.polling import Waiter, sharpen_timers
from halo_mpi.wire.root_link import RootLink
from halo_mpi.wire.worker_link import WorkerLink

WAYS_S = {"sleep 50 us at once": 0.0, "yield 0.1 ms, then sleep": 1e-4, "yield 1 ms, then sleep": 1e-3}
WIDTH = 576  # hidden size of SmolLM2-135M
MATRIX = np.random.default_rng(0).random(
    (512, 512), np.float32
)  # 1 MB: stays in a core's cache, so cores do not share its bandwidth
VECTOR = MATRIX[0].copy()


def compute(milliseconds: float) -> None:
    end = time.perf_counter() + milliseconds / 1e3
    while time.perf_counter() < end:
        MATRIX @ VECTOR


def measure(comm: MPI.Comm, yield_s: float, syncs: int, work_ms: float) -> list[float]:
    """Times of some syncs in ms, on the root."""
    x = np.ones((1, WIDTH), np.float32)
    if comm.rank:
        link = WorkerLink(Mailbox(comm, [0], 1, WIDTH, "f32"), Waiter(yield_s))
        while not link.stopped:
            if request := link.next():
                compute(work_ms)
                link.answer(request, x)
            else:
                link.wait()
        link.close()
        return []
    workers = list(range(1, comm.size))
    link = RootLink(Mailbox(comm, workers, 1, WIDTH, "f32"), workers, waiter=Waiter(yield_s))
    times = []
    for _ in range(syncs):
        begin = time.perf_counter()
        link.ask(Kind.FFN, 0, 0, x, workers)
        compute(work_ms)
        missing = len(workers)
        while missing:
            missing -= len(list(link.poll()))
            link.waiter.wait()
        times.append((time.perf_counter() - begin) * 1e3)
    link.stop(set())
    return times


@click.command()
@click.option("--syncs", default=200, show_default=True, help="Syncs per measurement.")
@click.option("--repeats", default=9, show_default=True, help="Measurements of each way.")
@click.option("--work-ms", default=0.3, show_default=True, help="Computing of each rank per sync.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write all samples to this file.")
def main(syncs: int, repeats: int, work_ms: float, out: Path | None) -> None:
    comm = MPI.COMM_WORLD
    sharpen_timers()
    samples = {way: [] for way in WAYS_S}
    for repeat in range(repeats + 1):
        for way, yield_s in WAYS_S.items():
            times = measure(comm, yield_s, syncs, work_ms)
            if repeat:  # the first round is warm-up
                samples[way].append(times)
    if comm.rank:
        return
    load = os.getloadavg()[0]
    print(f"{comm.size} ranks, {os.cpu_count()} cores, load {load:.1f}, {work_ms} ms of work per sync; ms per sync")
    for way, rounds in samples.items():
        medians = [float(np.median(times)) for times in rounds]
        p90 = float(np.percentile(np.concatenate(rounds), 90))
        print(f"{way:28} median {np.median(medians):6.3f} (rounds {min(medians):.3f} to {max(medians):.3f})   p90 {p90:6.3f}")
    if out:
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(), "load": load}
        out.write_text(
            json.dumps({"git": git_revision(), "machine": machine, "ranks": comm.size, "work_ms": work_ms, "samples_ms": samples})
        )


if __name__ == "__main__":
    main()
