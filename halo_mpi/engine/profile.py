"""What the devices and their links can do, measured at start-up in some tenths of a second, for the scheduler.

All ranks compute, and then talk, as they do in the token loop, with made-up weights of the model's shape: nothing need be read first.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from mpi4py import MPI

from halo_mpi.engine.agreement import together
from halo_mpi.engine.marks import Marks
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.llama import LayerWeights, Share, runs_of
from halo_mpi.model.records import split_evenly
from halo_mpi.schedule.cost import Cluster, Device
from halo_mpi.wire.exchange import gather
from halo_mpi.wire.root_link import RootLink
from halo_mpi.wire.worker_link import WorkerLink

PRODUCTS_S = 0.2  # for attention, and for the FFN, each with a whole sample and half of one
LEAST_TIMES = 5
SAMPLE_BYTES = 16 * 2**20  # about; a Pi's caches have 2 MiB
SAMPLE_CONTEXT = 256  # tokens in the KV cache
LEAST_SLOPE = 0.25  # of a request's time is in proportion to its share, however noisy the machine
HEAD_TIMES = 7
ALONE, TOGETHER = 6, 32  # echoes of each link, and rounds of all links at once
LATE, LATE_MS = 2.0, 2.0  # times the usual latency, and so much on top
LEAST_LATE = 3  # answers; fewer are the hiccups of a busy machine


def measure_cluster(
    comm: MPI.Comm, config: ModelConfig, marks: Marks, link: RootLink | WorkerLink, about: dict
) -> Cluster | None:
    """The devices by rank, on the root (collective). `about`: the fields of this rank's Device that are known."""
    comm.Barrier()  # all begin together, and slow one another down as they will later
    mine = together(comm, lambda: _computing(config, comm.size, marks))
    head_ms = _head_ms(config) if comm.rank == 0 else 0.0
    devices = gather(comm, {**about, **mine})
    if comm.rank:
        link.greet(ALONE + TOGETHER)
        return None
    links, further_ms = _links(link, config.hidden)
    return Cluster([Device(**device, **links.get(rank, {})) for rank, device in enumerate(devices)], further_ms, head_ms)


def _computing(config: ModelConfig, ranks: int, marks: Marks) -> dict[str, float]:
    """`attention_ms`, `ffn_ms` and `fixed_ms` of a Device."""
    x = torch.full((1, config.hidden), 0.5)
    head_bytes, group_bytes = 16 * config.hidden * config.head_dim, 12 * config.hidden * config.group_size
    attention = _line(
        lambda heads: _sample(config, heads, 0),
        lambda share, layer: share.attention(layer, x, SAMPLE_CONTEXT - 1),
        config.heads, head_bytes, ranks, marks,
    )  # fmt: skip
    ffn = _line(
        lambda groups: _sample(config, 0, groups), lambda share, layer: share.ffn(layer, x), config.groups, group_bytes, ranks, marks
    )  # fmt: skip
    fixed = [each[1] for each in (attention, ffn) if each[1] is not None]
    return {"attention_ms": attention[0], "ffn_ms": ffn[0], "fixed_ms": float(np.mean(fixed)) if fixed else 0.0}


def _line(sample, product, count: int, unit_bytes: int, ranks: int, marks: Marks) -> tuple[float, float | None]:
    """What a layer's `count` units take, and what comes on top of any share, in ms: a line through an even share and half of it.

    `sample(units)` makes the weights of several layers, `product(share, layer)` uses them; a unit has `unit_bytes`. None on top: a share of
    one unit cannot be halved.
    """
    most = max(1, min(split_evenly(count, ranks)[-1], SAMPLE_BYTES // unit_bytes))
    sizes = [most, most // 2] if most > 1 else [most]
    shares = [sample(size) for size in sizes]
    times: list[list[float]] = [[] for _ in sizes]
    until = time.perf_counter() + PRODUCTS_S
    while len(times[0]) <= LEAST_TIMES or time.perf_counter() < until:
        for share, size, taken in zip(shares, sizes, times):
            begin = time.perf_counter()
            product(share, len(taken) % len(share.layers))
            marks.pace(begin, size * ranks / count)
            taken.append((time.perf_counter() - begin) * 1e3)
    usual = [float(np.median(taken[1:])) for taken in times]  # the first warms up
    whole = usual[0] * count / most
    if len(sizes) == 1:
        return whole, None
    slope = (usual[0] - usual[1]) * count / (sizes[0] - sizes[1])
    slope = min(max(slope, LEAST_SLOPE * whole), whole)
    return slope, usual[0] - slope * most / count


def _sample(config: ModelConfig, heads: int, groups: int) -> Share:
    """A share with so many heads and groups of as many layers as fill SAMPLE_BYTES, without meaning."""
    kv_heads, runs = runs_of(list(range(heads)), config.heads_per_kv)
    hidden, dim, neurons = config.hidden, config.head_dim, groups * config.group_size

    def weights(rows: int, columns: int) -> torch.Tensor:
        return torch.full((rows, columns), 1 / max(1, columns))

    def layer() -> LayerWeights:
        return LayerWeights(
            weights((heads + 2 * len(kv_heads)) * dim, hidden), None, weights(hidden, heads * dim), runs,
            weights(2 * neurons, hidden), None, weights(hidden, neurons),
        )  # fmt: skip

    first = layer()
    layers = min(config.layers, 1 + SAMPLE_BYTES // max(1, first.nbytes))
    return Share(config, [first, *(layer() for _ in range(layers - 1))], SAMPLE_CONTEXT)


def _links(link: RootLink, width: int) -> tuple[dict[int, dict[str, float]], float]:
    """`link_ms`, `late_rate` and `late_ms` by worker, and what each further worker adds to a sync."""
    if not link.workers:
        return {}, 0.0
    x = np.full((1, width), 0.5, np.float32)
    alone = {rank: float(np.median([link.echo(x, [rank])[0] for _ in range(ALONE)])) * 1e3 for rank in link.workers}
    together_ms = np.array([link.echo(x, link.workers) for _ in range(TOGETHER)]) * 1e3  # [rounds, workers]
    slowest = float(np.median(together_ms.max(1)))
    further_ms = max(0.0, slowest - max(alone.values())) / max(1, len(alone) - 1)
    found = {}
    for (rank, link_ms), times in zip(alone.items(), together_ms.T):
        usual = float(np.median(times))
        late = times[times > LATE * usual + LATE_MS]
        known = len(late) >= LEAST_LATE
        found[rank] = {
            "link_ms": link_ms,
            "late_rate": len(late) / len(times) if known else 0.0,
            "late_ms": float(late.mean()) - usual if known else 0.0,
        }
    return found, further_ms


def _head_ms(config: ModelConfig) -> float:
    """What the vocabulary takes, from some of its rows."""
    rows = max(1, min(config.vocabulary, SAMPLE_BYTES // (4 * config.hidden)))
    head, x = torch.full((rows, config.hidden), 0.5), torch.full((1, config.hidden), 0.5)
    times = []
    for _ in range(HEAD_TIMES):
        begin = time.perf_counter()
        F.linear(x, head)
        times.append((time.perf_counter() - begin) * 1e3)
    return float(np.median(times)) * config.vocabulary / rows
