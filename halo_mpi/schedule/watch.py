"""When work should move: if it is worth it, still is when looked at again and again, and the last move is some time ago."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from halo_mpi.errors import MemoryBudgetError
from halo_mpi.schedule.advice import WORTH, Advice, advise
from halo_mpi.schedule.candidates import Counts, fits, with_cost
from halo_mpi.schedule.cost import Cluster, Device
from halo_mpi.schedule.work import Work

LOOK_S = 0.4
CHANGED, LATE_CHANGED = 0.15, 0.02  # of a device's time, and of its answers late: less is not looked into
GAIN, LOSS = 0.1, 0.02  # of a token's time: for so much work moves; shares become even, or as at first, if no more is lost by it
ENOUGH = 1.2  # what the gains seen in successive looks must add up to: 3 looks if half of the time can be saved, 8 for little
LEAST = 0.15  # that a look adds
MOST_LOOKS = 3.0  # that one look counts for
SELDOM = 20.0  # times as long as a look took, until the next: it holds the token up
QUIET = 8  # looks without a gain, after which none is taken until a device changes
HOLD_S, LONGEST_HOLD_S = 5.0, 80.0  # after a move; twice as long after one that came soon after another
SOON = 3.0  # times the hold


@dataclass(frozen=True, slots=True)
class Target:
    """What to do instead, what part of a token's time that saves, and why, in words."""

    advice: Advice
    gain: float
    why: str
    urgent: bool = False


class Watch:
    """`work`: what there is to share out; `calibrated`: it is known what matters; `first`: heads and groups by rank at the start."""

    def __init__(self, work: Work, calibrated: bool, unstable: tuple[int, ...] = (), first: Counts | None = None):
        self._work, self._calibrated, self._unstable, self._first = work, calibrated, unstable, first
        self._looked_at = self._moved_at = -LONGEST_HOLD_S
        self._hold_s, self._gains, self._quiet, self._look_took_s = HOLD_S, 0.0, 0, 0.0
        self._settled: list[tuple[float, ...]] | None = None  # the devices when nothing was worth a move

    def due(self, now: float, somebody_is_gone: bool = False) -> bool:
        """Whether to look. While somebody's work lies idle there is no hold."""
        looked = now - self._looked_at >= max(LOOK_S, SELDOM * self._look_took_s)
        return looked and (somebody_is_gone or now - self._moved_at >= self._hold_s)

    def look(self, cluster: Cluster, heads: list[int], groups: list[int], now: float, gathered: Sequence[int] = ()) -> Target | None:
        """What to do instead of these shares, if it is time for it; to be called when due. `now`: seconds."""
        looks = min(MOST_LOOKS, (now - self._looked_at) / LOOK_S)  # where a token takes long, one look says as much as several
        self._looked_at = now
        devices = [_figures(device) for device in cluster.devices]
        if self._settled and not any(map(_differ, self._settled, devices)):
            return None
        begin = time.perf_counter()
        target = self._better(cluster, heads, groups, gathered)
        self._look_took_s = time.perf_counter() - begin
        if target is None:
            self._gains, self._quiet = 0.0, self._quiet + 1
            self._settled = devices if self._quiet >= QUIET else None
            return None
        self._quiet = 0
        self._gains += looks * max(LEAST, target.gain)
        if self._gains < ENOUGH and not target.urgent:
            return None
        soon = now - self._moved_at < SOON * self._hold_s + self._hold_s
        self._hold_s = min(2 * self._hold_s, LONGEST_HOLD_S) if soon else HOLD_S
        self._moved_at, self._gains, self._settled = now, 0.0, None
        self._unstable = target.advice.unstable
        return target

    def moved(self, now: float) -> None:
        """The move is done."""
        self._moved_at = now

    def _better(self, cluster: Cluster, heads: list[int], groups: list[int], gathered: Sequence[int]) -> Target | None:
        try:
            advice = advise(cluster, self._work, self._calibrated, self._unstable)
        except MemoryBudgetError:
            return None
        shares, unstable = advice.shares, advice.unstable
        now_ms = with_cost(cluster, self._work, heads, groups, gathered).cost.tpot_ms
        gain = 1 - shares.cost.tpot_ms / now_ms
        is_even = not gathered and all(max(counts) - min(counts) <= 1 for counts in (heads, groups))
        gone = [rank for rank, device in enumerate(cluster.devices) if _is_gone(device) and (heads[rank] or groups[rank])]
        if gone:
            return Target(advice, 0.0, f"rank {gone[0]} does not answer", urgent=True)
        if not gathered and (again := self._as_at_first(cluster, advice, now_ms, (heads, groups))):
            return again
        if gain > (-LOSS if advice.chosen == "even" and not is_even else GAIN):
            saved = f"a token would take {shares.cost.tpot_ms:.0f} ms instead of {now_ms:.0f}"
            return Target(advice, gain, saved if gain > GAIN else "the devices are about alike again")
        apart = set(gathered) & set(shares.gathered)  # they have layers of their own but for one, with all that matters there
        if set(unstable) - apart == set(self._unstable) - apart:
            return None
        named = ", ".join(map(str, unstable))
        return Target(advice, 0.0, f"what matters least should be on rank {named}" if unstable else "all ranks are stable again")

    def _as_at_first(self, cluster: Cluster, advice: Advice, now_ms: float, now: Counts) -> Target | None:
        """Back to the shares of the start, if these are about as good as the best ones again: a device has recovered."""
        if self._first is None or [*map(list, self._first)] == [*map(list, now)] or not fits(cluster, self._work, self._first):
            return None
        first = with_cost(cluster, self._work, *self._first)
        if first.cost.tpot_ms > min((1 + LOSS) * now_ms, advice.shares.cost.tpot_ms / (1 - WORTH)):
            return None
        there = Advice({**advice.options, "first": first}, "first", advice.unstable)
        return Target(there, max(0.0, 1 - first.cost.tpot_ms / now_ms), "the devices are about as at the start again")


def _is_gone(device: Device) -> bool:
    return device.disk_heads == 0 and device.disk_groups == 0


def _figures(device: Device) -> tuple[float, ...]:
    return device.attention_ms, device.ffn_ms, device.fixed_ms + device.link_ms, device.late_rate, float(_is_gone(device))


def _differ(before: tuple[float, ...], now: tuple[float, ...]) -> bool:
    *times, late, there = zip(before, now)
    if there[0] != there[1] or abs(late[0] - late[1]) > LATE_CHANGED:
        return True
    return any(abs(one - other) > CHANGED * max(one, other) and abs(one - other) > CHANGED for one, other in times)
