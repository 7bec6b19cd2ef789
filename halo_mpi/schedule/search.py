"""Both kinds of work within the devices' memory: crews and longest shares are tried, those that promise most first.

For the longest shares of attention and of the FFN, each device could do so many groups beside each number of heads; the best sum over
the devices, for each number of heads so far, says whether all heads and all groups find a place.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from numpy.lib.stride_tricks import as_strided

from halo_mpi.schedule.candidates import Counts, Shares, on_disk, with_cost
from halo_mpi.schedule.cost import KINDS, Cluster, Device, beside_ms
from halo_mpi.schedule.crews import changed, crews, dealt_out
from halo_mpi.schedule.reading import reading
from halo_mpi.schedule.work import Work

EVERY_CREW = 6  # workers, up to which all crews are tried
SIZES = 6  # of a crew that are tried of more workers
NEIGHBOURS = 3  # workers within a crew, and outside of it, that are tried in a move
LOOKS = 10_000  # at a device, all together, to see whether all finds a place; if it is seen at once that it does not, all count as one
MANY_HEADS = 32  # with which a look takes about twice as long as with few, and with more in proportion to their square
LEVELS = 120  # longest shares of attention that are tried with a pair of crews
NONE = -(10**6)  # groups, where the heads alone are too much

Crew = tuple[int, ...]


def best_in_memory(cluster: Cluster, work: Work, starts: Sequence[Shares], looks: int = LOOKS) -> Shares | None:
    """The shares with the least time per token that are found, `starts` among them; None if the devices cannot hold everything.

    Of small clusters exactly, unless there are too many ways to try: more than `looks` allow.
    """
    search = _Search(cluster, work, starts, looks)
    if search.best or search.find_any():
        pairs = [(first, second) for first in search.crews for second in search.crews]
        least = [np.array([search.least_ms(kind, crew) for crew in search.crews]) for kind in (0, 1)]
        if len(cluster.devices) - 1 > EVERY_CREW:
            for pair in _promising(search, *(own[:, 0] for own in least)):  # not all of a crew need get something
                search.try_in_turn(*pairs[pair])
        for pair in _promising(search, *(own.sum(1) for own in least)):
            if search.looks > looks:
                break
            search.try_crews(*pairs[pair])
        if len(cluster.devices) - 1 > EVERY_CREW:
            search.change_crews()
    return search.best


def _promising(search: "_Search", first: np.ndarray, second: np.ndarray) -> Iterator[int]:
    """Pairs of crews by the least, ms, that each crew's kind of work takes, as long as that is less than the best so far."""
    bounds = np.add.outer(first, second).ravel()
    for pair in np.argsort(bounds, kind="stable"):
        if bounds[pair] >= search.best_ms:
            return
        yield int(pair)


