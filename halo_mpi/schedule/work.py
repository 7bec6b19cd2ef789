"""What there is to share out, and what a device's memory and disk hold of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.sizes import trunk_bytes
from halo_mpi.schedule.cost import KINDS, Cluster, Cost, Device, token_cost
from halo_mpi.wire.messages import Kind

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

    def bytes_of_all(self) -> np.ndarray:
        """The same for each number of heads and of groups: [heads + 1, groups + 1]."""
        of_heads = np.array([self.bytes_of(heads, 0) for heads in range(self.heads + 1)])
        return of_heads[:, None] + self.group_bytes * np.arange(self.groups + 1)


@dataclass(frozen=True, slots=True)
class Shares:
    """Counts by rank, and what a token costs with them."""

    heads: tuple[int, ...]
    groups: tuple[int, ...]
    cost: Cost


def with_cost(cluster: Cluster, work: Work, heads: Sequence[int], groups: Sequence[int]) -> Shares:
    return Shares(tuple(heads), tuple(groups), token_cost(cluster, work.layers, heads, groups))


def fits(cluster: Cluster, work: Work, counts: Counts) -> bool:
    """Whether every device has the memory, and the shards, for its part."""
    return all(
        room(device, work, rank == 0, *own) >= 0 and all(count <= on_disk(device, work, kind) for kind, count in zip(KINDS, own))
        for rank, (device, own) in enumerate(zip(cluster.devices, zip(*counts)))
    )


def room(device: Device, work: Work, is_root: bool, heads: int, groups: int) -> float:
    """Bytes left on a device with so many heads and groups."""
    if device.memory is None:
        return float("inf")
    return device.memory - work.bytes_of(heads, groups) - (work.root_bytes if is_root else 0)


def on_disk(device: Device, work: Work, kind: Kind) -> int:
    """Heads or groups that a device may get at all."""
    held = device.disk_heads if kind == Kind.ATTENTION else device.disk_groups
    return work.count(kind) if held is None else held
