"""The plan that gives everybody what it should have, with as few heads and groups as possible in another place than now."""

from collections.abc import Callable, Sequence

import numpy as np

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.sizes import Sizes
from halo_mpi.schedule.cost import Cluster
from halo_mpi.schedule.placement import Disks, Plan, order_of_heads, without_ends
from halo_mpi.schedule.work import Work


def moved(plan: Plan, config: ModelConfig, heads: Sequence[int], groups: Sequence[int], unstable: Sequence[int], available: Disks,
          calibration: dict | None) -> Plan:  # fmt: skip
    """The plan with so many heads and groups by rank. Of a calibrated model, what matters least goes to the `unstable`, of every
    layer; what matters most to rank 0, if anybody is unstable."""
    ranks = len(heads)
    tiers = [list(range(ranks))]
    if calibration and unstable:
        tiers = [[0], [rank for rank in range(1, ranks) if rank not in unstable], sorted(unstable)]
    query, ffn = plan.query.copy(), plan.ffn.copy()
    for layer in range(config.layers):
        order = list(range(config.heads))
        if calibration:
            order = order_of_heads(config, calibration["heads"]["importance"][layer])

        def has_kv(rank: int, head: int) -> bool:
            first = head // config.heads_per_kv * config.heads_per_kv
            return rank in query[layer, first : first + config.heads_per_kv]

        query[layer] = _dealt_again(plan.query[layer], heads, order, tiers, [disk["query"] for disk in available], False, has_kv)
        ffn[layer] = _dealt_again(
            plan.ffn[layer], groups, list(range(config.groups)), tiers, [disk["ffn"] for disk in available], True
        )
    return Plan("moved", query, ffn)


def room(plan: Plan, sizes: Sizes, cluster: Cluster, work: Work) -> int | None:
    """Bytes that every rank has left under a plan, less than 0 if one lacks some; None: enough."""
    left = None
    for rank, device in enumerate(cluster.devices):
        heads, groups = plan.query_heads(rank), plan.groups(rank)
        if device.memory is not None:
            taken = sum(sizes.layer_bytes(*own, work.context) for own in zip(heads, groups))
            own = device.memory - taken - (work.root_bytes if rank == 0 else 0)
            left = own if left is None else min(left, own)
    return left


def ends_spared(plan: Plan, unstable: Sequence[int], sizes: Sizes, cluster: Cluster, work: Work, available: Disks) -> Plan:
    """The plan with nothing of the first and the last layer on the `unstable`, if the others' memory holds that; else as it is."""
    spared = without_ends(plan, unstable, len(cluster.devices), available)
    left = room(spared, sizes, cluster, work)
    return spared if left is None or left >= 0 else plan


def _dealt_again(owner: np.ndarray, counts: Sequence[int], order: list[int], tiers: list[list[int]], disks: list[set[int]],
                 spread: bool, prefers: Callable[[int, int], bool] = lambda rank, entry: False) -> np.ndarray:  # fmt: skip
    """Owners of the entries, `counts` of them by rank, the first in `order` to the first tier, and within a tier where they are.

    `spread`: what a rank keeps are some of the better and some of the worse, else the first.
    """
    result, left, rest = np.full(len(owner), -1), list(counts), []
    start = 0
    for tier in tiers:
        own = order[start : start + sum(counts[rank] for rank in tier)]
        start += len(own)
        for rank in tier:
            kept = [entry for entry in own if owner[entry] == rank]
            if len(kept) > left[rank]:
                places = np.linspace(0, len(kept) - 1, left[rank]).round().astype(int) if spread else range(left[rank])
                kept = [kept[place] for place in places]
            result[kept] = rank
            left[rank] -= len(kept)
        rest += [(entry, tier) for entry in own if result[entry] < 0]
    for entry, tier in rest:
        for some in (tier, range(len(counts))):
            if takers := [rank for rank in some if left[rank] > 0 and entry in disks[rank]]:
                rank = max(takers, key=lambda rank: (prefers(rank, entry), left[rank], -rank))
                break
        else:  # it stays: the disks of those who should have it lack it
            rank = int(owner[entry])
        result[entry] = rank
        left[rank] -= 1
    return result
