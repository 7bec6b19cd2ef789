"""The protocol on a simulated wire: late, very late, out of step, cut off, at any point; the invariants hold."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halo_mpi.engine import crew
from halo_mpi.engine.check import CheckError
from halo_mpi.engine.crew import CREDIT
from tests import simulator
from tests.simulator import CONTEXT, IDS, NO_STALL, QUICK, RANKS, STRICT, Simulation, generated

pytestmark = pytest.mark.timeout(300)
RELAXED = replace(STRICT, mode="relaxed", quality=1.0)
delays = st.lists(st.sampled_from([0.0, 1e-4, 5e-4, 2e-3, 9e-3, 0.05, 0.4]), min_size=1, max_size=40)
slow_links = st.lists(delays, min_size=RANKS, max_size=RANKS)
stalls = st.lists(st.lists(st.sampled_from([0.0, 1e-4, 1e-3, 6e-3]), min_size=1, max_size=20), min_size=RANKS, max_size=RANKS)
modes = st.builds(
    lambda lag, quality, late, deadline: replace(RELAXED, max_lag=lag, quality=quality, late=late, deadline_ms=deadline),
    st.integers(0, 6), st.sampled_from([0.0, 0.3, 0.6, 1.0]), st.sampled_from(["defer", "defer", "drop"]), st.sampled_from([0.0, 0.4, 2.0]),
)  # fmt: skip
examples = generated(4)


def caches_are_complete(simulation: Simulation, rows: int) -> None:
    """Every K and V of the workers' heads is what the attention inputs that the root kept give, in place."""
    for rank in simulation.workers:
        if simulation.root.crew.does_without(rank) or not (simulation.root.mover.plan.query == rank).any():
            continue
        share = simulation.holdings[rank].share
        again = simulation.kernel.share(share.layers, CONTEXT)
        for layer in range(simulation.config.layers):
            if rank not in simulation.root.mover.plan.query[layer]:
                continue
            again.append(layer, simulation.root.crew.history.rows(layer, 0, rows), 0)
            for had, wanted in zip(share.kv[layer], again.kv[layer]):
                had, wanted = np.asarray(had)[:, :rows], np.asarray(wanted)[:, :rows]
                assert np.abs(had - wanted).max() < 0.02 * np.abs(wanted).max(), (rank, layer)  # the kept inputs are f16


@examples
@given(slow_links, stalls)
def test_strict_is_the_same_whatever_the_wire_does(deep, expected, delays, stalls):
    simulation = Simulation(deep, RANKS, STRICT, delays, stalls, CONTEXT)
    assert np.array_equal(simulation.text(IDS, 0), expected)
    ledger = simulation.root.ledger
    assert ledger.on_time + ledger.waited == ledger.asked and not ledger.deferred


@pytest.fixture
def little_credit(monkeypatch) -> None:
    """So that short texts see workers that are cut off."""
    monkeypatch.setattr(crew, "CREDIT", 12)


@examples
@given(slow_links, stalls, modes, st.integers(0, 3))
@pytest.mark.usefixtures("little_credit")
def test_relaxed_accounts_for_every_partial_sum_and_loses_no_kv(deep, expected, delays, stalls, mode, prefill):
    simulation = Simulation(deep, RANKS, mode, delays, stalls, CONTEXT)  # mode.check: sums are recomputed at each token
    for ids in (IDS, IDS[::-1]):  # the second text begins while answers of the first are under way
        logits = simulation.text(ids, prefill)
        assert np.isfinite(logits).all()
    ledger = simulation.root.ledger
    assert ledger.partial_sums == ledger.asked
    assert all(1 <= lag <= max(1, mode.max_lag) for lag in ledger.deferred)
    assert not (mode.late == "drop" or mode.max_lag == 0) or not ledger.deferred
    assert max(ledger.inexact, default=0.0) <= mode.quality + 1e-6 or mode.late == "drop"
    simulation.settle()
    caches_are_complete(simulation, len(IDS))
    if ledger.on_time + ledger.waited == ledger.asked and not prefill and mode.max_lag:
        assert np.array_equal(simulation.text(IDS, 0), expected) or simulation.root.ledger.deferred


