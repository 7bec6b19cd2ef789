"""How the devices do while text flows: what was measured at the start, kept up to date by what their work takes.

A device's speed is told by the time that its work takes, over what it should take by the first measurement: the median of some tokens, so
that it is soon known and no hiccup counts. How often it is late is counted over more tokens.
"""

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from halo_mpi.schedule.cost import KINDS, Cluster, Device
from halo_mpi.wire.messages import Kind

TOKENS = 7  # whose median is taken
FORGIVEN_MS = 0.15  # of a request: what else runs on a device holds a small share up as long as a large one
LATE_TOKENS = 48  # over which late answers are counted
LINK_GREW, LINK_GREW_MS = 1.5, 0.5  # times the link's time at the start, and so much on top: less is noise


@dataclass(slots=True)
class Seen:
    """Of one device. Of the token under way: ms that its work took, and should have taken, by kind; of the last ones: their ratio."""

    took_ms: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    usual_ms: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    slower: dict[Kind, deque] = field(default_factory=lambda: {kind: deque(maxlen=TOKENS) for kind in KINDS})
    least_ms: float = np.inf  # what an answer took beside computing, at most, and exactly where the root waited for it
    waited_ms: float = np.inf
    over_ms: deque = field(default_factory=lambda: deque(maxlen=TOKENS))
    answers: int = 0
    late: int = 0
    late_ms: float = 0.0
    lateness: deque = field(default_factory=lambda: deque(maxlen=LATE_TOKENS))  # (answers, late, late_ms) by token


class Telemetry:
    """`first`: the cluster as it was measured at the start."""

    def __init__(self, first: Cluster):
        self._first = first
        self._seen = [Seen() for _ in first.devices]

    def computed(self, rank: int, kind: Kind, part: float, ms: float) -> None:
        """A device took so long to compute its part of a sync, its share of the layer's work."""
        seen, device = self._seen[rank], self._first.devices[rank]
        usual_ms = device.fixed_ms + part * device.whole_ms(kind)
        seen.took_ms[kind] += ms - min(max(0.0, ms - usual_ms), FORGIVEN_MS)
        seen.usual_ms[kind] += usual_ms

    def answered(self, rank: int, over_ms: float, waited_for: bool, late_ms: float | None) -> None:
        """A worker's answer took so long beside computing, or less, unless the root waited for it; `late_ms`: past the usual, if it was
        late."""
        seen = self._seen[rank]
        seen.least_ms = min(seen.least_ms, over_ms)
        if waited_for:
            seen.waited_ms = min(seen.waited_ms, over_ms)
        seen.answers += 1
        if late_ms is not None:
            seen.late += 1
            seen.late_ms += late_ms

    def probed(self, rank: int, part: float, ms: float, over_ms: float) -> None:
        """The same of a worker that has nothing to do, and is slow to wake up: its link is at least as good as this shows."""
        self.computed(rank, Kind.FFN, part, ms)
        known = self._seen[rank].over_ms
        if known and over_ms < np.median(known):
            known.append(over_ms)

    def end_token(self) -> None:
        """What was seen since the last call belongs to one token."""
        for seen, first in zip(self._seen, self._first.devices):
            for kind, other in (KINDS, KINDS[::-1]):  # who has none of one kind is as fast as with the other
                known = kind if seen.usual_ms[kind] else other
                if seen.usual_ms[known]:
                    seen.slower[kind].append(seen.took_ms[known] / seen.usual_ms[known])
            seen.took_ms, seen.usual_ms = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
            if seen.answers:
                known_ms = np.median(seen.over_ms) if seen.over_ms else first.link_ms
                seen.over_ms.append(
                    min(seen.least_ms, max(known_ms, first.link_ms) if seen.waited_ms == np.inf else seen.waited_ms)
                )
                seen.lateness.append((seen.answers, seen.late, seen.late_ms))
            seen.least_ms = seen.waited_ms = np.inf
            seen.answers, seen.late, seen.late_ms = 0, 0, 0.0

    @property
    def known(self) -> bool:
        """Whether there were tokens enough."""
        return any(len(tokens) == TOKENS for seen in self._seen for tokens in seen.slower.values())

    def cluster(self, gone: set[int] = frozenset()) -> Cluster:
        """The devices as they are now. `gone`: those that can do nothing."""
        now = [self._now(rank, device, rank in gone) for rank, device in enumerate(self._first.devices)]
        return replace(self._first, devices=now)

    def _now(self, rank: int, first: Device, gone: bool) -> Device:
        if gone:
            return replace(first, disk_heads=0, disk_groups=0)
        seen, ratio = self._seen[rank], {}
        for kind in KINDS:
            ratio[kind] = float(np.median(seen.slower[kind] or [1.0]))
        device = replace(
            first,
            attention_ms=first.attention_ms * ratio[Kind.ATTENTION],
            ffn_ms=first.ffn_ms * ratio[Kind.FFN],
            fixed_ms=first.fixed_ms * float(np.mean(list(ratio.values()))),
        )
        if seen.over_ms and np.median(seen.over_ms) > LINK_GREW * first.link_ms + LINK_GREW_MS:
            device = replace(device, link_ms=float(np.median(seen.over_ms)))
        if len(seen.lateness) >= TOKENS:
            answers, late, late_ms = np.sum(list(seen.lateness), axis=0)
            device = replace(device, late_rate=float(late / answers), late_ms=float(late_ms / max(1, late)))
        return device
