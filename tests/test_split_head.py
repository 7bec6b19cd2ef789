"""The head over several ranks, on a simulated wire: the same logits bit for bit, whoever computes them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halo_mpi.engine.split_head import MOST_SKIPPED, as_sent, packed, ranges, unpacked, vectors_of
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.choice import _lacking
from halo_mpi.schedule.head import even_rows, most_rows
from halo_mpi.store.reader import ModelStore
from halo_mpi.wire.messages import Message
from tests.simulator import CONTEXT, IDS, NO_STALL, QUICK, RANKS, STRICT, Simulation, generated
from tests.test_kernels_engine import stored  # noqa: F401
from tests.test_protocol import RELAXED, stalls
from tests.test_rescue import at_sync

pytestmark = pytest.mark.timeout(300)
examples = generated(3)
links = st.lists(st.lists(st.sampled_from([0.0, 1e-4, 2e-3, 0.02]), min_size=1, max_size=40), min_size=RANKS, max_size=RANKS)
F16 = replace(STRICT, wire="f16")
ROWS = 64, 64, 96  # of the workers


def some_rows(model, *workers: int) -> list[int]:
    """These of the workers, the rest for the root."""
    vocabulary = ModelConfig.from_dict(ModelStore(model).meta["config"]).vocabulary
    return [vocabulary - sum(workers), *workers]


def simulated(model, rows, sync=STRICT, delays=QUICK, stalls=NO_STALL, **options) -> Simulation:
    return Simulation(model, RANKS, sync, delays, stalls, CONTEXT, rows=rows, **options)


@pytest.fixture(scope="module")
def undisturbed(deep) -> dict[str, np.ndarray]:
    """The logits by the format on the wire."""
    return {sync.wire: simulated(deep, some_rows(deep, *ROWS), sync).text(IDS, 0) for sync in (STRICT, F16)}


@pytest.mark.parametrize("workers", [(16, 0, 0), (64, 64, 64), (0, 48, 112)])
def test_logits_do_not_depend_on_the_split(deep, expected, workers):
    simulation = simulated(deep, some_rows(deep, *workers))
    assert np.allclose(simulation.text(IDS, 3), expected[2:], rtol=0, atol=1e-5 * np.abs(expected).max())
    assert simulation.vocabulary.late == 0 and all(worker.compute_s for worker in simulation.workers.values())


@pytest.mark.skipif(_lacking() is not None, reason=str(_lacking()))
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_compiled_kernels_give_a_row_the_same_bits_in_any_split(stored, dtype):  # noqa: F811
    model = stored(dtype)
    wanted = simulated(model, None, kernel="llvm").text(IDS, 0)
    for workers in ((16, 32, 48), (96, 0, 96), (0, 0, 16)):
        simulation = simulated(model, some_rows(model, *workers), kernel="llvm")
        assert np.array_equal(simulation.text(IDS, 0), wanted) and simulation.vocabulary.late == 0


@pytest.mark.parametrize("sync", [STRICT, F16], ids=["f32", "f16"])
@examples
@given(links, stalls)
def test_logits_are_the_same_whatever_the_wire_does(deep, undisturbed, sync, delays, stalls):
    found = simulated(deep, some_rows(deep, *ROWS), sync, delays, stalls).text(IDS, 0)
    assert np.array_equal(found, undisturbed[sync.wire])


@pytest.mark.parametrize("sync", [STRICT, F16], ids=["f32", "f16"])
def test_whose_scores_do_not_come_the_root_computes_them(deep, undisturbed, sync):
    rows, wanted = some_rows(deep, *ROWS), undisturbed[sync.wire]
    simulation = simulated(deep, rows, sync)
    for rank in (1, 3):
        simulation.workers[rank]._rows.scores = lambda x: None  # not loaded yet
    assert np.array_equal(simulation.text(IDS, 0), wanted) and simulation.vocabulary.late == 0
    simulation = simulated(deep, rows, sync)
    simulation.workers[2]._score = lambda request: None
    assert np.array_equal(simulation.text(IDS, 0), wanted)
    assert 0 < simulation.vocabulary.late < len(IDS)  # after some it is asked less and less often
    assert simulation.root.crew.state(2) == "ok" and not simulation.notes


@pytest.mark.parametrize("what", ["end", "cut_off"])
@pytest.mark.parametrize("sync", [STRICT, F16], ids=["f32", "f16"])
def test_a_worker_that_goes_while_it_scores_costs_nothing_then(deep, undisturbed, sync, what):
    rows, wanted = some_rows(deep, *ROWS), undisturbed[sync.wire]
    simulation = simulated(deep, rows, replace(sync, takeover_ms=100.0), keeps=True)
    syncs = 2 * simulation.config.layers + 1
    at_sync(simulation, {3 * syncs - 1: [lambda: getattr(simulation, what)(2)]})  # when the third token's logits are asked for
    found = simulation.text(IDS, 0)
    assert np.array_equal(found[:3], wanted[:3])
    error = 1e-3 if sync.wire == "f32" else 5e-3  # others do its work: sums in another order, caches from what was kept
    assert np.abs(found - wanted).max() < error * np.abs(wanted).max()
    assert simulation.vocabulary.late == 1 and 2 not in simulation.root.mover.plan.query


def test_relaxed_counts_sums_that_come_while_scores_are_waited_for(deep):
    slow = [[1e-4], [1e-4], [2e-3], [1e-4]]
    simulation = simulated(deep, some_rows(deep, *ROWS), replace(RELAXED, deadline_ms=0.5), slow)
    assert np.isfinite(simulation.text(IDS, 0)).all()
    ledger = simulation.root.ledger
    assert ledger.partial_sums == ledger.asked and ledger.deferred


def test_with_nothing_late_relaxed_equals_strict(deep, undisturbed):
    relaxed = simulated(deep, some_rows(deep, *ROWS), replace(RELAXED, deadline_ms=50.0)).text(IDS, 0)
    assert np.array_equal(relaxed, undisturbed["f32"])


@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 40), st.sampled_from(["f32", "f16"]), st.integers(0, 9))
def test_scores_arrive_as_they_are_computed_in_somebodys_place(tokens, rows, width, wire, seed):
    scores = np.random.default_rng(seed).normal(0, 10, (tokens, rows)).astype(np.float32)
    vectors = packed(scores, width, wire)
    assert len(vectors) == vectors_of(rows, tokens, width, wire)
    message = Message(len(vectors), width)
    message.write(1, 1, x=vectors[:255], wire=wire)
    if len(vectors) <= 255:
        arrived = unpacked(message.read(), tokens, rows, wire)
        assert np.array_equal(arrived, as_sent(scores, wire))
    error = np.abs(as_sent(scores, wire) - scores)
    below = scores.max(1, keepdims=True) - scores
    assert (error <= below * 2.0**-11 + 1e-5).all(), "what is likely is nearly exact"


def test_rows_are_whole_tiles_in_the_order_of_the_ranks():
    assert even_rows(49152, 4, most_rows(576)) == [12288] * 4
    assert even_rows(1000, 3, 4096) == [360, 320, 320]
    assert even_rows(20, 4, 4096) == [20, 0, 0, 0]
    assert even_rows(1000, 2, most_rows(6)) == [632, 368]
    assert ranges([360, 320, 0, 320]) == [(0, 360), (360, 680), (680, 680), (680, 1000)]


def test_who_is_late_again_and_again_is_asked_less_and_less_often(deep):
    simulation = simulated(deep, some_rows(deep, *ROWS))
    part = simulation.vocabulary._parts[1]
    left = []
    for _ in range(9):
        part.missed()
        left.append(part.skipped)
    assert left[:4] == [0, 1, 3, 7] and left[-1] == MOST_SKIPPED