class _Search:
    """`best`: the best shares so far; `best_ms`: what their syncs take, per layer.

    `crews`: those to try; `looks`: what was done so far.
    """

    def __init__(self, cluster: Cluster, work: Work, starts: Sequence[Shares], most_looks: int):
        self._cluster, self._work, self.looks, self._most_looks = cluster, work, 0, most_looks
        self.best, self.best_ms = None, np.inf
        for shares in starts:
            self._take(shares)
        self.crews = crews(cluster, EVERY_CREW, SIZES)
        keys = [(device, rank == 0) for rank, device in enumerate(cluster.devices)]
        alike = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        self._which = np.array([alike[key] for key in keys])
        *self._ms, read_bytes = [np.stack(own) for own in zip(*(tables(work, *key) for key in alike))]
        self._possible = np.isfinite(self._ms[0])  # [kinds of devices, heads + 1, groups + 1], as all these tables
        self._held = self._possible & (read_bytes == 0)
        self._levels = [np.unique(table[np.isfinite(table)]) for table in self._ms]
        self._least_ms: dict[tuple, tuple[float, float]] = {}
        self._most_groups: dict[tuple[int, float], np.ndarray] = {}
        by_bytes = (work.head_bytes + work.kv_bytes / work.heads_per_kv) / max(1, work.group_bytes)
        self._weights = np.array([0, round(by_bytes), work.groups + 1])

    def find_any(self) -> bool:
        """Whether there are shares that the devices can hold; if there are, they are the best so far."""
        everybody = range(len(self._which))
        if not all(map(len, self._levels)) or not (
            counts := self._counts(*(levels[-1] for levels in self._levels), everybody, everybody)
        ):
            return False
        self._take(with_cost(self._cluster, self._work, *counts))
        return True

    def try_crews(self, attention: Crew, ffn: Crew) -> None:
        """Find the best longest shares of these crews, if they can be better than the best so far."""
        (first, beside_first), (second, beside_second) = self.least_ms(0, attention), self.least_ms(1, ffn)
        least, beside = (first, second), beside_first + beside_second
        if not np.isfinite(sum(least)):
            return
        levels = self._between(0, least[0], self.best_ms - beside - least[1])
        if len(levels) > LEVELS:
            levels = levels[np.linspace(0, len(levels) - 1, LEVELS).astype(int)]
        for number in sorted(range(len(levels)), key=lambda number: -(number & -number) if number else -LEVELS):  # coarsely first
            level = levels[number]
            if self.looks > self._most_looks:
                return
            others = self._between(1, least[1], self.best_ms - beside - level)
            if not len(others) or (counts := self._counts(level, others[-1], attention, ffn)) is None:
                continue
            low, high = 0, len(others) - 1
            while low < high:
                middle = (low + high) // 2
                if found := self._counts(level, others[middle], attention, ffn):
                    high, counts = middle, found
                else:
                    low = middle + 1
            self._take(with_cost(self._cluster, self._work, *counts))

    def try_in_turn(self, attention: Crew, ffn: Crew) -> None:
        """Deal out one kind within the memory, then the other within what is left; or either within what may be read."""
        for can, first in product((self._held, self._possible), (0, 1)):
            counts = [[0] * len(self._which)] * 2
            for kind in (first, 1 - first):
                possible = can[self._which, :, counts[1]] if kind == 0 else can[self._which, counts[0]]  # [devices, count + 1]
                most = (possible * np.arange(possible.shape[1])).max(1).tolist()
                crew = (attention, ffn)[kind]
                dealt = dealt_out(self._cluster, KINDS[kind], possible.shape[1] - 1, {rank: most[rank] for rank in crew})
                if dealt is None:
                    break
                counts[kind] = dealt
            else:
                if can[self._which, counts[0], counts[1]].all():
                    self._take(with_cost(self._cluster, self._work, *counts))

    def change_crews(self) -> None:
        """Try crews that differ by one worker from the best, as long as that helps."""
        best, self.looks = None, 0
        while best is not self.best and self.looks <= self._most_looks:
            best = self.best
            first, second = (
                tuple(rank for rank, own in enumerate(counts) if own or not rank) for counts in (best.heads, best.groups)
            )
            for attention in changed(self._cluster, first, NEIGHBOURS):
                self.try_crews(attention, second)
            for ffn in changed(self._cluster, second, NEIGHBOURS):
                self.try_crews(first, ffn)

    def least_ms(self, kind: int, crew: Crew) -> tuple[float, float]:
        """What the longest share of one kind must take with a crew, and what a sync takes beside it."""
        if (kind, crew) not in self._least_ms:
            self._least_ms[kind, crew] = self._least(kind, crew), sum(beside_ms(self._cluster, crew[1:]))
        return self._least_ms[kind, crew]

    def _take(self, shares: Shares) -> None:
        if self.best is None or shares.cost.tpot_ms < self.best.cost.tpot_ms:
            self.best = shares
            self.best_ms = (shares.cost.tpot_ms - self._cluster.head_ms) / self._work.layers * (1 - 1e-9)

    def _between(self, kind: int, least: float, most: float) -> np.ndarray:
        """Lengths of a share of one kind, ms, ascending."""
        levels = self._levels[kind]
        return levels[np.searchsorted(levels, least * (1 - 1e-9)) : np.searchsorted(levels, most)]

    def _least(self, kind: int, crew: Crew) -> float:
        """The longest share if a crew did nothing else than one kind, ms; inf if it cannot."""
        alone = self._ms[0][:, :, 0] if kind == 0 else self._ms[1][:, 0, :]
        count, alone = alone.shape[1] - 1, alone[self._which[list(crew)]]
        levels = self._levels[kind]

        def holds(level: float) -> bool:
            fits = alone <= level
            return (fits * np.arange(count + 1)).max(1).sum() >= count

        if not len(levels) or not holds(levels[-1]):
            return np.inf
        low, high = 0, len(levels) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(levels[middle]) else (middle + 1, high)
        return float(levels[high])

    def _counts(self, attention_ms: float, ffn_ms: float, attention: Sequence[int], ffn: Sequence[int]) -> Counts | None:
        """Heads and groups by rank so that no share is longer; None if there are none."""
        work, ranks = self._work, [rank for rank in range(len(self._which)) if rank in attention or rank in ffn]
        most = np.minimum(self._most(0, attention_ms), self._most(1, ffn_ms))[self._which[ranks]]  # [ranks, heads + 1]: groups
        rooms = np.where(most < 0, NONE, most)
        for row, rank in enumerate(ranks):
            if rank not in ffn:
                np.minimum(rooms[row], 0, out=rooms[row])
            elif rank not in attention:
                rooms[row, 1:] = NONE
        self.looks += 1
        if (self._weighed(rooms).sum(0) < work.groups + self._weights * work.heads).any():
            return None
        self.looks += len(ranks) * (1 + (work.heads / MANY_HEADS) ** 2)
        sums = np.full((len(ranks) + 1, 2 * work.heads + 1), NONE)  # groups of the ranks before, by their heads + `work.heads`
        sums[0, work.heads] = 0
        before = _windows(sums, work.heads)
        for row, room in enumerate(rooms):
            sums[row + 1, work.heads :] = (before[row] + room).max(1)
        if sums[-1, -1] < work.groups:
            return None
        heads, groups, left = [0] * len(self._which), [0] * len(self._which), work.heads
        for row, rank in reversed([*enumerate(ranks)]):
            own = int((before[row, left] + rooms[row]).argmax())
            heads[rank], groups[rank], left = own, int(rooms[row, own]), left - own
        over = sum(groups) - work.groups
        for rank in ranks[::-1]:
            less = min(over, groups[rank])
            groups[rank], over = groups[rank] - less, over - less
        return heads, groups

    def _most(self, kind: int, level: float) -> np.ndarray:
        """Groups beside each number of heads so that a share of one kind is no longer, int [kinds of devices, heads + 1]; -1: none.

        More groups never make a share shorter.
        """
        if (kind, level) not in self._most_groups:
            self._most_groups[kind, level] = (self._ms[kind] <= level).sum(2) - 1
        return self._most_groups[kind, level]

    def _weighed(self, rooms: np.ndarray) -> np.ndarray:
        """The most that each rank gives if a head counts as so many groups, [ranks, weights]: more cannot be dealt out, whatever the
        weight."""
        return (rooms[:, None] + self._weights[:, None] * np.arange(rooms.shape[1])).max(2)


