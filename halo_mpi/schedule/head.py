"""How many rows of the head each rank should score, so that the logits are there soonest.

worker   link + fixed + its rows x what a row takes there + what their scores take on its line    \
root     its own rows meanwhile; and all workers' scores, one after the other, on its line         }  the longest counts
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from halo_mpi.schedule.advice import LATE_RATE, WORTH, Advice
from halo_mpi.schedule.candidates import Shares
from halo_mpi.schedule.cost import Cluster
from halo_mpi.schedule.reading import reading_of, room
from halo_mpi.schedule.work import Work
from halo_mpi.store.encoding import TILE_ROWS

LEAST_MS = 0.2  # that a split must save
MOST_CREW = 64  # workers that are tried; many answers wait for one another
HALVINGS = 40
MOST_TOKENS = 64  # at once
MOST_VECTORS = 64  # of an answer; as many as a request of prefill has
FURTHER = 2  # values beside the scores of a token, which tell the largest one
F16_BYTES = 2


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """Rows by rank, all on the root if that is best; `ms` per token with them, `alone_ms` if the root has all. `tokens`: so many at once
    are worth it."""

    rows: tuple[int, ...]
    ms: float
    alone_ms: float
    tokens: int = 1

    @property
    def is_split(self) -> bool:
        return any(self.rows[1:])


def even_rows(vocabulary: int, ranks: int, most: int) -> list[int]:
    """As many rows for each rank, in whole tiles, but at most so many for a worker; the root has the rest."""
    own = min(vocabulary // TILE_ROWS // ranks * TILE_ROWS, most)
    return [vocabulary - own * (ranks - 1)] + [own] * (ranks - 1)


def most_rows(width: int) -> int:
    """Rows, whole tiles, whose scores for one token fit into one message with vectors of this width."""
    return (MOST_VECTORS * width - FURTHER) // TILE_ROWS * TILE_ROWS


def best_head(cluster: Cluster, work: Work, shares: Shares, most_rows: int, score_bytes: int = F16_BYTES) -> HeadSplit:
    """The rows with which a token takes least, or all on the root if that is hardly slower; nothing is split where it is not known what
    large answers take, or where the root reads its head from disk. `most_rows`: in one answer."""
    alone = HeadSplit((work.vocabulary,) + (0,) * (len(cluster.devices) - 1), cluster.head_ms, cluster.head_ms)
    takers = _takers(cluster, work, shares)
    if not work.vocabulary or not cluster.head_ms or not takers:
        return alone
    row_bytes = work.output_bytes / work.vocabulary
    most = np.array([min(most_rows, _room(cluster, work, shares, rank) / row_bytes) for rank in takers])
    best = alone
    for count in range(1, len(takers) + 1):
        rows = _rows(cluster, work, takers[:count], most[:count], score_bytes)
        ms = head_ms(cluster, work, rows, score_bytes)
        if ms < best.ms:
            best = HeadSplit(rows, ms, cluster.head_ms)
    if not _is_worth_it(best.ms, cluster.head_ms):
        return alone
    tokens = (
        n for n in range(MOST_TOKENS, 1, -1) if _is_worth_it(head_ms(cluster, work, best.rows, n * score_bytes), cluster.head_ms)
    )
    return replace(best, tokens=next(tokens, 1))


def head_ms(cluster: Cluster, work: Work, rows: Sequence[int], score_bytes: int = F16_BYTES) -> float:
    """What the logits take with so many rows by rank; a device without a known line counts as if it had none."""
    parts, kb = np.array(rows) / work.vocabulary, score_bytes * np.array(rows) / 1e3
    workers = [rank for rank in range(1, len(rows)) if rows[rank]]
    own = parts[0] * cluster.head_ms
    if not workers:
        return float(own)
    over, first, row_ms, line_ms = _times(cluster, workers)
    there = over + np.maximum(
        first + parts[workers] * row_ms + kb[workers] * line_ms, first.min() + kb[workers].sum() * _own_line(cluster)
    )
    return float(max(own, there.max()))


def with_head(advice: Advice, head: HeadSplit) -> Advice:
    """The advice with the time that the vocabulary takes so, wherever it is not read from disk."""
    return replace(advice, options={name: counted(shares, head) for name, shares in advice.options.items()})


def counted(shares: Shares, head: HeadSplit) -> Shares:
    """The same of shares."""
    return replace(shares, cost=replace(shares.cost, head_ms=head.ms)) if shares.cost.head_ms == head.alone_ms else shares


def _is_worth_it(ms: float, alone_ms: float) -> bool:
    return ms <= min((1 - WORTH) * alone_ms, alone_ms - LEAST_MS)


def _takers(cluster: Cluster, work: Work, shares: Shares) -> list[int]:
    """Workers that might score rows, those that answer soonest first."""
    root, *workers = cluster.devices
    if reading_of(root, work, True, shares.heads[0], shares.groups[0]).read_bytes:
        return []
    able = [
        rank
        for rank, device in enumerate(workers, 1)
        if device.kb_ms is not None and device.late_rate < LATE_RATE and _room(cluster, work, shares, rank) > 0
    ]
    return sorted(able, key=lambda rank: cluster.devices[rank].begin_ms(False))[:MOST_CREW]


def _room(cluster: Cluster, work: Work, shares: Shares, rank: int) -> float:
    """Bytes that a worker has left; none if it reads from disk."""
    device, own = cluster.devices[rank], (shares.heads[rank], shares.groups[rank])
    if reading_of(device, work, False, *own).read_bytes:
        return 0.0
    return room(device, work, False, *own)


def _times(cluster: Cluster, workers: Sequence[int]) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """What talking to these adds, and by worker: before its first row, of all rows, and of each KB of scores; all in ms."""
    root, devices = cluster.devices[0], [cluster.devices[rank] for rank in workers]
    return (
        cluster.sync_ms + cluster.further_ms * (len(workers) - 1),
        np.array([device.begin_ms(False) for device in devices]),
        np.array([cluster.head_ms * device.ffn_ms / root.ffn_ms for device in devices]),
        np.array([device.kb_ms or 0.0 for device in devices]),
    )


def _own_line(cluster: Cluster) -> float:
    """Of each KB that comes to the root; if unknown, as the fastest worker's."""
    known = [device.kb_ms for device in cluster.devices[1:] if device.kb_ms is not None]
    return cluster.kb_ms if cluster.kb_ms is not None else min(known, default=0.0)


def _rows(cluster: Cluster, work: Work, workers: Sequence[int], most: np.ndarray, score_bytes: int) -> tuple[int, ...]:
    """Rows by rank with which these workers and the root are done at about the same time."""
    over, first, row_ms, line_ms = _times(cluster, workers)
    kb, own_line = score_bytes * work.vocabulary / 1e3, _own_line(cluster)

    def parts(until_ms: float) -> np.ndarray:
        """What the workers can do until then."""
        own = np.minimum(np.maximum(until_ms - over - first, 0) / (row_ms + kb * line_ms), most / work.vocabulary)
        arrives = max(until_ms - over - first.min(), 0) / (kb * own_line) if own_line else np.inf
        return own * min(1.0, arrives / max(own.sum(), 1e-9))

    low, high = 0.0, cluster.head_ms
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = middle / cluster.head_ms + parts(middle).sum() >= 1
        low, high = (low, middle) if enough else (middle, high)
    rows = [0] * len(cluster.devices)
    for rank, part in zip(workers, parts(high).tolist()):
        rows[rank] = int(part * work.vocabulary) // TILE_ROWS * TILE_ROWS
    rows[0] = work.vocabulary - sum(rows)
    return tuple(rows)
