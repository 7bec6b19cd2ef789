"""How many heads or groups each rank has in each layer, and which: the same in all layers, or gathered in a few.

    a part of every layer    0 0 1 2 | 0 0 1 2 | 0 0 1 2 | 0 0 1 2     a sync of every layer waits for rank 2
    rank 2 gathered          0 0 1 1 | 0 0 0 1 | 2 2 2 2 | 0 0 1 1     that of one layer does
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np


def by_layer(counts: Sequence[int], layers: int, gathered: Sequence[int] = ()) -> np.ndarray:
    """Units by layer and rank, int [layers, ranks]: `counts` in every layer, or as many in all layers together.

    The `gathered` ranks have whole layers, far from each other, so that few syncs wait for one of them; the others share the rest.
    """
    table = np.tile(np.asarray(counts, int), (layers, 1))
    if not gathered:
        return table
    units = sum(counts)
    totals = table.sum(0)
    table[:] = 0
    pieces = _pieces({rank: int(totals[rank]) for rank in gathered}, units)
    for number, piece in enumerate(pieces):
        for rank, own in piece.items():
            table[int((number + 0.5) * layers / len(pieces)), rank] = own
    totals[list(gathered)] = 0
    _share_out(table, units, totals)
    return table


def _pieces(totals: dict[int, int], units: int) -> list[dict[int, int]]:
    """Layers as the gathered ranks have them: whole ones in turns, then what is left of all."""
    whole = [((number + 0.5) / (total // units), rank) for rank, total in totals.items() for number in range(total // units)]
    pieces = [{rank: units} for _, rank in sorted(whole)]
    rest = [rank for rank, total in totals.items() for _ in range(total % units)]
    for start in range(0, len(rest), units):
        cut = rest[start : start + units]
        pieces.append({rank: cut.count(rank) for rank in dict.fromkeys(cut)})
    return pieces


def _share_out(table: np.ndarray, units: int, totals: np.ndarray) -> None:
    """Fill each layer up to `units`, so that after all layers each rank has its total, and until then in proportion."""
    done, given, every = 0, np.zeros_like(totals), max(1, int(totals.sum()))
    for row in table:
        free = units - int(row.sum())
        done += free
        due = totals * done / every - given
        own = np.minimum(np.maximum(np.floor(due + 1e-9).astype(int), 0), totals - given)
        while (more := free - int(own.sum())) != 0:
            step = np.sign(more)
            can = np.flatnonzero(own < totals - given if more > 0 else own > 0)
            own[can[((own - due)[can] * step).argsort(kind="stable")[: abs(more)]]] += step
        row += own
        given += own


def in_runs(counts: Sequence[int], tiers: Iterable[Sequence[int]], each: int) -> list[int]:
    """Owners of heads that are neighbours: the ranks' runs one after the other, so that few of the `each` with one KV head have two owners.

    A rank with a multiple of `each` begins at such a KV head, if need be after others of its tier: it needs no more of them than its
    memory was reckoned for.
    """
    result: list[int] = []
    for tier in tiers:
        waiting: list[int] = []
        for rank in tier:
            if len(result) % each and counts[rank] % each == 0:
                waiting.append(rank)
                continue
            result += [rank] * counts[rank]
            if len(result) % each == 0:
                result += [other for other in waiting for _ in range(counts[other])]
                waiting = []
        result += [other for other in waiting for _ in range(counts[other])]
    return result


def dealt_again(owner: np.ndarray, counts: Sequence[int], order: list[int], tiers: list[list[int]], disks: list[set[int]],
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
