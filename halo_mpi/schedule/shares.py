"""How many heads and groups each device should get, so that a token takes the least time within their memory.

Shares are counts, the same in every layer; which heads and groups they are, `placement` decides.
"""

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halo_mpi.errors import MemoryBudgetError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.records import split_evenly
from halo_mpi.model.sizes import trunk_bytes
from halo_mpi.schedule.cost import KINDS, Cluster, Cost, share_ms, sync_cost, token_cost
from halo_mpi.schedule.memory import mebibytes
from halo_mpi.wire.messages import Kind

CREWS, CREWS_IN_MEMORY = 17, 6  # sizes of a crew that are tried, without and with limits of memory
NEIGHBOURS = 16  # devices that are tried in a move

Counts = tuple[Sequence[int], Sequence[int]]  # heads and groups by rank


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to share out, the same for all layers; bytes are those of all layers together.

    `kv_bytes`: weights and cache of a KV head, which every device needs that has one of its `heads_per_kv` query heads.
    """

    layers: int
    heads: int
    groups: int
    heads_per_kv: int
    head_bytes: int
    kv_bytes: int
    group_bytes: int
    root_bytes: int  # on top of its share
    context: int

    @classmethod
    def of(cls, config: ModelConfig, context: int, root_bytes: int = 0) -> "Work":
        """`context`: tokens that the cache must hold; `root_bytes`: what the root needs beside its share and the vocabulary."""
        matrix = 4 * config.hidden * config.head_dim
        return cls(
            config.layers,
            config.heads,
            config.groups,
            config.heads_per_kv,
            config.layers * 2 * matrix,
            config.layers * (2 * matrix + 2 * 4 * context * config.head_dim),
            config.layers * 3 * 4 * config.hidden * config.group_size,
            trunk_bytes(config) + root_bytes,
            context,
        )

    def count(self, kind: Kind) -> int:
        return self.heads if kind == Kind.ATTENTION else self.groups

    def bytes_of(self, heads: int, groups: int) -> int:
        """For heads that are neighbours: at most, or where all have whole KV heads, exactly."""
        each = self.heads_per_kv
        kv_heads = heads // each if heads % each == 0 else min(self.heads // each, 1 + (heads + each - 2) // each)
        return heads * self.head_bytes + kv_heads * self.kv_bytes + groups * self.group_bytes


@dataclass(frozen=True, slots=True)
class Shares:
    """Counts by rank, and what a token costs with them."""

    heads: tuple[int, ...]
    groups: tuple[int, ...]
    cost: Cost


def with_cost(cluster: Cluster, work: Work, heads: Sequence[int], groups: Sequence[int]) -> Shares:
    return Shares(tuple(heads), tuple(groups), token_cost(cluster, work.layers, heads, groups))


def usual_shares(cluster: Cluster, work: Work) -> dict[str, Shares]:
    """What one might do without measuring, by name, as far as memory and disks allow it."""
    ranks = len(cluster.devices)
    even = split_evenly(work.heads, ranks), split_evenly(work.groups, ranks)
    alone = [work.heads, *[0] * (ranks - 1)], [work.groups, *[0] * (ranks - 1)]
    usual = {"even": even, "root-attention": (alone[0], even[1]), "root alone": alone}
    return {name: with_cost(cluster, work, *counts) for name, counts in usual.items() if fits(cluster, work, counts)}


def best_shares(cluster: Cluster, work: Work) -> Shares:
    """The shares with the least time per token that are found; the same for the same arguments.

    Starts with those of many crews, each sync as short as it can be with that crew, and with the usual ones; then single units and single
    devices are moved as long as that helps. The tests compare it with all possible shares of small clusters. Raises MemoryBudgetError if it
    finds none that the devices' memory holds.
    """
    starts = [*usual_shares(cluster, work).values()]
    free = [_best_alone(cluster, work, kind) for kind in KINDS]
    if all(free) and fits(cluster, work, free):
        starts.append(with_cost(cluster, work, *free))
    else:
        crews = _crews(cluster, CREWS_IN_MEMORY)
        for attention in crews:
            for ffn in crews:
                for first in KINDS:
                    counts = _within_memory(cluster, work, {Kind.ATTENTION: attention, Kind.FFN: ffn}, first)
                    if counts and fits(cluster, work, counts):
                        starts.append(with_cost(cluster, work, *counts))
    if not starts:
        raise MemoryBudgetError(_why_not(cluster, work))
    return _improved(cluster, work, min(starts, key=lambda shares: shares.cost.tpot_ms))


def fits(cluster: Cluster, work: Work, counts: Counts) -> bool:
    """Whether every device has the memory, and the shards, for its part."""
    heads, groups = counts
    return all(
        _room(cluster, work, rank, *own) >= 0
        and all(count <= _on_disk(cluster, work, rank, kind) for kind, count in zip(KINDS, own))
        for rank, own in enumerate(zip(heads, groups))
    )


def _why_not(cluster: Cluster, work: Work) -> str:
    root, advice = (
        cluster.devices[0].memory,
        "use more devices, fewer tokens of context or a smaller model, or read from disk: generate --memory",
    )
    if root is not None and root < work.root_bytes:
        return f"the root's memory, {mebibytes(root)}, does not hold what it needs beside its share, {mebibytes(work.root_bytes)}; {advice}"
    needed = work.bytes_of(work.heads, work.groups) + work.root_bytes
    limited = [device.memory for device in cluster.devices if device.memory is not None]
    return (
        f"no shares were found that the devices' memory holds: {mebibytes(sum(limited))} on {len(limited)} devices, "
        f"for {mebibytes(needed)} (KV cache of {work.context} tokens included) and what some need twice; {advice}"
    )


def _crews(cluster: Cluster, sizes: int) -> list[list[int]]:
    """The root with some of the workers: the best by link, or by link and speed; one, two, and so on up to all of them."""
    devices = cluster.devices
    if len(devices) == 1:
        return [[0]]

    def link_ms(rank: int) -> float:
        return devices[rank].link_ms + devices[rank].late_rate * devices[rank].late_ms

    def usual_ms(rank: int) -> float:
        return link_ms(rank) + devices[rank].fixed_ms + (devices[rank].attention_ms + devices[rank].ffn_ms) / len(devices)

    most = len(devices) - 1
    steps = range(most + 1) if most < sizes else sorted({round(step * most / (sizes - 1)) for step in range(sizes)} | {1})
    crews = []
    for key in (link_ms, usual_ms):
        order = sorted(range(1, len(devices)), key=key)
        crews += [[0, *sorted(order[:size])] for size in steps]
    return [crew for number, crew in enumerate(crews) if crew not in crews[:number]]


def _best_alone(cluster: Cluster, work: Work, kind: Kind) -> list[int] | None:
    """The counts of one kind that make its sync shortest, memory aside; None if the disks of no crew hold everything."""
    count = work.count(kind)
    every = [
        _dealt_out(cluster, kind, count, {rank: _on_disk(cluster, work, rank, kind) for rank in crew})
        for crew in _crews(cluster, CREWS)
    ]
    possible = [counts for counts in every if counts]
    return min(possible, key=lambda counts: sync_cost(cluster, kind, [own / count for own in counts]).ms, default=None)


def _dealt_out(cluster: Cluster, kind: Kind, count: int, most: dict[int, int]) -> list[int] | None:
    """Each unit goes to the device that would be done first with it, which makes the longest share as short as can be.

    `most`: what each device of the crew may get. None if that is not enough.
    """
    counts = [0] * len(cluster.devices)

    def done_ms(rank: int) -> float:
        return share_ms(cluster.devices[rank], kind, (counts[rank] + 1) / count, rank == 0)

    next_ = [(done_ms(rank), -rank) for rank in most if most[rank]]  # of equals the last: rank 0 has other work
    heapq.heapify(next_)
    for _ in range(count):
        if not next_:
            return None
        rank = -heapq.heappop(next_)[1]
        counts[rank] += 1
        if counts[rank] < most[rank]:
            heapq.heappush(next_, (done_ms(rank), -rank))
    return counts


def _room(cluster: Cluster, work: Work, rank: int, heads: int, groups: int) -> float:
    """Bytes left on a device with so many heads and groups."""
    memory = cluster.devices[rank].memory
    if memory is None:
        return float("inf")
    return memory - work.bytes_of(heads, groups) - (work.root_bytes if rank == 0 else 0)


def _on_disk(cluster: Cluster, work: Work, rank: int, kind: Kind) -> int:
    """Heads or groups that a device may get at all."""
    device = cluster.devices[rank]
    held = device.disk_heads if kind == Kind.ATTENTION else device.disk_groups
    return work.count(kind) if held is None else held


def _within_memory(cluster: Cluster, work: Work, crews: dict[Kind, list[int]], first: Kind) -> tuple[list[int], list[int]] | None:
    """One kind is dealt out within the memory, then the other within what is left."""
    held = {kind: [0] * len(cluster.devices) for kind in KINDS}
    for kind in (first, *(other for other in KINDS if other != first)):
        most = {}
        for rank in crews[kind]:

            def is_full(own: int) -> bool:
                return _room(cluster, work, rank, *(own if each == kind else held[each][rank] for each in KINDS)) < 0

            limit = _on_disk(cluster, work, rank, kind)
            most[rank] = bisect_left(range(1, limit + 1), True, key=is_full)
        counts = _dealt_out(cluster, kind, work.count(kind), most)
        if counts is None:
            return None
        held[kind] = counts
    return held[Kind.ATTENTION], held[Kind.FFN]


def _improved(cluster: Cluster, work: Work, shares: Shares) -> Shares:
    """The same, after all moves that help."""
    while True:
        better = min(
            (with_cost(cluster, work, *counts) for counts in _moves(cluster, work, shares) if fits(cluster, work, counts)),
            key=lambda other: other.cost.tpot_ms,
            default=shares,
        )
        if better.cost.tpot_ms >= shares.cost.tpot_ms * (1 - 1e-9):
            return shares
        shares = better


def _moves(cluster: Cluster, work: Work, shares: Shares) -> Iterator[Counts]:
    """One unit away from the device that a sync waits for, alone or against one or two units of the other kind; or all of a worker's."""
    both = {Kind.ATTENTION: shares.heads, Kind.FFN: shares.groups}
    for kind, sync in zip(KINDS, (shares.cost.attention, shares.cost.ffn)):
        count, giver, own = work.count(kind), sync.longest, both[kind]
        other_kind = Kind.FFN if kind == Kind.ATTENTION else Kind.ATTENTION
        times = [share_ms(device, kind, (own[rank] + 1) / count, rank == 0) for rank, device in enumerate(cluster.devices)]
        for taker in sorted(range(len(own)), key=times.__getitem__)[:NEIGHBOURS]:
            for back in (0, 1, 2):
                if taker != giver and own[giver] and both[other_kind][taker] >= back:
                    counts = {kind: list(own), other_kind: list(both[other_kind])}
                    counts[kind][giver] -= 1
                    counts[kind][taker] += 1
                    counts[other_kind][giver] += back
                    counts[other_kind][taker] -= back
                    yield counts[Kind.ATTENTION], counts[Kind.FFN]
        crew = [rank for rank in range(len(own)) if own[rank]]
        for left in sorted(crew, key=own.__getitem__)[:NEIGHBOURS]:
            most = {rank: _on_disk(cluster, work, rank, kind) for rank in {0, *crew} - {left}}
            if counts := _dealt_out(cluster, kind, count, most):
                yield (counts, shares.groups) if kind == Kind.ATTENTION else (shares.heads, counts)
