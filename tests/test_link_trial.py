"""The measuring of links at the start: what it tells, and that it ends soon however bad they are."""

import random
from collections import deque
from itertools import cycle

import pytest

from halo_mpi.engine.link_trial import ALONE_S, BUSY, BUSY_S, LONG_S, TOGETHER_S, LinkTrial
from halo_mpi.schedule.advice import LATE_RATE
from halo_mpi.wire.messages import Echo, Kind, Message
from halo_mpi.wire.root_link import RootLink
from tests.simulator import Clock

pytestmark = pytest.mark.timeout(60)
WIDTH = 8
GOOD, FAR = [1e-3], [2e-2]
LOSSY = [1e-3, 0.2, 1e-3, 1e-3, 0.1]


class Echoing:
    """Stands in for a mailbox whose workers send everything back. `delays`: seconds that each one's answers take, for ever."""

    def __init__(self, clock: Clock, delays: dict[int, list[float]]):
        self._clock, self._delays = clock, {rank: cycle(own) for rank, own in delays.items()}
        self._coming = {rank: deque() for rank in delays}
        self.ended, self.lags = set(), []

    def post(self, workers, kind, seq, layer=0, position=0, x=None, epoch=0, lag=0, plan=0, wire=None) -> None:
        if kind != Kind.PING:
            return
        self.lags.append(lag)
        for rank in workers:
            message = Message(1, WIDTH)
            message.write(seq, kind)
            before = self._coming[rank][-1][0] if self._coming[rank] else 0.0
            self._coming[rank].append((max(before, self._clock.now() + next(self._delays[rank])), message))

    def poll(self):
        for rank, line in self._coming.items():
            while line and line[0][0] <= self._clock.now():
                yield rank, line.popleft()[1]


class BusyClock(Clock):
    """Of a root that does not get its core back for 8 ms, at one wait of so many."""

    def __init__(self, seldom: int):
        super().__init__()
        self._random, self._seldom = random.Random(7), seldom

    def wait(self) -> None:
        self.time_s += 8e-3 * (self._random.random() < 1 / self._seldom)
        super().wait()


def trial_of(*delays: list[float], clock: Clock | None = None) -> tuple[LinkTrial, float]:
    """The trial of workers 1, 2 ..., and how many seconds it took."""
    clock = clock or Clock()
    by_rank = dict(enumerate(delays, 1))
    link = RootLink(Echoing(clock, by_rank), [*by_rank], 1e-3, waiter=clock)
    begin = clock.now()
    trial = LinkTrial(link, WIDTH)
    trial.busy_ms(lambda: None, [[0.0, 0.0]] * (1 + len(delays)))
    return trial, clock.now() - begin


def test_good_links_are_told_apart_by_what_they_take():
    trial, _ = trial_of(GOOD, FAR, GOOD)
    assert [trial.links[rank]["link_ms"] for rank in (1, 2, 3)] == pytest.approx([1.0, 20.0, 1.0], abs=0.5)
    assert trial.stable == [1, 2, 3] and not any(own["late_rate"] for own in trial.links.values())
    assert trial.kb_ms is not None and all(own["kb_ms"] is not None for own in trial.links.values())


def test_a_lossy_link_is_seen_and_does_not_change_what_is_told_of_the_others():
    (trial, took_s), (alone, _) = trial_of(GOOD, LOSSY, GOOD), trial_of(GOOD, GOOD)
    lossy = trial.links[2]
    assert trial.stable == [1, 3]
    assert lossy["late_rate"] == pytest.approx(0.4, abs=0.15) and lossy["late_ms"] == pytest.approx(150, abs=40)
    assert lossy["link_ms"] < 2.0 and lossy["kb_ms"] is None, "what it takes if nothing is lost; nothing long is sent over it"
    assert trial.further_ms == pytest.approx(alone.further_ms, abs=0.3) and trial.kb_ms == pytest.approx(alone.kb_ms, abs=0.1)
    assert took_s < 1.5


@pytest.mark.parametrize("seldom", (30, 100))
@pytest.mark.parametrize("link_ms", (1.0, 5.0))
def test_what_came_while_the_root_itself_was_away_is_not_late_and_no_sooner(seldom, link_ms):
    trial, _ = trial_of([link_ms / 1e3], [2e-3], clock=BusyClock(seldom))
    assert not any(own["late_rate"] for own in trial.links.values())
    assert trial.links[1]["link_ms"] == pytest.approx(link_ms, abs=0.5)


def test_a_moment_in_which_a_machine_stood_still_makes_no_link_unstable():
    stood_still = [8e-3 if number in (12, 17, 22, 27) else 1e-3 for number in range(160)]
    trial, _ = trial_of(GOOD, stood_still)
    assert trial.stable == [1, 2] and 0 < trial.links[2]["late_rate"] < LATE_RATE


def test_it_ends_soon_where_all_links_are_lossy():
    trial, took_s = trial_of(*[LOSSY] * 4)
    assert trial.stable == [1, 2, 3, 4] and trial.kb_ms is None
    assert took_s < 4 * ALONE_S + TOGETHER_S + LONG_S + BUSY_S + 1.0


def test_where_nothing_is_lost_all_rounds_are_played():
    clock = Clock()
    box = Echoing(clock, {1: GOOD, 2: GOOD})
    trial = LinkTrial(RootLink(box, [1, 2], waiter=clock), WIDTH)
    played = len(box.lags)
    trial.busy_ms(lambda: None, [[0.0, 0.0]] * 3)
    assert len(box.lags) - played == BUSY
    trial.end()
    assert box.lags[-1] == Echo.LAST, "the workers are told that this was all"
