"""What a device reads from disk at every token, if its memory does not hold its share: a model of `residence` and the loader.

    weights read = weights - (memory - KV cache - two slots)            a slot: the largest part of a layer, or block of the head
    reading of a sync = weights read / speed / layers, in proportion to the kind's part of the weights

The root then holds no vocabulary either: its head is one more part of its weights, and a block of the embedding is read for each token.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from halo_mpi.schedule.cost import Cluster, Device, Reads
from halo_mpi.schedule.residence import SLOTS
from halo_mpi.schedule.work import Work

Number = int | np.ndarray  # of one share, or of many


@dataclass(frozen=True, slots=True)
class Reading:
    """Of shares of one device, numbers or arrays.

    `held_bytes`: what they take in memory; `read_bytes`: f32 weights read at every token; `attention_ms`, `ffn_ms`: reading in a sync,
    `head_ms`: of the head, `embedding_ms`: of the embedding, which nothing hides.
    """

    held_bytes: Number
    read_bytes: Number
    attention_ms: Number = 0.0
    ffn_ms: Number = 0.0
    head_ms: Number = 0.0
    embedding_ms: Number = 0.0


def reading(device: Device, work: Work, is_root: bool, heads: Number, kv_heads: Number, groups: Number) -> Reading:
    """What so many heads, with their KV heads, and groups need in memory, and what is read of them."""
    cache, root = kv_heads * work.cache_bytes, work.root_bytes if is_root else 0
    attention = heads * work.head_bytes + kv_heads * (work.kv_bytes - work.cache_bytes)
    ffn = groups * work.group_bytes
    needed = attention + ffn + cache + root
    if device.memory is None or device.read_gbps is None or np.all(needed <= device.memory):
        return Reading(needed, 0 * needed)
    over = needed > device.memory
    output, block, beside = (work.output_bytes, work.block_bytes, work.root_bytes - work.trunk_bytes) if is_root else (0, 0, 0)
    weights, budget = attention + ffn + output, device.memory - cache - beside
    slots = SLOTS * np.maximum(np.maximum(attention, ffn) / work.layers, block)
    stay = np.where(weights <= np.maximum(budget, slots), weights, np.clip(budget - slots, 0, weights))
    read = np.where(over, weights - stay, 0)
    held = np.where(over, stay + np.where(read > 0, slots, 0) + cache + beside, needed)
    part_ms = read / np.maximum(weights, 1) / device.read_gbps / 1e6  # of each byte of the weights
    embedding = np.where(over, block, 0)
    return Reading(
        held,
        read + embedding,
        part_ms * attention / work.layers,
        part_ms * ffn / work.layers,
        part_ms * output,
        embedding / device.read_gbps / 1e6,
    )


@lru_cache(maxsize=2**14)  # moves of single units change two devices, and many are tried
def reading_of(device: Device, work: Work, is_root: bool, heads: int, groups: int) -> Reading:
    """The same of one share."""
    return reading(device, work, is_root, heads, work.kv_heads(heads), groups)


def reads(cluster: Cluster, work: Work, heads: tuple[int, ...], groups: tuple[int, ...]) -> Reads | None:
    """What is read in each kind of sync by rank, and for the vocabulary, ms; None if nothing is."""
    devices = cluster.devices
    if all(device.read_gbps is None for device in devices):
        return None
    each = [reading_of(device, work, rank == 0, *own) for rank, (device, own) in enumerate(zip(devices, zip(heads, groups)))]
    if not any(own.read_bytes for own in each):
        return None
    by_rank = [float(own.attention_ms) for own in each], [float(own.ffn_ms) for own in each]
    return Reads(*by_rank, float(each[0].head_ms), float(each[0].embedding_ms))


def room(device: Device, work: Work, is_root: bool, heads: int, groups: int) -> float:
    """Bytes left on a device with so many heads and groups."""
    if device.memory is None:
        return float("inf")
    return device.memory - float(reading_of(device, work, is_root, heads, groups).held_bytes)
