"""One kind of work alone, memory aside: which workers take part in it, and how many units each device gets."""

import heapq
from collections.abc import Iterator, Sequence
from itertools import combinations

from halo_mpi.schedule.candidates import on_disk
from halo_mpi.schedule.cost import Cluster, sync_cost
from halo_mpi.schedule.work import Work
from halo_mpi.wire.messages import Kind

EVERY_CREW = 8  # workers, up to which all crews are tried
SIZES = 17  # of a crew that are tried of more workers
NEIGHBOURS = 6  # workers within a crew, and outside of it, that are tried in a move


def crews(cluster: Cluster, every: int = EVERY_CREW, sizes: int = SIZES) -> list[tuple[int, ...]]:
    """The root with some of the workers. Of up to `every` workers all crews; of more, the best by link, or by link and speed: one,
    two, and so on up to all of them, or so many sizes, evenly spread, and each power of two."""
    workers = range(1, len(cluster.devices))
    if len(workers) <= every:
        return [(0, *crew) for size in range(len(workers) + 1) for crew in combinations(workers, size)]
    most = len(workers)
    doubled = {2**power for power in range(most.bit_length())}
    steps = range(most + 1) if most < sizes else sorted({round(step * most / (sizes - 1)) for step in range(sizes)} | doubled)
    found = [(0, *sorted(order[:size])) for order in _orders(cluster) for size in steps]
    return list(dict.fromkeys(found))


def best_alone(cluster: Cluster, work: Work, kind: Kind) -> list[int] | None:
    """The counts of one kind that make its sync shortest; None if the disks do not hold everything.

    Of up to EVERY_CREW workers exactly: a crew whose member gets nothing is another crew, which is tried too.
    """
    count = work.count(kind)
    limits = [on_disk(device, work, kind) for device in cluster.devices]
    tried: dict[tuple[int, ...], tuple[float, list[int] | None]] = {}

    def try_(crew: tuple[int, ...]) -> float:
        if crew not in tried:
            counts = dealt_out(cluster, kind, count, {rank: limits[rank] for rank in crew})
            ms = sync_cost(cluster, kind, [own / count for own in counts]).ms if counts else float("inf")
            tried[crew] = ms, counts
        return tried[crew][0]

    best = min(crews(cluster), key=try_)
    while len(cluster.devices) - 1 > EVERY_CREW:
        other = min(changed(cluster, best, NEIGHBOURS), key=try_)
        if try_(other) >= try_(best) * (1 - 1e-9):
            break
        best = other
    return tried[best][1]


def dealt_out(cluster: Cluster, kind: Kind, count: int, most: dict[int, int]) -> list[int] | None:
    """Each unit goes to the device that would be done first with it, which makes the longest share as short as can be.

    `most`: what each device of the crew may get. None if that is not enough.
    """
    if sum(most.values()) < count:
        return None
    counts = [0] * len(cluster.devices)
    begin = {rank: cluster.devices[rank].begin_ms(rank == 0) for rank in most if most[rank]}
    each = {rank: max(1e-12, cluster.devices[rank].whole_ms(kind) / count) for rank in begin}
    until = _level(sorted((begin[rank], each[rank]) for rank in begin), count)
    for rank in begin:  # what all would have done by then goes without saying
        counts[rank] = min(most[rank], max(0, int((until - begin[rank]) / each[rank] - 1e-6)))
    if sum(counts) > count:  # numbers so far apart that they were rounded
        counts = [0] * len(counts)

    def entry(rank: int) -> tuple[float, int]:
        return begin[rank] + (counts[rank] + 1) * each[rank], -rank  # of equals the last: rank 0 has other work

    next_ = [entry(rank) for rank in begin if counts[rank] < most[rank]]
    heapq.heapify(next_)
    for _ in range(count - sum(counts)):
        rank = -next_[0][1]
        counts[rank] += 1
        if counts[rank] < most[rank]:
            heapq.heapreplace(next_, entry(rank))
        else:
            heapq.heappop(next_)
    return counts


def _level(devices: Sequence[tuple[float, float]], count: int) -> float:
    """When devices, (begin, ms of a unit) by begin, would be done with all units if units could be cut."""
    speed, until, done = 0.0, float("inf"), 0.0
    for begin, each in devices:
        if begin >= until:
            break
        speed += 1 / each
        done += begin / each
        until = (count + done) / speed
    return until


def _orders(cluster: Cluster) -> list[list[int]]:
    """The workers by link, and by link and speed."""
    devices = cluster.devices

    def link_ms(rank: int) -> float:
        return devices[rank].link_ms + devices[rank].late_rate * devices[rank].late_ms

    def usual_ms(rank: int) -> float:
        return link_ms(rank) + devices[rank].fixed_ms + (devices[rank].attention_ms + devices[rank].ffn_ms) / len(devices)

    return [sorted(range(1, len(devices)), key=key) for key in (link_ms, usual_ms)]


def changed(cluster: Cluster, crew: tuple[int, ...], neighbours: int) -> Iterator[tuple[int, ...]]:
    """The crew with one worker more, one less, or one in place of another: of the best outside, and of the worst within, so many each."""
    orders = _orders(cluster)
    nearest = [rank for order in orders for rank in [other for other in order if other not in crew][:neighbours]]
    farthest = [rank for order in orders for rank in [other for other in order if other in crew][-neighbours:]]
    for without in (None, *dict.fromkeys(farthest)):
        rest = [rank for rank in crew if rank != without]
        for with_ in (None, *dict.fromkeys(nearest)):
            yield tuple(sorted([*rest, with_] if with_ else rest))
