"""Counts of heads and groups by rank: what a token costs with them, and whether memory and disks hold them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from halo_mpi.schedule.cost import KINDS, Cluster, Cost, Device, token_cost
from halo_mpi.schedule.dealing import by_layer
from halo_mpi.schedule.reading import reads, room
from halo_mpi.schedule.work import Work
from halo_mpi.wire.messages import Kind

Counts = tuple[Sequence[int], Sequence[int]]  # heads and groups by rank


@dataclass(frozen=True, slots=True)
class Shares:
    """Counts by rank, in every layer or on average, and what a token costs with them; `gathered` ranks have whole layers instead."""

    heads: tuple[int, ...]
    groups: tuple[int, ...]
    cost: Cost
    gathered: tuple[int, ...] = ()

    def by_layer(self, layers: int) -> tuple[np.ndarray, np.ndarray]:
        """Heads and groups, int [layers, ranks] each."""
        return by_layer(self.heads, layers, self.gathered), by_layer(self.groups, layers, self.gathered)


def with_cost(cluster: Cluster, work: Work, heads: Sequence[int], groups: Sequence[int], gathered: Sequence[int] = ()) -> Shares:
    """Shares and their cost; if some are gathered, nobody must have to read from disk."""
    heads, groups, gathered = tuple(heads), tuple(groups), tuple(gathered)
    read = None if gathered else reads(cluster, work, heads, groups)
    return Shares(heads, groups, token_cost(cluster, work.layers, heads, groups, read, gathered), gathered)


def fits(cluster: Cluster, work: Work, counts: Counts, known: Counts | None = None) -> bool:
    """Whether every device has the memory, read from disk or not, and the shards for its part. `known`: counts that fit."""
    before = zip(*known) if known else repeat(None)
    return all(
        room(device, work, rank == 0, *own) >= 0 and all(count <= on_disk(device, work, kind) for kind, count in zip(KINDS, own))
        for rank, (device, own, fitting) in enumerate(zip(cluster.devices, zip(*counts), before))
        if own != fitting
    )


def on_disk(device: Device, work: Work, kind: Kind) -> int:
    """Heads or groups that a device may get at all."""
    held = device.disk_heads if kind == Kind.ATTENTION else device.disk_groups
    return work.count(kind) if held is None else held
