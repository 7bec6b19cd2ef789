"""Rescues at awkward moments, on a simulated wire: each of these was wrong once."""

from dataclasses import replace

import numpy as np
import pytest

from halo_mpi.engine import rescue
from halo_mpi.errors import HaloError
from halo_mpi.schedule.placement import Plan
from tests.simulator import CONTEXT, IDS, NO_STALL, QUICK, RANKS, Simulation
from tests.test_protocol import RELAXED
from tests.test_rescue import RESCUED, at_sync, same

pytestmark = pytest.mark.timeout(300)
NO_ROOM = "its new part takes 9 MiB until the old one is given up, and 0 MiB are free"


def simulated(deep, keeps: bool = True, **sync) -> Simulation:
    return Simulation(deep, RANKS, replace(RESCUED, **sync), QUICK, NO_STALL, CONTEXT, keeps=keeps)


def begin_with(simulation: Simulation, query: np.ndarray) -> None:
    """Let these own the heads, before any text."""
    mover = simulation.root.mover
    mover.begin_at_once(Plan("given", query, mover.plan.ffn.copy()), 0)
    simulation.root.rescue._wait(0)


def spoil(simulation: Simulation, rank: int, meanwhile=lambda: None) -> None:
    """A worker's FFN answers are not numbers from now on."""
    share = simulation.holdings[rank].share
    good = share.ffn

    def spoiled(layer, x):
        y = good(layer, x)
        y[0, 5] = np.nan
        meanwhile()
        return y

    share.ffn = spoiled


def refuse(simulation: Simulation, rank: int, monkeypatch) -> None:
    """A rank has no room for anything but what it has."""

    def check_room(changes):
        if changes:
            raise HaloError(NO_ROOM)

    monkeypatch.setattr(simulation.holdings[rank], "_check_room", check_room)


def test_a_text_that_is_computed_again_is_so_to_its_end_when_another_worker_is_lost_meanwhile(deep, expected):
    simulation = simulated(deep, keeps=False)
    query = simulation.root.mover.plan.query.copy()
    query[query == 3] = 2  # the loss of rank 3 changes no cache
    begin_with(simulation, query)
    forward, lost = simulation.root._forward, []

    def watched(tokens, position, decoding):
        if not decoding and lost == [2]:
            lost.append(3)
            at_sync(simulation, {3: [lambda: simulation.end(3)]})
        return forward(tokens, position, decoding)

    simulation.root._forward = watched
    at_sync(simulation, {16 * simulation.config.layers: [lambda: (lost.append(2), simulation.end(2))]})
    assert same(simulation.text(IDS, 0), expected) and simulation.root.crew.lost() == {2, 3}


def test_an_answer_that_is_no_number_may_come_with_answers_to_kicks(deep, expected):
    simulation = simulated(deep, deadline_ms=25.0)
    spoil(simulation, 1, meanwhile=lambda: simulation.boxes[1].held_up(0.01))
    assert same(simulation.text(IDS, 3), expected[2:]) and simulation.root.crew.lost() == {1}


def test_nobody_asks_who_is_lost_whether_it_has_room(deep, expected, monkeypatch):
    simulation = simulated(deep)
    refuse(simulation, 1, monkeypatch)
    spoil(simulation, 1)
    assert same(simulation.text(IDS, 3), expected[2:]) and simulation.root.crew.lost() == {1}


def test_quality_holds_while_a_worker_is_silent(deep):
    simulation = Simulation(deep, RANKS, replace(RELAXED, takeover_ms=100.0, quality=0.05), QUICK, NO_STALL, CONTEXT)
    at_sync(simulation, {45: [lambda: simulation.cut_off(3)]})
    simulation.text(IDS, 2)
    assert max(simulation.root.ledger.inexact) <= 0.05 + 1e-6 and 3 not in simulation.root.mover.plan.ffn


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_has_no_room_goes_on_with_what_it_has(deep, expected, rank):
    simulation = simulated(deep)
    simulation.holdings[rank]._budget = 1
    at_sync(simulation, {20: [lambda: simulation.end(2)]})
    assert same(simulation.text(IDS, 0), expected) and simulation.root.crew.lost() == {2}


