"""Work that moves to other ranks while text flows, on a simulated wire: nothing is lost, nothing is computed under two plans."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halo_mpi.engine import mover
from halo_mpi.engine.loader import Loader
from halo_mpi.engine.mover import from_rows, to_rows
from halo_mpi.errors import DamagedFileError, HaloError
from halo_mpi.model.loading import share_parts
from halo_mpi.model.sizes import shape_bytes
from halo_mpi.schedule.placement import Change, Plan
from halo_mpi.schedule.residence import reside
from halo_mpi.wire.messages import Kind, Message
from tests.simulator import CONTEXT, IDS, NO_STALL, QUICK, RANKS, STRICT, Simulation, generated
from tests.test_protocol import RELAXED, caches_are_complete, slow_links, stalls

pytestmark = pytest.mark.timeout(300)
examples = generated(2)


def any_plan(simulation: Simulation, seed: int) -> Plan:
    """Every head and group anywhere."""
    random, config = np.random.default_rng(seed), simulation.config
    ranks = random.integers(1, RANKS + 1)  # sometimes on few of them
    return Plan("any", *(random.integers(0, ranks, (config.layers, count)) for count in (config.heads, config.groups)))


def finish_moving(simulation: Simulation, ids: list[int]) -> list[np.ndarray]:
    """More tokens, until nothing moves any more."""
    logits = []
    while not simulation.root.mover.idle:
        logits.append(simulation.root.step(ids[len(logits) % len(ids)], len(ids) + len(logits)))
        simulation.settle(0.2)  # for links that take as long as many tokens
        assert len(logits) < CONTEXT - len(ids), "it never ends"
    return logits


def is_held(simulation: Simulation, plan: Plan) -> bool:
    """By all who have work in it: who has none hears of it with the next plan."""
    return all(
        held.heads == plan.query_heads(rank) and held.groups == plan.groups(rank)
        for rank, held in enumerate(simulation.holdings)
        if (plan.query == rank).any() or (plan.ffn == rank).any()
    )


@examples
@given(
    slow_links,
    stalls,
    st.lists(st.integers(0, 99), min_size=1, max_size=3),
    st.sampled_from([1, 2**12, 2**20]),
    st.integers(0, 4),
)
def test_moving_parts_at_random_changes_nothing_but_the_rounding(deep, expected, delays, stalls, seeds, step_bytes, prefill):
    simulation = Simulation(deep, RANKS, STRICT, delays, stalls, CONTEXT, keeps=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mover, "STEP_BYTES", step_bytes)
        for seed in seeds:
            plan = any_plan(simulation, seed)
            simulation.root.mover.aim_at(plan)
            logits = simulation.text(IDS, prefill)
            assert np.abs(logits - expected[max(0, prefill - 1) :]).max() < 1e-3 * np.abs(expected).max()
            finish_moving(simulation, IDS)
            simulation.settle()
            assert is_held(simulation, plan)
            caches_are_complete(simulation, len(IDS))
    ledger = simulation.root.ledger
    assert ledger.on_time + ledger.waited == ledger.asked


@examples
@given(slow_links, stalls, st.integers(0, 99), st.sampled_from([0.3, 1.0]))
def test_what_moves_while_answers_are_late_is_accounted_for(deep, delays, stalls, seed, quality):
    simulation = Simulation(deep, RANKS, replace(RELAXED, quality=quality), delays, stalls, CONTEXT, keeps=True)
    simulation.root.mover.aim_at(any_plan(simulation, seed))
    for ids in (IDS, IDS[::-1]):
        assert np.isfinite(simulation.text(ids, 2)).all()
    ledger = simulation.root.ledger
    assert ledger.partial_sums == ledger.asked
    simulation.settle()
    caches_are_complete(simulation, len(IDS))


def test_a_text_is_the_same_before_during_and_after_a_move(deep):
    still = Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, CONTEXT)
    ids = IDS * 3
    wanted = still.text(ids, 0)
    simulation = Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, CONTEXT, keeps=True)
    logits, plans = [], []
    for position, token in enumerate(ids):
        if simulation.root.mover.idle:
            plans.append(any_plan(simulation, position))
            simulation.root.mover.aim_at(plans[-1])
        logits.append(simulation.root.step(token, position))
    assert len(plans) > 2 and simulation.root.mover.number > 2
    assert np.abs(np.stack(logits) - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_a_step_is_small_and_a_portion_too(deep, monkeypatch):
    monkeypatch.setattr(mover, "STEP_BYTES", 1)
    monkeypatch.setattr(mover, "FIRST_BYTES", 1)
    monkeypatch.setattr(mover, "PORTION_BYTES", 1)
    monkeypatch.setattr(mover, "MOST_BYTES", 256)
    simulation = Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, CONTEXT, keeps=True)
    simulation.text(IDS[:5], 0)
    plan = Plan("any", (simulation.root.mover.plan.query + 1) % RANKS, simulation.root.mover.plan.ffn)
    simulation.root.mover.aim_at(plan)
    finish_moving(simulation, IDS[:5])
    assert simulation.root.mover.number == simulation.config.layers and is_held(simulation, plan)
    simulation.settle()
    caches_are_complete(simulation, 5)


def test_a_worker_that_cannot_load_its_part_keeps_everything_where_it_is(deep, monkeypatch):
    simulation = Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, CONTEXT, keeps=True)
    wanted, before = simulation.text(IDS, 0), simulation.root.mover.plan
    read = simulation.store.read

    def fail(table, layer, entry):
        if table == "ffn":
            raise DamagedFileError("shard-01.h5 is damaged at layer 2, ffn 0")
        return read(table, layer, entry)

    monkeypatch.setattr(simulation.store, "read", fail)
    simulation.root.mover.aim_at(Plan("any", before.query, (before.ffn + 1) % RANKS))
    finish_moving(simulation, IDS)
    assert not simulation.root.mover.may_move and is_held(simulation, before)
    assert "work stays where it is" in simulation.notes[-1] and "shard-01.h5 is damaged" in simulation.notes[-1]
    assert np.array_equal(simulation.text(IDS, 0), wanted)


def test_nobody_gets_anything_who_is_away(deep):
    cut = [[1e-4]] * 3 + [[1e-4] * 30 + [1e6]]
    simulation = Simulation(deep, RANKS, RELAXED, cut, NO_STALL, CONTEXT, keeps=True)
    simulation.text(IDS * 3, 0)
    assert simulation.root.crew.state(3) == "suspended"
    plan = simulation.root.mover.plan
    everything_to_3 = Plan("any", np.full_like(plan.query, 3), np.full_like(plan.ffn, 3))
    simulation.root.mover.aim_at(everything_to_3)
    finish_moving(simulation, IDS * 3)
    assert simulation.root.mover.plan is plan and "rank 3 does not answer" in simulation.notes[-1]
    without_3 = Plan("any", np.where(plan.query == 3, 1, plan.query), np.where(plan.ffn == 3, 2, plan.ffn))
    substituted = simulation.root.ledger.substituted
    simulation.root.mover.aim_at(without_3)
    more = finish_moving(simulation, IDS * 3)
    assert simulation.root.mover.plan.query.tolist() == without_3.query.tolist()
    during = simulation.root.ledger.substituted
    for position in range(3):
        simulation.root.step(7, 30 + len(more) + position)
    assert substituted < during == simulation.root.ledger.substituted, "nothing of it is lacking any more"


def test_a_request_of_an_unknown_plan_is_an_error(deep):
    simulation = Simulation(deep, 2, STRICT, QUICK, NO_STALL, CONTEXT, keeps=True)
    with pytest.raises(HaloError, match="plan 7, of which this rank was not told"):
        simulation.holdings[1].follow(7)


def test_changes_survive_the_wire():
    changes = {3: Change([0, 2], []), 29: Change([], [1, 5, 11])}
    assert from_rows(to_rows(255, changes, 32)) == (255, changes)
    assert from_rows(to_rows(0, {}, 32)) == (0, {})


def test_old_weights_are_let_go_of(deep):
    simulation = Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, CONTEXT, keeps=True)
    held = simulation.holdings[1]
    store = simulation.store
    layers, parts = share_parts(store, held.kernel, held.heads, held.groups)
    loader = Loader(parts, reside([shape_bytes(part.shapes) for part in parts], None))
    loader.load()
    del parts
    simulation.holdings[1]._first, held.share.layers = loader, layers
    old = weakref.ref(layers[2].gate_up)
    del layers
    plan = simulation.root.mover.plan
    simulation.text(IDS, 0)
    simulation.root.mover.aim_at(Plan("any", plan.query, (plan.ffn + 1) % RANKS))
    finish_moving(simulation, IDS)
    for position in range(3):
        simulation.root.step(7, 40 + position)
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("wire", ["f32", "f16", "q8"])
def test_a_worker_without_work_tells_how_fast_it_is_and_does_not_forget_the_text(deep, wire):
    simulation = Simulation(deep, 2, STRICT, QUICK, NO_STALL, CONTEXT, keeps=True)
    worker, link = simulation.workers[1]._link, simulation.root._link
    epoch = worker._epoch
    message = Message(4, simulation.config.hidden)
    message.write(1, Kind.PROBE, wire=wire)
    worker._take(message)
    assert worker._epoch == epoch and worker.next().kind == Kind.PROBE
    link.probe_speed(1)
    simulation.settle(0.1)
    probe = link.peers[1].probe
    assert probe.took_s > 0 and link.peers[1].probed_at is None


def test_a_root_that_cannot_load_its_part_keeps_everything_where_it_is(deep, monkeypatch):
    simulation = Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, CONTEXT, keeps=True)
    before, prepare = simulation.root.mover.plan, simulation.holdings[0].prepare

    def fail(plan, changes, also):
        if changes:
            raise HaloError("memory ran out while loading weights")
        prepare(plan, changes, also)

    monkeypatch.setattr(simulation.holdings[0], "prepare", fail)
    simulation.text(IDS, 0)
    simulation.root.mover.aim_at(any_plan(simulation, 1))
    finish_moving(simulation, IDS)
    assert is_held(simulation, before) and not simulation.root.mover.may_move and "memory ran out" in simulation.notes[-1]