@examples
@given(st.integers(1, 6), st.sampled_from([0.0, 0.3, 1.0]))
def test_with_nothing_late_relaxed_equals_strict_bit_for_bit(deep, expected, lag, quality):
    mode = replace(RELAXED, max_lag=lag, quality=quality, deadline_ms=50.0)
    simulation = Simulation(deep, RANKS, mode, QUICK, NO_STALL, CONTEXT)
    assert np.array_equal(simulation.text(IDS, 0), expected)
    assert simulation.root.ledger.on_time == simulation.root.ledger.asked


def test_late_partial_sum_is_added_once(deep, expected):
    slow = [[1e-4], [1e-4], [2e-3], [1e-4]]  # always later than the deadline, always there for the next sync
    simulation = Simulation(deep, RANKS, replace(RELAXED, deadline_ms=0.5), slow, NO_STALL, CONTEXT)
    logits = simulation.text(IDS, 0)
    ledger = simulation.root.ledger
    assert ledger.deferred and not ledger.substituted and not ledger.discarded_late
    assert 0 < np.abs(logits - expected).max() < 0.5 * np.abs(expected).max()


def test_a_worker_that_was_cut_off_gets_what_it_missed(deep):
    cut = [[1e-4]] * 3 + [[1e-4] * 30 + [2.0] + [1e-4] * 400]
    simulation = Simulation(deep, RANKS, RELAXED, cut, NO_STALL, CONTEXT)
    ids = IDS * 3  # 300 syncs
    simulation.text(ids, 0)
    assert simulation.root.crew.state(3) == "suspended" and simulation.root.ledger.substituted
    for _ in range(int(3.0 / 2e-4)):
        simulation.clock.wait()
    list(simulation.root._link.poll())
    simulation.root.step(7, len(ids))
    assert simulation.root.crew.state(3) == "ok" and len(simulation.notes) == 2 and "is back" in simulation.notes[1]
    simulation.settle()
    caches_are_complete(simulation, len(ids) + 1)


def test_where_all_workers_stall_alike_nobody_pauses(deep, monkeypatch):
    stalling = [[1e-4], *([1e-4] * before + [0.2] + [1e-4] * (301 - before) for before in (30, 130, 230))]

    def notes() -> list[str]:
        simulation = Simulation(deep, RANKS, replace(RELAXED, max_lag=2, outage_ms=30.0), stalling, NO_STALL, CONTEXT)
        for position, token in enumerate(IDS * 3):
            simulation.root.step(token, position)
            simulation.settle(0.1)
        assert simulation.root.ledger.substituted
        return [note for note in simulation.notes if "holds everybody up" in note]

    monkeypatch.setattr(crew, "HELD_UP_S", 0.05)
    assert not notes()
    monkeypatch.setattr(crew, "FAR", 0.0)
    assert notes(), "the root waits for them long enough"


def test_a_worker_that_holds_everybody_up_pauses_for_longer_and_longer(deep):
    far = [[1e-4]] * 3 + [[0.05]]
    simulation = Simulation(deep, RANKS, replace(RELAXED, max_lag=2), far, NO_STALL, CONTEXT)
    ids = IDS * 4
    for position, token in enumerate(ids):
        simulation.root.step(token, position)
        simulation.settle(0.1)  # the rest of a token's time
    notes = simulation.notes
    assert [note for note in notes if "rank 3" in note] == notes and "holds everybody up" in notes[0] and "is back" in notes[1]
    assert simulation.root.ledger.substituted and simulation.root.crew._patience[3].pause_s >= 2
    assert simulation.clock.now() < 0.1 * len(ids) + 3 * 0.6  # it was waited for no more than that
    simulation.boxes[3].delays = simulation.boxes[0].peers[3].box.delays = itertools.cycle([1e-4])
    simulation.settle(60)
    simulation.root.step(7, len(ids))
    simulation.settle()
    assert simulation.root.crew.state(3) == "ok" and "is back" in simulation.notes[-1]
    caches_are_complete(simulation, len(ids) + 1)


