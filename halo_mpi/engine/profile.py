"""What the devices and their links can do, measured at start-up in some tenths of a second, for the scheduler.

All ranks compute, and then talk, as they do in the token loop, with made-up weights of the model's shape: nothing need be read first.
"""

import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from halo_mpi.engine.agreement import together
from halo_mpi.engine.link_trial import LinkTrial
from halo_mpi.engine.marks import Marks
from halo_mpi.model.kernels.kernel import Kernel, Share
from halo_mpi.model.kernels.tiles import aligned_bytes
from halo_mpi.model.layer_weights import LayerWeights, runs_of
from halo_mpi.model.records import split_evenly
from halo_mpi.model.sizes import Shape, Shapes, shape_bytes
from halo_mpi.schedule.cost import Cluster, Device
from halo_mpi.wire.exchange import broadcast, gather, meet
from halo_mpi.wire.root_link import RootLink
from halo_mpi.wire.worker_link import WorkerLink

PRODUCTS_S = 0.2  # for attention, and for the FFN, each with a whole sample and half of one
LEAST_TIMES = 5
SAMPLE_BYTES = 16 * 2**20  # about; a Pi's caches have 2 MiB
SAMPLE_CONTEXT = 256  # tokens in the KV cache
LEAST_SLOPE = 0.25  # of a request's time is in proportion to its share, however noisy the machine
HEAD_TIMES, GROUP_TIMES = 7, 5
SLOW = 1.5  # times the usual computing


def measure_cluster(
    comm: MPI.Comm, kernel: Kernel, marks: Marks, link: RootLink | WorkerLink, about: dict
) -> Cluster | None:
    """The devices by rank, on the root (collective). `about`: the fields of this rank's Device that are known."""
    meet(comm)  # all begin together, and slow one another down as they will later
    computing = together(comm, lambda: Computing(kernel, comm.size, marks))
    head_ms = _head_ms(kernel) if comm.rank == 0 else 0.0
    devices = gather(comm, {**about, **computing.found})
    trials = gather(comm, computing.trial_ms)
    computing.usual_ms = broadcast(comm, np.median(trials, axis=0).tolist() if comm.rank == 0 else None)
    if comm.rank:
        link.echo(computing.work)
        return None
    if not link.workers:
        return Cluster([Device(**devices[0])], head_ms=head_ms)
    trial = LinkTrial(link, kernel.sizes.config.hidden)
    busy_ms = trial.busy_ms(computing.work, [computing.done_ms(own) for own in trials])
    trial.end()
    found = [Device(**device, **trial.links.get(rank, {})) for rank, device in enumerate(devices)]
    return Cluster(found, max(0.0, busy_ms - trial.further_ms * (len(trial.stable) - 1)), trial.further_ms, head_ms, trial.kb_ms)