def _windows(sums: np.ndarray, heads: int) -> np.ndarray:
    """Of rows [2 heads + 1] for -heads to heads, a view [rows, heads so far, heads of the next rank]: what is there for the difference."""
    row, step = sums.strides
    return as_strided(sums[:, heads:], (len(sums), heads + 1, heads + 1), (row, step, -step), writeable=False)


def tables(work: Work, device: Device, is_root: bool) -> list[np.ndarray]:
    """What a share of each kind takes, ms, of a device with so many heads and groups [heads + 1, groups + 1]; inf where it cannot.

    And how many bytes it reads.
    """
    heads, groups = np.arange(work.heads + 1)[:, None], np.arange(work.groups + 1)[None, :]
    kv_heads = np.array([work.kv_heads(own) for own in range(work.heads + 1)])[:, None]
    read = reading(device, work, is_root, heads, kv_heads, groups)
    cannot = (heads > on_disk(device, work, KINDS[0])) | (groups > on_disk(device, work, KINDS[1]))
    if device.memory is not None:
        cannot = cannot | (read.held_bytes > device.memory)
    found, link_ms = [], 0.0 if is_root else device.link_ms
    for kind, own, read_ms in zip(KINDS, (heads, groups), (read.attention_ms, read.ffn_ms)):
        compute_ms = device.fixed_ms + own / work.count(kind) * device.whole_ms(kind)
        ms = np.where(own > 0, link_ms + np.maximum(compute_ms, read_ms), 0.0)
        found.append(np.where(cannot, np.inf, ms))
    return [*found, np.broadcast_to(read.read_bytes, cannot.shape)]
