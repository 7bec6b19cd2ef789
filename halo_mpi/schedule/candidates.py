"""Counts of heads and groups by rank: what a token costs with them, and whether memory and disks hold them."""

from collections.abc import Sequence
from dataclasses import dataclass

from halo_mpi.schedule.cost import KINDS, Cluster, Cost, Device, token_cost
from halo_mpi.schedule.reading import reads, room
from halo_mpi.schedule.work import Work
from halo_mpi.wire.messages import Kind

Counts = tuple[Sequence[int], Sequence[int]]  # heads and groups by rank


@dataclass(frozen=True, slots=True)
class Shares:
    """Counts by rank, and what a token costs with them."""

    heads: tuple[int, ...]
    groups: tuple[int, ...]
    cost: Cost


def with_cost(cluster: Cluster, work: Work, heads: Sequence[int], groups: Sequence[int]) -> Shares:
    heads, groups = tuple(heads), tuple(groups)
    return Shares(heads, groups, token_cost(cluster, work.layers, heads, groups, reads(cluster, work, heads, groups)))


def fits(cluster: Cluster, work: Work, counts: Counts) -> bool:
    """Whether every device has the memory, read from disk or not, and the shards for its part."""
    return all(
        room(device, work, rank == 0, *own) >= 0 and all(count <= on_disk(device, work, kind) for kind, count in zip(KINDS, own))
        for rank, (device, own) in enumerate(zip(cluster.devices, zip(*counts)))
    )


def on_disk(device: Device, work: Work, kind: Kind) -> int:
    """Heads or groups that a device may get at all."""
    held = device.disk_heads if kind == Kind.ATTENTION else device.disk_groups
    return work.count(kind) if held is None else held