class Computing:
    """What attention and FFN take on this rank. `found`: fields of its Device; `trial_ms`: the times of an even share of each.

    `usual_ms`: the same, the median of all ranks.
    """

    def __init__(self, kernel: Kernel, ranks: int, marks: Marks):
        sizes, config = kernel.sizes, kernel.sizes.config
        x = np.full((1, config.hidden), 0.5, np.float32)
        self._marks, self._calls = marks, 0
        kinds = (
            ("attention_ms", config.heads, shape_bytes(sizes.attention([0])), lambda heads: _sample(kernel, heads, 0),
             lambda share, layer: share.attention(layer, x, SAMPLE_CONTEXT - 1)),
            ("ffn_ms", config.groups, shape_bytes(sizes.ffn([0])), lambda groups: _sample(kernel, 0, groups),
             lambda share, layer: share.ffn(layer, x)),
        )  # fmt: skip
        self.found, self.trial_ms, self.usual_ms, self._trials, fixed = {}, [], [], [], []
        for name, count, unit_bytes, sample, product in kinds:
            most = max(1, min(split_evenly(count, ranks)[-1], SAMPLE_BYTES // unit_bytes))
            sizes = [most, most // 2] if most > 1 else [most]
            trials = [(sample(size), product, size * ranks / count) for size in sizes]
            times = self._usual_ms(trials)
            whole = slope = times[0] * count / most
            if len(sizes) > 1:
                slope = (times[0] - times[1]) * count / (sizes[0] - sizes[1])
                slope = min(max(slope, LEAST_SLOPE * whole), whole)
                fixed.append(times[0] - slope * most / count)
            self.found[name] = slope
            self.trial_ms.append(times[0])
            self._trials.append(trials[0])
        self.found["fixed_ms"] = float(np.mean(fixed)) if fixed else 0.0

    def work(self) -> None:
        """An even share of a layer's attention, the next time of its FFN, and so on; a slow rank sleeps as long as it takes the others,
        or nothing would be seen behind its time."""
        kind = self._calls % 2
        if self.trial_ms[kind] > SLOW * self.usual_ms[kind]:
            time.sleep(self.usual_ms[kind] / 1e3)
        else:
            self._once(self._trials[kind], self._calls // 2)
        self._calls += 1

    def done_ms(self, trial_ms: list[float]) -> list[float]:
        """What `work` takes on a rank with these times, every other time."""
        return [usual if own > SLOW * usual else own for own, usual in zip(trial_ms, self.usual_ms)]

    def _once(self, trial: tuple[Share, Callable[[Share, int], object], float], number: int) -> None:
        share, product, even_shares = trial
        begin = time.perf_counter()
        product(share, number % len(share.layers))
        self._marks.pace(begin, even_shares)

    def _usual_ms(self, trials: list) -> list[float]:
        """The median time of each, in turns."""
        times, until, number = [[] for _ in trials], time.perf_counter() + PRODUCTS_S, 0
        while number <= LEAST_TIMES or time.perf_counter() < until:
            for trial, taken in zip(trials, times):
                begin = time.perf_counter()
                self._once(trial, number)
                taken.append((time.perf_counter() - begin) * 1e3)
            number += 1
        return [float(np.median(taken[1:])) for taken in times]  # the first warms up


def _sample(kernel: Kernel, heads: int, groups: int) -> Share:
    """A share with so many heads and groups of as many layers as fill SAMPLE_BYTES, without meaning."""
    runs = runs_of(list(range(heads)), kernel.sizes.config.heads_per_kv)[1]
    shapes = kernel.sizes.attention(list(range(heads))) | kernel.sizes.ffn([0] * groups)
    layers = min(kernel.sizes.config.layers, 1 + SAMPLE_BYTES // max(1, shape_bytes(shapes)))
    return kernel.share([LayerWeights(runs=runs, **_matrices(kernel, shapes)) for _ in range(layers)], SAMPLE_CONTEXT)


def _matrices(kernel: Kernel, shapes: Shapes) -> dict[str, object]:
    """Of numbers that take as long to multiply as any others, each in memory of its own."""
    matrices = {}
    for name, shape in shapes.items():
        memory = aligned_bytes(shape.nbytes)
        memory.view(np.float16).fill(0.01)
        matrices[name] = kernel.make(shape, memory)
    return matrices


class OneGroup:
    """One FFN group of several layers, by which a rank that has no work tells how fast it is."""

    def __init__(self, kernel: Kernel, ranks: int, marks: Marks):
        config = kernel.sizes.config
        self._share, self._x = _sample(kernel, 0, 1), np.full((1, config.hidden), 0.5, np.float32)
        self._even_share, self._marks = ranks / config.groups, marks

    def usual_s(self) -> float:
        """What one layer's takes, in seconds: the median of some, the first, which takes longer, left out."""
        times = []
        for number in range(GROUP_TIMES + 1):
            begin = time.perf_counter()
            self._share.ffn(number % len(self._share.layers), self._x)
            self._marks.pace(begin, self._even_share)
            times.append(time.perf_counter() - begin)
        return float(np.median(times[1:]))


def _head_ms(kernel: Kernel) -> float:
    """What the vocabulary takes, from some of its rows."""
    whole = kernel.sizes.table()
    rows = max(1, min(whole.dims[0], SAMPLE_BYTES * whole.dims[0] // whole.nbytes))
    shape = Shape((rows, whole.dims[1]), whole.dtype)
    head, x = kernel.head(_matrices(kernel, {"rows": shape})["rows"], rows), np.full((1, whole.dims[1]), 0.5, np.float32)
    times = []
    for _ in range(HEAD_TIMES):
        begin = time.perf_counter()
        head.logits(x)
        times.append((time.perf_counter() - begin) * 1e3)
    return float(np.median(times)) * whole.dims[0] / rows
