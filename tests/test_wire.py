"""Deadlines and kicks, each alone."""

import itertools

import numpy as np
import pytest

from halo_mpi.wire.deadline import ENOUGH, FIRST_S, FORGIVEN, PATIENT_S, WINDOW, Deadline
from halo_mpi.wire.messages import Kind
from halo_mpi.wire.root_link import KICKS_BEFORE_BACKOFF, KICKS_IN_FLIGHT, LONGEST_KICK_S, RootLink
from halo_mpi.wire.worker_link import WorkerLink
from tests.simulator import TICK_S, Box, Clock

pytestmark = pytest.mark.timeout(30)
KICK_S = 1e-3


# Deadlines


def learned(latencies_ms: list[float]) -> Deadline:
    deadline = Deadline(None)
    for latency_ms in latencies_ms:
        deadline.observe(latency_ms / 1e3)
    return deadline


def clean(number: int = WINDOW) -> list[float]:
    """Round trips of about 0.5 ms."""
    return (0.5 + np.abs(np.random.default_rng(1).normal(0, 0.05, number))).tolist()


def lossy(number: int = WINDOW) -> list[float]:
    """One in ten is repaired after 9 ms, as with 5 % loss in each direction."""
    lost = np.random.default_rng(2).random(number) < 0.1
    assert lost[:ENOUGH].sum() > FORGIVEN
    return (np.array(clean(number)) + 9 * lost).tolist()


def test_the_usual_time_is_the_median_of_the_recent_answers():
    assert learned(clean()).usual_s == pytest.approx(0.53e-3, rel=0.05)
    assert learned([5.0] * WINDOW + clean()).usual_s < 0.6e-3


def test_a_deadline_is_patient_before_anything_is_known_and_on_a_clean_link():
    assert Deadline(None).at(7.0, 7.0) == 7.0 + FIRST_S
    assert learned(clean()).at(7.0, 7.0) == 7.0 + PATIENT_S


def test_a_deadline_is_short_where_answers_are_often_late():
    assert 1e-3 < learned(lossy()).at(0.0, 0.0) < 4e-3
    often = [9.5 if number % 5 == 0 else 0.5 for number in range(ENOUGH)]
    assert learned(often[:-1]).at(0.0, 0.0) >= PATIENT_S, "too little is known"
    assert learned(often).at(0.0, 0.0) < 4e-3


def test_hiccups_of_a_busy_machine_are_forgiven():
    latencies = clean()
    latencies[50 : 50 + FORGIVEN] = [40.0] * FORGIVEN
    assert learned(latencies).at(0.0, 0.0) == PATIENT_S
    latencies[50 : 50 + 5 * FORGIVEN] = [40.0] * 5 * FORGIVEN
    assert learned(latencies).at(0.0, 0.0) < 4e-3


def test_a_link_that_recovered_is_waited_for_again():
    assert learned(lossy() + clean()).at(0.0, 0.0) == PATIENT_S


def test_a_slow_link_gets_the_time_it_takes():
    assert learned([60 + latency for latency in clean()]).at(0.0, 0.0) > 0.06


def test_a_deadline_is_never_before_the_root_is_done_itself():
    assert learned(lossy()).at(0.0, 0.1) == 0.1


def test_a_fixed_deadline_counts_from_the_roots_own_share_and_learns_nothing():
    deadline = Deadline(0.002)
    for latency_ms in clean():
        deadline.observe(latency_ms / 1e3)
    assert deadline.at(0.0, 0.1) == 0.1 + 0.002
    assert deadline.usual_s > 0, "kicks need it all the same"


# Kicks


class Recorder(Box):
    """A box that notes when what was sent."""

    posts: list[tuple[float, Kind]]

    def post(self, peers, kind, *message, **fields) -> None:
        self.posts.append((self._clock.now(), kind))
        super().post(peers, kind, *message, **fields)

    def delay(self, seconds: float) -> None:
        self.delays = itertools.repeat(seconds)


