"""How the devices do while text flows: what was measured at the start, kept up to date by what their work takes.

A device's speed is told by the time that its work takes, over what it should take by the first measurement: the median of the last tokens,
so that one hiccup does not count. An answer is late when it took far longer beside computing than the link did at the start, and had
already when the root had looked last before.
"""

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from halo_mpi.schedule.cost import KINDS, Cluster, Device, share_ms
from halo_mpi.wire.messages import Kind

RECENT_S, LONG_S = 1.0, 5.0  # of which tokens speed and link are told, and how often answers are late
LEAST, MOST, ANSWERS = 2, 7, 100  # tokens within the first, and answers within the second, or it is made longer
PROBE_LATE_MS = 6.0  # of a probe: who has nothing to do needs some ms to wake up, TCP at least 8 to repair a loss
FORGIVEN_MS = 0.15  # of a request: what else runs on a device holds a small share up as long as a large one
LATE, LATE_MS = 2.0, 2.0  # times the usual time, and so much on top
LINK_GREW, LINK_GREW_MS = 1.5, 0.5  # the same of a link that has become slower: less is noise


@dataclass(slots=True)
class Token:
    """What was seen of a device in one token: ms that its work took, and should have taken; what its answers took beside computing."""

    took_ms: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    usual_ms: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    most_ms: float = np.inf  # the shortest of these, at most
    waited_ms: float = np.inf  # and exactly, where the root waited for it
    answers: int = 0
    late: int = 0
    late_ms: float = 0.0

    def slower(self, kind: Kind) -> float | None:
        """How many times as long its work took; who has none of one kind is as fast as with the other."""
        known = next((each for each in (kind, *KINDS) if self.usual_ms[each]), None)
        return known and self.took_ms[known] / self.usual_ms[known]


class Telemetry:
    """`first`: the cluster as it was measured at the start."""

    def __init__(self, first: Cluster):
        self._first = first
        self._now = [Token() for _ in first.devices]
        self._tokens: list[deque[tuple[float, Token]]] = [deque() for _ in first.devices]
        self._links_ms = [device.link_ms for device in first.devices]

    def computed(self, rank: int, kind: Kind, part: float, ms: float) -> None:
        """A device took so long to compute its part of a sync, its share of the layer's work."""
        token, device = self._now[rank], self._first.devices[rank]
        usual_ms = share_ms(device, kind, part, is_root=True)  # its link is judged apart
        token.took_ms[kind] += ms - min(max(0.0, ms - usual_ms), FORGIVEN_MS)
        token.usual_ms[kind] += usual_ms

    def answered(self, rank: int, over_ms: float, waited_for: bool, unseen_ms: float = 0.0) -> None:
        """A worker's answer took so long beside computing; or less, unless the root waited for it. It may have come `unseen_ms` before."""
        token, link_ms = self._now[rank], self._first.devices[rank].link_ms
        token.answers += 1
        token.most_ms = min(token.most_ms, over_ms)
        if waited_for:
            token.waited_ms = min(token.waited_ms, over_ms)
            if over_ms - unseen_ms > LATE * link_ms + LATE_MS:
                token.late += 1
                token.late_ms += over_ms - link_ms

    def probed(self, rank: int, part: float, ms: float, over_ms: float, unseen_ms: float = 0.0) -> None:
        """The same of a worker that has nothing to do, and is slow to wake up: its link is at least as good as this shows."""
        self.computed(rank, Kind.FFN, part, ms)
        token = self._now[rank]
        token.answers, token.most_ms = 1, over_ms
        if over_ms - unseen_ms > PROBE_LATE_MS:
            token.late, token.late_ms = 1, over_ms

    def end_token(self, now: float) -> None:
        """What was seen since the last call belongs to one token, which ended now, in seconds."""
        for rank, (token, tokens) in enumerate(zip(self._now, self._tokens)):
            if token.slower(Kind.FFN) is not None:
                tokens.append((now, token))
                self._now[rank] = Token()
            answers = sum(token.answers for _, token in tokens)
            while (
                len(tokens) > LEAST
                and tokens[0][0] < now - LONG_S
                and (answers := answers - tokens[0][1].answers) >= ANSWERS * bool(rank)
            ):
                tokens.popleft()

    @property
    def known(self) -> bool:
        """Whether there were tokens enough."""
        return any(len(tokens) >= LEAST for tokens in self._tokens)

    def cluster(self, gone: set[int] = frozenset()) -> Cluster:
        """The devices as they are now. `gone`: those that can do nothing."""
        devices = []
        for rank, first in enumerate(self._first.devices):
            tokens = [token for _, token in self._tokens[rank]]
            if rank in gone:
                devices.append(replace(first, disk_heads=0, disk_groups=0))
            elif len(tokens) < LEAST:
                devices.append(first)
            else:
                devices.append(replace(first, **_speed(first, self._recent(rank)), **self._link(rank, first), **_late(tokens)))
        return replace(self._first, devices=devices)

    def _recent(self, rank: int) -> list[Token]:
        """The last tokens of which something was seen."""
        tokens = self._tokens[rank]
        recent = sum(at > tokens[-1][0] - RECENT_S for at, _ in tokens)
        return [token for _, token in tokens][-min(MOST, max(LEAST, recent)) :]

    def _link(self, rank: int, first: Device) -> dict[str, float]:
        """An answer that the root did not wait for tells only that the link is no slower than that."""
        known_ms = self._links_ms[rank]
        times = [token.waited_ms if token.waited_ms < np.inf else min(token.most_ms, known_ms) for token in self._recent(rank)]
        link_ms = self._links_ms[rank] = float(np.median(times))
        grew = link_ms > LINK_GREW * first.link_ms + LINK_GREW_MS
        return {"link_ms": link_ms if grew else first.link_ms}


def _speed(first: Device, tokens: list[Token]) -> dict[str, float]:
    attention, ffn = (float(np.median([token.slower(kind) for token in tokens])) for kind in KINDS)
    return {
        "attention_ms": first.attention_ms * attention,
        "ffn_ms": first.ffn_ms * ffn,
        "fixed_ms": first.fixed_ms * (attention + ffn) / 2,
    }


def _late(tokens: list[Token]) -> dict[str, float]:
    answers, late = sum(token.answers for token in tokens), sum(token.late for token in tokens)
    if not answers:
        return {}
    return {"late_rate": late / answers, "late_ms": sum(token.late_ms for token in tokens) / max(1, late)}
