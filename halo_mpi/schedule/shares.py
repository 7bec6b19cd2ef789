"""How many heads and groups each device should get, so that a token takes the least time within their memory.

Shares are counts, the same in every layer, or on average if some ranks are gathered; which heads and groups they are, `placement`
decides.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product

from halo_mpi.errors import MemoryBudgetError
from halo_mpi.model.records import split_evenly
from halo_mpi.schedule.candidates import Counts, Shares, fits, on_disk, with_cost
from halo_mpi.schedule.cost import KINDS, Cluster, Device, share_ms, token_cost
from halo_mpi.schedule.crews import best_alone, dealt_out
from halo_mpi.schedule.memory import mebibytes
from halo_mpi.schedule.reading import reading_of, reads, room
from halo_mpi.schedule.search import LOOKS, best_in_memory
from halo_mpi.schedule.work import Work
from halo_mpi.wire.messages import Kind

NEIGHBOURS = 16  # devices that are tried in a move
GATHERED = 0.05  # of a token's time that gathering must save where nobody reads from disk
STANDS_OUT = 2.0  # times as long a wait for a link as for the next best
MOST_SETS = 2  # of links that stand out that are tried
FEWER_LOOKS = LOOKS // 6  # so that all together find shares of 16 devices in a second


def usual_shares(cluster: Cluster, work: Work) -> dict[str, Shares]:
    """What one might do without measuring, by name, as far as memory and disks allow it."""
    ranks = len(cluster.devices)
    even = split_evenly(work.heads, ranks), split_evenly(work.groups, ranks)
    alone = [work.heads, *[0] * (ranks - 1)], [work.groups, *[0] * (ranks - 1)]
    usual = {"even": even, "root-attention": (alone[0], even[1]), "root alone": alone}
    return {name: with_cost(cluster, work, *counts) for name, counts in usual.items() if fits(cluster, work, counts)}


def best_shares(cluster: Cluster, work: Work) -> Shares:
    """The shares with the least time per token that are found; the same for the same arguments.

    Each kind gets its best crew and counts; if some device's memory does not hold that, nor its disk gives it in time, both kinds are
    tried together, and then single units and devices are moved as long as that helps. The tests compare it with all possible shares of
    small clusters. At last the workers that are dear to wait for are gathered, if that helps, and nobody must read from disk then: with
    these counts, and with those that would be best if they were as cheap to wait for as gathered ones about are. Raises
    MemoryBudgetError if it finds none that the devices' memory holds.
    """
    best = _best_everywhere(cluster, work)
    reading, held = reads(cluster, work, best.heads, best.groups), cluster.without_disks()
    starts = [] if reading else [best]
    others = [(held, LOOKS)] if reading else []
    for other, looks in [*others, *((other, FEWER_LOOKS) for other in _as_if_gathered(held))]:
        with suppress(MemoryBudgetError):
            starts.append(_best_everywhere(other, work, looks))
    tried = [_gathered(held, work, start.heads, start.groups) for start in starts]
    gathered = min(filter(None, tried), key=lambda shares: shares.cost.tpot_ms, default=best)
    return gathered if gathered.cost.tpot_ms < (1 if reading else 1 - GATHERED) * best.cost.tpot_ms else best


def _as_if_gathered(cluster: Cluster) -> list[Cluster]:
    """The cluster with the worst links so much better as each of them is in fewer syncs, for each number of links that stand out."""
    devices, dear = cluster.devices, _dear(cluster)
    outstanding = [
        number for number in range(1, len(dear)) if _waited_ms(devices[dear[number - 1]]) > STANDS_OUT * _waited_ms(devices[dear[number]])
    ]

    def seldom(device: Device) -> Device:
        return replace(device, link_ms=device.link_ms / len(devices), late_rate=device.late_rate / len(devices))

    return [
        replace(cluster, devices=[seldom(device) if rank in dear[:number] else device for rank, device in enumerate(devices)])
        for number in outstanding[:MOST_SETS]
    ]


def _dear(cluster: Cluster) -> list[int]:
    """The workers, those first for whose links a token waits longest."""
    return sorted(range(1, len(cluster.devices)), key=lambda rank: -_waited_ms(cluster.devices[rank]))


def _waited_ms(device: Device) -> float:
    return device.link_ms + device.late_rate * device.late_ms


def _best_everywhere(cluster: Cluster, work: Work, looks: int = LOOKS) -> Shares:
    """The same with the same counts in every layer."""
    usual = [*usual_shares(cluster, work).values()]
    alone = [best_alone(cluster, work, kind) for kind in KINDS]
    if all(alone) and fits(cluster, work, alone):
        usual.append(with_cost(cluster, work, *alone))
        if usual[-1].cost.tpot_ms <= token_cost(cluster, work.layers, *alone).tpot_ms:  # nobody waits for a disk
            return min(usual, key=lambda shares: shares.cost.tpot_ms)
    best = best_in_memory(cluster, work, usual, looks)
    if best is None:
        raise MemoryBudgetError(_why_not(cluster, work))
    return _improved(cluster, work, best)


def _gathered(cluster: Cluster, work: Work, heads: Sequence[int], groups: Sequence[int]) -> Shares | None:
    """These counts, some workers that are dear to wait for in as few layers as possible; None if memory does not hold that."""
    dear = [rank for rank in _dear(cluster) if heads[rank] or groups[rank]][:NEIGHBOURS]
    tried = [with_cost(cluster, work, heads, groups, sorted(dear[: number + 1])) for number in range(len(dear))]
    tried.sort(key=lambda other: other.cost.tpot_ms)
    return next((other for other in tried if _holds(cluster, work, other)), None)


def _holds(cluster: Cluster, work: Work, shares: Shares) -> bool:
    """Whether memory holds the KV heads of other numbers of heads in each layer; all else takes as much as before."""
    heads, _ = shares.by_layer(work.layers)
    for rank, device in enumerate(cluster.devices):
        usual = work.kv_heads(shares.heads[rank])
        more = sum(work.kv_heads(own) for own in heads[:, rank].tolist()) / work.layers - usual
        if more * work.kv_bytes > room(device, work, rank == 0, shares.heads[rank], shares.groups[rank]):
            return False
    return True


def _why_not(cluster: Cluster, work: Work) -> str:
    root, advice = cluster.devices[0], "use more devices, fewer tokens of context or a smaller model"
    if all(device.read_gbps is None for device in cluster.devices):
        advice += ", or read from disk: generate --memory"
    least = int(reading_of(root, work, True, 0, 0).held_bytes)
    if root.memory is not None and root.memory < least:
        return f"the root's memory, {mebibytes(root.memory)}, does not hold what it needs beside its share, {mebibytes(least)}; {advice}"
    needed = work.bytes_of(work.heads, work.groups) + work.root_bytes
    limited = [device.memory for device in cluster.devices if device.memory is not None]
    return (
        f"no shares were found that the devices' memory holds: {mebibytes(sum(limited))} on {len(limited)} devices, "
        f"for {mebibytes(needed)} (KV cache of {work.context} tokens included) and what some need twice; {advice}"
    )


def _improved(cluster: Cluster, work: Work, shares: Shares) -> Shares:
    """The same, after all moves that help."""
    while True:
        counts_now = shares.heads, shares.groups
        better = min(
            (with_cost(cluster, work, *counts) for counts in _moves(cluster, work, shares) if fits(cluster, work, counts, counts_now)),
            key=lambda other: other.cost.tpot_ms,
            default=shares,
        )
        if better.cost.tpot_ms >= shares.cost.tpot_ms * (1 - 1e-9):
            return shares
        shares = better


def _moves(cluster: Cluster, work: Work, shares: Shares) -> Iterator[Counts]:
    """One unit away from the device that a sync waits for, alone or against one or two units of the other kind; or all of a worker's.

    What reads from disk, reads less in all syncs if it has less of any kind.
    """
    both = {Kind.ATTENTION: shares.heads, Kind.FFN: shares.groups}
    syncs = dict(zip(KINDS, (shares.cost.attention, shares.cost.ffn)))
    readers = {rank for rank in {0, *(sync.longest for sync in syncs.values())} if cluster.devices[rank].read_gbps is not None}
    for kind, other_kind in (KINDS, KINDS[::-1]):
        count, own = work.count(kind), both[kind]
        times = [share_ms(device, kind, (own[rank] + 1) / count, rank == 0) for rank, device in enumerate(cluster.devices)]
        takers = sorted(range(len(own)), key=times.__getitem__)[:NEIGHBOURS]
        if not readers:
            takers = [rank for rank in takers if times[rank] < syncs[kind].longest_ms]
        for giver, taker, back in product(sorted({syncs[kind].longest, *readers}), takers, (0, 1, 2)):
            if taker != giver and own[giver] and both[other_kind][taker] >= back:
                counts = {kind: list(own), other_kind: list(both[other_kind])}
                counts[kind][giver] -= 1
                counts[kind][taker] += 1
                counts[other_kind][giver] += back
                counts[other_kind][taker] -= back
                yield counts[Kind.ATTENTION], counts[Kind.FFN]
        crew = [rank for rank in range(len(own)) if own[rank]]
        for left in sorted(crew, key=own.__getitem__)[:NEIGHBOURS]:
            most = {rank: on_disk(cluster.devices[rank], work, kind) for rank in {0, *crew} - {left}}
            if counts := dealt_out(cluster, kind, count, most):
                yield (counts, shares.groups) if kind == Kind.ATTENTION else (shares.heads, counts)
