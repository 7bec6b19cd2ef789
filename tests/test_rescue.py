"""Workers that end, fall silent or fail, on a simulated wire: others do their work, and the text is the same."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halo_mpi.engine import holdings
from halo_mpi.engine.rescue import dealt_to_others
from halo_mpi.errors import DamagedFileError, HaloError
from halo_mpi.schedule.placement import Plan
from tests.simulator import CONTEXT, IDS, NO_STALL, QUICK, RANKS, STRICT, Simulation, generated
from tests.test_moves import any_plan
from tests.test_protocol import RELAXED, slow_links, stalls

pytestmark = pytest.mark.timeout(300)
examples = generated(8)
RESCUED = replace(STRICT, takeover_ms=100.0)
faults = st.lists(st.tuples(st.integers(1, RANKS - 1), st.integers(0, 250), st.sampled_from(["end", "silent", "outage"])), max_size=4)


def same(logits: np.ndarray, expected: np.ndarray) -> bool:
    return logits.shape == expected.shape and np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()


def at_sync(simulation: Simulation, events: dict[int, list]) -> None:
    """Call these when the root asks for the n-th time."""
    link, count = simulation.root._link, 0
    ask = link.ask

    def counted(*request, **fields):
        nonlocal count
        for event in events.get(count, ()):
            event()
        count += 1
        return ask(*request, **fields)

    link.ask = counted


def befall(simulation: Simulation, faults: list[tuple[int, int, str]]) -> None:
    """Let each (rank, n-th request, what) happen to a worker."""
    acts = {"end": simulation.end, "silent": simulation.cut_off, "outage": lambda rank: simulation.cut_off(rank, 0.3)}
    events = {}
    for rank, sync, what in faults:
        events.setdefault(sync, []).append(lambda rank=rank, what=what: acts[what](rank))
    at_sync(simulation, events)


@examples
@given(slow_links, stalls, faults, st.integers(0, 5), st.booleans(), st.sampled_from([20.0, 100.0]), st.integers(0, 9))
def test_whoever_ends_or_falls_silent_at_any_time_the_text_is_the_strict_one(
    deep, expected, delays, stalls, faults, prefill, keeps, takeover_ms, seed
):
    simulation = Simulation(deep, RANKS, replace(STRICT, takeover_ms=takeover_ms), delays, stalls, CONTEXT, keeps=keeps)
    befall(simulation, faults)
    if keeps:
        simulation.root.mover.aim_at(any_plan(simulation, seed))
    for _ in range(2):  # the second text begins with whoever is left
        assert same(simulation.text(IDS, prefill), expected[max(0, prefill - 1) :])
    plan, lost = simulation.root.mover.plan, simulation.root.crew.lost()
    assert lost == simulation.boxes[0].ended and not any(rank in plan.query or rank in plan.ffn for rank in lost)


@pytest.mark.parametrize("keeps", [True, False], ids=["from kept inputs", "computed again"])
def test_the_last_rank_does_everything_alone(deep, expected, keeps):
    simulation = Simulation(deep, RANKS, RESCUED, QUICK, NO_STALL, CONTEXT, keeps=keeps)
    at_sync(simulation, {30 * rank: [lambda rank=rank: simulation.end(rank)] for rank in range(1, RANKS)})
    assert same(simulation.text(IDS, 0), expected)
    plan = simulation.root.mover.plan
    assert not plan.query.any() and not plan.ffn.any()
    assert [simulation.root.crew.state(rank) for rank in range(1, RANKS)] == ["lost"] * (RANKS - 1)


def test_who_comes_back_gets_its_work_again(deep, expected):
    simulation = Simulation(deep, RANKS, RESCUED, QUICK, NO_STALL, CONTEXT, keeps=True)
    root, home = simulation.root, simulation.root.mover.plan
    at_sync(simulation, {25: [lambda: simulation.cut_off(2, 0.25)]})
    assert same(simulation.text(IDS, 0), expected)
    assert 2 not in root.mover.plan.ffn or root.mover.number > 1
    simulation.settle()
    for _ in range(8):
        assert same(simulation.text(IDS, 0), expected)
        simulation.settle(0.1)
    assert np.array_equal(root.mover.plan.query, home.query) and np.array_equal(root.mover.plan.ffn, home.ffn)
    assert root.crew.state(2) == "ok" and any("rank 2 gets its work again" in note for note in simulation.notes)


def test_a_worker_with_a_damaged_shard_is_suspended_and_its_file_named(deep, expected, monkeypatch):
    simulation = Simulation(deep, RANKS, RESCUED, QUICK, NO_STALL, CONTEXT, keeps=True)

    def damaged(part):
        raise DamagedFileError("shard-00.h5 is damaged at layer 0, ffn 2")

    monkeypatch.setattr(simulation.holdings[3], "need", damaged)
    assert same(simulation.text(IDS, 0), expected)
    assert simulation.root.crew.state(3) == "suspended" and simulation.root.crew.lost() == {3}
    assert any("rank 3 is suspended: shard-00.h5 is damaged" in note for note in simulation.notes)
    assert 3 not in simulation.root.mover.plan.query and 3 not in simulation.root.mover.plan.ffn


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_partial_sums_that_are_not_finite_are_not_added(deep, expected, value):
    simulation = Simulation(deep, RANKS, RESCUED, QUICK, NO_STALL, CONTEXT, keeps=True)
    share = simulation.holdings[1].share
    good = share.ffn

    def spoiled(layer, x):
        y = good(layer, x)
        if layer == 2:
            y[0, 5] = value
        return y

    share.ffn = spoiled
    assert same(simulation.text(IDS, 3), expected[2:])
    assert any("rank 1 is suspended: its partial sums are not finite" in note for note in simulation.notes)


def test_who_has_no_room_takes_nothing_over(deep, expected, monkeypatch):
    simulation = Simulation(deep, RANKS, RESCUED, QUICK, NO_STALL, CONTEXT, keeps=True)
    before = simulation.holdings[1].groups[0]

    def full(changes):
        if changes:
            raise HaloError("its new part takes 9 MiB until the old one is given up, and 0 MiB are free")

    monkeypatch.setattr(simulation.holdings[1], "_check_room", full)
    at_sync(simulation, {20: [lambda: simulation.end(2)]})
    assert same(simulation.text(IDS, 0), expected)
    assert simulation.holdings[1].groups[0] == before and 2 not in simulation.root.mover.plan.ffn
    assert any("takes no more over: rank 1: its new part" in note for note in simulation.notes)
    assert simulation.root.crew.lost() == {2}


def test_without_room_anywhere_the_end_is_told(deep, monkeypatch):
    simulation = Simulation(deep, RANKS, RESCUED, QUICK, NO_STALL, CONTEXT, keeps=True)
    monkeypatch.setattr(holdings, "available_bytes", lambda: 0)
    at_sync(simulation, {20: [lambda: simulation.end(2)]})
    with pytest.raises(HaloError, match="rank 2 is gone, and nobody who is left can take its work over"):
        simulation.text(IDS, 0)


def test_a_text_goes_on_in_relaxed_mode_too(deep):
    simulation = Simulation(deep, RANKS, replace(RELAXED, takeover_ms=100.0, quality=0.2), QUICK, NO_STALL, CONTEXT)
    at_sync(simulation, {25: [lambda: simulation.end(2)], 60: [lambda: simulation.cut_off(3)]})
    assert np.isfinite(simulation.text(IDS, 2)).all()
    assert max(simulation.root.ledger.inexact) <= 0.2
    assert simulation.root.mover.number and 2 not in simulation.root.mover.plan.ffn


def test_a_process_that_was_stopped_itself_blames_nobody(deep, expected):
    simulation = Simulation(deep, RANKS, RESCUED, QUICK, NO_STALL, CONTEXT, keeps=True)
    clock, waits = simulation.clock, 0
    wait = clock.wait

    def stopped_once():
        nonlocal waits
        waits += 1
        if waits == 40:
            clock.time_s += 30.0
        wait()

    clock.wait = stopped_once
    assert same(simulation.text(IDS, 0), expected) and not simulation.notes


PLAN = Plan("some", np.array([[0, 1, 2, 2]] * 3), np.array([[0, 0, 1, 1, 2, 2]] * 3))


def test_what_is_dealt_out_stays_in_proportion_and_nothing_else_moves():
    everything = [{"query": set(range(4)), "ffn": set(range(6))}] * 3
    dealt = dealt_to_others(PLAN, {2}, {2}, everything)
    assert dealt.query.tolist() == [[0, 1, 0, 1]] * 3 and dealt.ffn.tolist() == [[0, 0, 1, 1, 0, 1]] * 3
    alone = dealt_to_others(PLAN, {1, 2}, {1, 2}, everything)
    assert not alone.query.any() and not alone.ffn.any()


def test_only_who_has_the_shard_takes_a_part_over():
    disks = [{"query": set(range(4)), "ffn": set(range(6))}, {"query": {1}, "ffn": {2, 3, 4, 5}}, {"query": {2, 3}, "ffn": {4, 5}}]
    assert dealt_to_others(PLAN, {2}, {2}, disks).query.tolist() == [[0, 1, 0, 0]] * 3
    disks[0]["query"] = {0, 1}
    with pytest.raises(HaloError, match="rank 2 is gone.*shard of query head 2"):
        dealt_to_others(PLAN, {2}, {2}, disks)
