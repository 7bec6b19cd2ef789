"""When work should move: if it is worth it, still is when looked at again and again, and the last move is some time ago."""

from dataclasses import dataclass

from halo_mpi.errors import MemoryBudgetError
from halo_mpi.schedule.advice import Advice, advise
from halo_mpi.schedule.cost import Cluster
from halo_mpi.schedule.shares import Work, with_cost

LOOK_S = 0.4
CHANGED, LATE_CHANGED = 0.15, 0.02  # of a device's time, and of its answers late: less is not looked into
GAIN = 0.1  # of a token's time, for which work moves; shares become even again as soon as nothing is lost by it
ENOUGH = 1.2  # what the gains seen in successive looks must add up to: 3 looks if half of the time can be saved, 8 for little
LEAST = 0.15  # that a look adds
QUIET = 8  # looks without a gain, after which none is taken until a device changes
HOLD_S, LONGEST_HOLD_S = 5.0, 80.0  # after a move; twice as long after one that came soon after another
SOON = 3.0  # times the hold


@dataclass(frozen=True, slots=True)
class Target:
    """What to do instead, and what a token takes as it is, in ms."""

    advice: Advice
    now_ms: float


class Watch:
    """`work`: what there is to share out; `calibrated`: it is known what matters."""

    def __init__(self, work: Work, calibrated: bool, unstable: tuple[int, ...] = ()):
        self._work, self._calibrated, self._unstable = work, calibrated, unstable
        self._looked_at = self._moved_at = -LONGEST_HOLD_S
        self._hold_s, self._gains, self._quiet = HOLD_S, 0.0, 0
        self._settled: list[tuple[float, ...]] | None = None  # the devices when nothing was worth a move

    def due(self, now: float) -> bool:
        """Whether to look."""
        return now - self._looked_at >= LOOK_S and now - self._moved_at >= self._hold_s

    def look(self, cluster: Cluster, heads: list[int], groups: list[int], now: float) -> Target | None:
        """What to do instead of these shares, if it is time for it; to be called when due. `now`: seconds."""
        self._looked_at = now
        devices = [_figures(device) for device in cluster.devices]
        if self._settled and not any(map(_differ, self._settled, devices)):
            return None
        target = self._better(cluster, heads, groups)
        if target is None:
            self._gains, self._quiet = 0.0, self._quiet + 1
            self._settled = devices if self._quiet >= QUIET else None
            return None
        self._quiet = 0
        self._gains += max(LEAST, 1 - target.advice.shares.cost.tpot_ms / target.now_ms)
        if self._gains < ENOUGH:
            return None
        soon = now - self._moved_at < SOON * self._hold_s + self._hold_s
        self._hold_s = min(2 * self._hold_s, LONGEST_HOLD_S) if soon else HOLD_S
        self._moved_at, self._gains, self._settled = now, 0.0, None
        self._unstable = target.advice.unstable
        return target

    def moved(self, now: float) -> None:
        """The move is done."""
        self._moved_at = now

    def _better(self, cluster: Cluster, heads: list[int], groups: list[int]) -> Target | None:
        try:
            advice = advise(cluster, self._work, self._calibrated, self._unstable)
        except MemoryBudgetError:
            return None
        now_ms = with_cost(cluster, self._work, heads, groups).cost.tpot_ms
        is_even = all(max(counts) - min(counts) <= 1 for counts in (heads, groups))
        gain = 0.0 if advice.chosen == "even" and not is_even else GAIN
        worth = advice.shares.cost.tpot_ms < (1 - gain) * now_ms
        return Target(advice, now_ms) if worth or advice.unstable != self._unstable else None


def _figures(device) -> tuple[float, ...]:
    return (device.attention_ms, device.ffn_ms, device.fixed_ms + device.link_ms, device.late_rate,
            0.0 if device.disk_groups == 0 and device.disk_heads == 0 else 1.0)  # fmt: skip


def _differ(before: tuple[float, ...], now: tuple[float, ...]) -> bool:
    *times, late, there = zip(before, now)
    if there[0] != there[1] or abs(late[0] - late[1]) > LATE_CHANGED:
        return True
    return any(abs(one - other) > CHANGED * max(one, other) and abs(one - other) > CHANGED for one, other in times)