GROUP_S = 0.004


class Star:
    """A root and a worker; every message but for pings takes `delay_s`."""

    def __init__(self, kick_s: float, delay_s: float):
        self.clock = Clock()
        self.box, worker = Recorder(self.clock, 4, 1, [delay_s]), Box(self.clock, 4, 1, [delay_s])
        self.box.posts, self.box.peers = [], {1: worker}
        worker.rank, worker.peers = 1, {0: self.box}
        self._worker = WorkerLink(worker, self.clock)
        self.clock.turns.append(self._work)
        self.link = RootLink(self.box, [1], kick_s, waiter=self.clock)
        self.peer = self.link.peers[1]

    def _work(self) -> None:
        while request := self._worker.next():
            if request.kind == Kind.PROBE:  # computes six times, and tells of one
                self.clock.time_s += 6 * GROUP_S
                self._worker.answer(request, None, GROUP_S, beside_s=5 * GROUP_S)
            else:
                self._worker.answer(request, request.x)

    def ask(self) -> float:
        """When."""
        self.link.ask(Kind.FFN, 0, 0, np.ones((1, 4), np.float32), [1])
        return self.clock.now()

    def wait(self, seconds: float) -> list[float]:
        """As the root waits for an answer; when it sent kicks."""
        begin, most = len(self.box.posts), 0
        for _ in range(round(seconds / TICK_S)):
            list(self.link.poll())
            if self.peer.asked_at:
                self.link.kick(1)
            most = max(most, self.peer.kicks_in_flight)
            self.clock.wait()
        assert most <= KICKS_IN_FLIGHT
        return [at for at, kind in self.box.posts[begin:] if kind == Kind.KICK]


def test_an_outage_is_kicked_a_limited_number_of_times():
    star = Star(KICK_S, 1e6)
    star.ask()
    assert len(star.wait(2.0)) == KICKS_IN_FLIGHT
    for _ in range(50):  # in relaxed mode the root goes on asking
        star.ask()
        assert not star.wait(0.01)


def test_kicks_become_rarer():
    star = Star(KICK_S, 1e6)
    asked = star.ask()
    times = star.wait(2.0)
    assert KICK_S <= times[0] - asked <= KICK_S + 2 * TICK_S
    expected = [min(KICK_S * 2 ** max(0, number - KICKS_BEFORE_BACKOFF), LONGEST_KICK_S) for number in range(1, KICKS_IN_FLIGHT)]
    gaps = np.diff(times)
    assert len(gaps) == len(expected) and (np.abs(gaps - expected) <= 2 * TICK_S).all(), gaps


def test_kicks_that_are_answered_may_go_on():
    star = Star(KICK_S, 0.005)
    for _ in range(3):
        star.ask()
        assert 3 <= len(star.wait(0.05)) and not star.peer.kicks_in_flight
    assert not star.peer.asked_at


def test_no_kick_before_the_usual_time_is_over():
    star = Star(KICK_S, 0.005)
    for _ in range(WINDOW):
        star.ask()
        star.wait(0.012)
    assert star.peer.deadline.usual_s == pytest.approx(0.01, abs=1e-3)
    star.ask()
    assert not star.wait(0.03), "the answer came after the usual time"
    star.box.delay(1.0)
    asked = star.ask()
    assert star.wait(0.03)[0] - asked >= star.peer.deadline.usual_s + KICK_S - TICK_S / 2


def test_without_kicks_there_are_none():
    star = Star(0.0, 1e6)
    star.ask()
    assert not star.wait(1.0)


def test_what_a_probe_computes_is_not_the_links_time():
    star = Star(KICK_S, 1e-3)
    star.link.probe_speed(1)
    while star.peer.probe is None:
        list(star.link.poll())
        star.clock.wait()
    probe = star.peer.probe
    assert probe.took_s == pytest.approx(GROUP_S) and probe.latency_s - probe.took_s == pytest.approx(2e-3, abs=2 * TICK_S)
