"""What a token takes on devices that differ, in strict mode: a model of the token loop.

token = layers x (sync of attention + sync of FFN) + head
sync  = the longest of the shares + what talking to the workers takes + expected waiting for lost packets
share = link (workers only) + the longer of: fixed + part of the layer x what all of it would take on this device; reading from disk
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from halo_mpi.schedule.dealing import by_layer
from halo_mpi.wire.messages import Kind

KINDS = (Kind.ATTENTION, Kind.FFN)


@dataclass(frozen=True, slots=True)
class Device:
    """A rank as the scheduler sees it; rank 0 has no link. Times in ms, memory in bytes.

    `attention_ms`, `ffn_ms`: what all heads or all groups of one layer would take here, the cache of a usual context included.
    """

    name: str
    attention_ms: float
    ffn_ms: float
    fixed_ms: float = 0.0  # of every request, whatever the share
    link_ms: float = 0.0  # a request with nothing to compute and its answer
    late_rate: float = 0.0  # of its answers: a packet was lost and had to be repaired
    late_ms: float = 0.0  # which then takes so much longer
    memory: int | None = None  # for weights and KV cache; None: enough
    read_gbps: float | None = None  # GB/s of f32 weights, decoded, that come from its disk; None: its memory must hold its share
    disk_heads: int | None = None  # of a layer, in the shards on its disk; None: all
    disk_groups: int | None = None
    kb_ms: float | None = None  # of each KB of a long answer; None: not known

    def whole_ms(self, kind: Kind) -> float:
        return self.attention_ms if kind == Kind.ATTENTION else self.ffn_ms

    def begin_ms(self, is_root: bool) -> float:
        """Of a request, beside its share of the work."""
        return self.fixed_ms if is_root else self.link_ms + self.fixed_ms


@dataclass(frozen=True, slots=True)
class Cluster:
    """The devices by rank, and what only the root does, in ms."""

    devices: Sequence[Device]
    sync_ms: float = 0.0  # what a sync with workers takes beside the longest share
    further_ms: float = 0.0  # what each worker beyond the first adds to a sync
    head_ms: float = 0.0  # of the vocabulary, once per token, if the root does it alone
    kb_ms: float | None = None  # of each KB of long answers that come to the root at once; None: not known

    def without_disks(self) -> "Cluster":
        """The same devices, whose memory must hold their shares."""
        return replace(self, devices=[replace(device, read_gbps=None) for device in self.devices])


@dataclass(frozen=True, slots=True)
class Reads:
    """Reading from disk, in ms: in a sync of each kind by rank, and on the root of the head and of the embedding."""

    attention_ms: Sequence[float]
    ffn_ms: Sequence[float]
    head_ms: float
    embedding_ms: float


@dataclass(frozen=True, slots=True)
class Sync:
    """Parts of one sync's time, in ms, and the rank that it waits for; of syncs that differ their mean, and the usual one's rank."""

    longest_ms: float
    further_ms: float
    stall_ms: float
    longest: int

    @property
    def ms(self) -> float:
        return self.longest_ms + self.further_ms + self.stall_ms


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a token, by its syncs."""

    layers: int
    attention: Sync
    ffn: Sync
    head_ms: float

    @property
    def tpot_ms(self) -> float:
        return self.layers * (self.attention.ms + self.ffn.ms) + self.head_ms


def share_ms(device: Device, kind: Kind, part: float, is_root: bool, read_ms: float = 0.0) -> float:
    """When a device's answer is there, after the sync began, if no packet is lost; `part` of the layer is its own.

    `read_ms`: how long it reads meanwhile.
    """
    if not part:
        return 0.0
    return (0.0 if is_root else device.link_ms) + max(device.fixed_ms + part * device.whole_ms(kind), read_ms)


def sync_cost(cluster: Cluster, kind: Kind, parts: Sequence[float], read_ms: Sequence[float] | None = None) -> Sync:
    """One sync in which rank r does `parts[r]` of the layer's work, and reads for `read_ms[r]`."""
    reads = read_ms or [0.0] * len(parts)
    each = zip(cluster.devices, parts, reads)
    times = [share_ms(device, kind, part, rank == 0, read) for rank, (device, part, read) in enumerate(each)]
    workers = [rank for rank in range(1, len(times)) if parts[rank]]
    longest = max(range(len(times)), key=times.__getitem__)
    return Sync(times[longest], *beside_ms(cluster, workers), longest)


def beside_ms(cluster: Cluster, workers: Sequence[int]) -> tuple[float, float]:
    """What a sync with these workers takes beside the longest share: messages, and expected waiting for lost packets."""
    further_ms = cluster.sync_ms + cluster.further_ms * (len(workers) - 1) if workers else 0.0
    return further_ms, _stall_ms(cluster.devices, workers)


def token_cost(cluster: Cluster, layers: int, heads: Sequence[int], groups: Sequence[int], reads: Reads | None = None,
               gathered: Sequence[int] = ()) -> Cost:  # fmt: skip
    """The cost of shares given as counts of heads and of groups by rank, the same in every layer but for the `gathered` ranks."""
    if gathered:
        tables = (by_layer(counts, layers, gathered) for counts in (heads, groups))
        return Cost(layers, *(_mean_sync(cluster, kind, table) for kind, table in zip(KINDS, tables)), cluster.head_ms)
    parts = [[count / sum(counts) for count in counts] for counts in (heads, groups)]
    read_ms, head_ms = (None, None), cluster.head_ms
    if reads:
        read_ms, head_ms = (reads.attention_ms, reads.ffn_ms), max(head_ms, reads.head_ms) + reads.embedding_ms
    return Cost(layers, *(sync_cost(cluster, kind, *own) for kind, *own in zip(KINDS, parts, read_ms)), head_ms)


def _mean_sync(cluster: Cluster, kind: Kind, table: np.ndarray) -> Sync:
    """Of a sync in every layer, with units by layer and rank [layers, ranks]; nobody reads from disk."""
    rows, times = np.unique(table, axis=0, return_counts=True)
    syncs = [sync_cost(cluster, kind, (row / row.sum()).tolist()) for row in rows]
    parts = np.array([(sync.longest_ms, sync.further_ms, sync.stall_ms) for sync in syncs])
    return Sync(*np.average(parts, axis=0, weights=times).tolist(), syncs[int(times.argmax())].longest)


def _stall_ms(devices: Sequence[Device], workers: Sequence[int]) -> float:
    """Expected time that the slowest repair takes, if each worker's answer is late independently of the others'."""
    expected, none_so_far = 0.0, 1.0
    for device in sorted((devices[rank] for rank in workers), key=lambda device: -device.late_ms):
        expected += none_so_far * device.late_rate * device.late_ms
        none_so_far *= 1 - device.late_rate
    return expected