def test_too_little_quality_waits_for_a_worker_that_is_cut_off(deep, expected):
    cut = [[1e-4]] * 3 + [[1e-4] * 30 + [2.0] + [1e-4] * 400]
    simulation = Simulation(deep, RANKS, replace(RELAXED, quality=0.2), cut, NO_STALL, CONTEXT)
    simulation.text(IDS, 0)
    assert simulation.clock.now() > 2.0 and not simulation.root.ledger.substituted
    assert simulation.root.crew.state(3) == "ok"


def test_an_outage_piles_nothing_up(deep):
    cut = [[1e-4]] * 3 + [[1e-4] * 30 + [1e6]]
    simulation = Simulation(deep, RANKS, replace(RELAXED, late="drop"), cut, NO_STALL, 512)
    for position in range(200):
        simulation.root.step(7, position)
    assert simulation.boxes[3].most_waiting <= 2 * CREDIT


def test_the_check_finds_what_was_added_twice(deep, monkeypatch):
    from halo_mpi.engine.late_sums import LateSums

    take = LateSums.take
    monkeypatch.setattr(
        LateSums, "take", lambda self, answer: (take(self, answer), self._corrections.extend(self._corrections[-1:]))[0]
    )
    slow = [[1e-4], [1e-4], [3e-3], [1e-4]]
    with pytest.raises(CheckError, match="residual"):
        Simulation(deep, RANKS, replace(RELAXED, deadline_ms=0.5), slow, NO_STALL, CONTEXT).text(IDS, 0)


@settings(examples, max_examples=6)
@given(slow_links, stalls, modes)
def test_with_a_calibrated_model_the_same_holds(calibrated, delays, stalls, mode):
    simulation = Simulation(calibrated, RANKS, mode, delays, stalls, CONTEXT)
    assert np.isfinite(simulation.text(IDS, 0)).all()
    simulation.settle()
    ledger = simulation.root.ledger
    assert simulation.root.predictor.calibrated
    assert ledger.on_time + ledger.waited + sum(ledger.deferred.values()) + ledger.substituted == ledger.asked
    caches_are_complete(simulation, len(IDS))


def test_a_calibrated_model_with_nothing_late_is_exact(calibrated):
    strict = Simulation(calibrated, RANKS, STRICT, QUICK, NO_STALL, CONTEXT).text(IDS, 0)
    relaxed = Simulation(calibrated, RANKS, replace(RELAXED, deadline_ms=50.0), QUICK, NO_STALL, CONTEXT)
    assert np.array_equal(relaxed.text(IDS, 0), strict) and not relaxed.root.ledger.deferred


def test_late_answers_of_a_worker_that_is_back_already_are_no_defect(deep, monkeypatch):
    """It hears, and answers kicks, while it waits for weights: so it is back before it has done what it was asked before."""
    plan_of = simulator.make_plan

    def without_heads(*arguments):  # it has no attention to be sent again
        plan = plan_of(*arguments)
        plan.query[plan.query == 3] = 1
        return plan

    monkeypatch.setattr(simulator, "make_plan", without_heads)
    simulation = Simulation(deep, RANKS, replace(RELAXED, max_lag=4, outage_ms=1e6), QUICK, NO_STALL, CONTEXT)
    crew_, worker, link = simulation.root.crew, simulation.workers[3], simulation.workers[3]._link
    turn, welcome_back, waits, queued = worker.turn, crew_.welcome_back, False, []

    def wait_for_weights():
        return turn() if not waits else link.hear()

    def watched(position, rows, layer, *rest):
        nonlocal waits
        waits |= (position, layer) == (5, 1)
        was_away = crew_.does_without(3)
        welcome_back(position, rows, layer, *rest)
        if was_away and not crew_.does_without(3):
            waits = False
            queued.append(len(link._queue))

    worker.turn, crew_.welcome_back = wait_for_weights, watched
    for position, token in enumerate(IDS * 3):
        simulation.root.step(token, position)
        simulation.settle(0.1)
    assert queued[0] >= 2 and crew_.state(3) == "ok"