def test_nobody_is_blamed_while_the_root_waits_for_its_own_weights(deep, expected):
    simulation = simulated(deep)
    need, count = simulation.holdings[0].need, 0

    def slow(part):
        nonlocal count
        count += 1
        if count == 5:
            simulation.clock.time_s += 0.3
        return need(part)

    simulation.holdings[0].need = slow
    assert same(simulation.text(IDS, 0), expected) and not simulation.notes


def test_who_gets_its_work_again_and_falls_silent_before_it_has_it_is_given_up(deep, expected):
    simulation = simulated(deep)
    mover = simulation.root.mover
    announce, again = mover._announce, []

    def announced(plan):
        if any("gets its work again" in note for note in simulation.notes) and not again:
            again.append(2)
            simulation.cut_off(2)
        return announce(plan)

    mover._announce = announced
    at_sync(simulation, {25: [lambda: simulation.cut_off(2, 0.25)]})
    for _ in range(12):
        assert same(simulation.text(IDS, 0), expected)
        simulation.settle(0.3)
    assert again and mover.idle and simulation.root.crew.state(2) == "suspended"


def test_work_is_not_given_back_if_the_root_has_no_room_for_its_smaller_part(deep, expected, monkeypatch):
    simulation = simulated(deep, keeps=False)
    at_sync(simulation, {25: [lambda: simulation.cut_off(2, 0.25)]})
    assert same(simulation.text(IDS, 0), expected)
    simulation.settle()
    refuse(simulation, 0, monkeypatch)
    for _ in range(4):
        assert same(simulation.text(IDS, 0), expected)
        simulation.settle(0.1)
    assert any("takes no more over" in note for note in simulation.notes)


def test_who_loads_for_long_is_asked_whether_it_is_there_even_without_kicks(deep, expected):
    simulation = simulated(deep, kick_ms=0.0)
    holdings, until = simulation.holdings[1], {}
    is_prepared = holdings.is_prepared

    def slow(plan):
        return simulation.clock.now() > until.setdefault(plan, simulation.clock.now() + 0.5) and is_prepared(plan)

    holdings.is_prepared = slow
    at_sync(simulation, {20: [lambda: simulation.end(2)]})
    assert same(simulation.text(IDS, 0), expected)
    assert simulation.root.crew.done_without() == {2} and not any("rank 1" in note for note in simulation.notes)


def test_a_root_that_was_stopped_does_not_take_the_silent_for_present(deep, expected):
    simulation = simulated(deep)
    clock, stopped = simulation.clock, []
    wait = clock.wait

    def stopped_once():
        if any("taken over" in note for note in simulation.notes) and not stopped:
            stopped.append(True)
            clock.time_s += 5.0
        wait()

    clock.wait = stopped_once
    at_sync(simulation, {25: [lambda: simulation.cut_off(2)]})
    for _ in range(2):
        assert same(simulation.text(IDS, 0), expected)
    assert stopped and simulation.root.crew.state(2) == "suspended"


def test_who_waits_for_ever_waits_for_those_that_load_too(deep, expected):
    simulation = simulated(deep)
    rescue, mover = simulation.root.rescue, simulation.root.mover
    rescue.silent_s = 0.0
    begin = mover.begin_at_once

    def cut_off_meanwhile(plan, epoch):
        simulation.cut_off(1, 700.0)
        mover.begin_at_once = begin
        return begin(plan, epoch)

    mover.begin_at_once = cut_off_meanwhile
    wait = simulation.clock.wait

    def long_wait():
        simulation.clock.time_s += 0.02
        wait()

    simulation.clock.wait = long_wait
    at_sync(simulation, {20: [lambda: simulation.end(2)]})
    assert same(simulation.text(IDS, 0), expected)


def test_who_answers_kicks_and_never_does_its_part_is_given_up(deep, expected, monkeypatch):
    monkeypatch.setattr(rescue, "MOST_S", 1.0)
    simulation = simulated(deep)
    worker = simulation.workers[2]
    at_sync(simulation, {25: [lambda: setattr(worker, "turn", lambda: worker._link.hear())]})  # its disk hangs
    assert same(simulation.text(IDS, 0), expected)
    assert any("rank 2 is suspended: it answers, but did not do its part" in note for note in simulation.notes)
    assert simulation.root.crew.lost() == {2}
