"""What stands in for a late partial sum, and what it counts: running means without a calibration, low-rank estimates with one."""

import numpy as np
import pytest

from halo_mpi.engine.running_means import ATTENTION_LAST, MEMORY, RunningMeans
from halo_mpi.engine.predictor import make_predictor
from halo_mpi.engine.shares import WorkShares
from halo_mpi.model.config import ModelConfig
from halo_mpi.predict.estimate import LowRankEstimates, estimate_bytes
from halo_mpi.predict.importance import LEAST_SENSITIVITY, PredictedShares, relative_costs
from halo_mpi.schedule.placement import Plan, make_plan
from halo_mpi.store.reader import ModelStore
from halo_mpi.wire.messages import Kind

pytestmark = pytest.mark.timeout(150)  # the first test waits for the calibration
FFN, ATTENTION = ((Kind.FFN, 0, 1), 5), ((Kind.ATTENTION, 0, 1), 5)  # key and position
NOTHING = np.zeros((1, 1), np.float32)


NO_PLAN = Plan("", np.zeros((1, 1), int), np.zeros((1, 1), int))


def test_before_the_first_answer_the_estimate_is_zero():
    means = RunningMeans(3, NO_PLAN)
    means.observe(*ATTENTION, NOTHING, np.ones((1, 3), np.float32))
    assert means.estimate(*FFN, NOTHING).tolist() == [0, 0, 0]


def test_the_estimate_is_the_mean_of_what_came():
    means, y = RunningMeans(4, NO_PLAN), np.random.default_rng(0).standard_normal((MEMORY, 4), np.float32)
    for row in y[:40]:
        means.observe(*FFN, NOTHING, row[None])
    means.observe(*FFN, NOTHING, y[40:])  # a prompt's rows count one by one
    assert np.allclose(means.estimate(*FFN, NOTHING), y.mean(0), rtol=1e-4, atol=1e-4)


def test_old_answers_fade():
    means, y = RunningMeans(1, NO_PLAN), np.zeros((1, 1), np.float32)
    for _ in range(10 * MEMORY):
        means.observe(*FFN, NOTHING, y)
    for _ in range(3 * MEMORY):
        means.observe(*FFN, NOTHING, y + 1)
    assert 0.9 < means.estimate(*FFN, NOTHING)[0] < 1


def test_the_last_answer_counts_in_attention():
    means, y = RunningMeans(2, NO_PLAN), np.array([[0, 8], [0, 0], [4, 0], [4, 0]], np.float32)
    for row in y:
        means.observe(*ATTENTION, NOTHING, row[None])
    assert means.estimate(*ATTENTION, NOTHING) == pytest.approx([2 + 2 * ATTENTION_LAST, 2 - 2 * ATTENTION_LAST])


@pytest.mark.parametrize("key", [FFN, ATTENTION])
def test_an_estimate_stays_what_it_was(key):
    means, y = RunningMeans(2, NO_PLAN), np.ones((1, 2), np.float32)
    means.observe(*key, NOTHING, y)
    first = means.estimate(*key, NOTHING)
    means.observe(*key, NOTHING, 3 * y)
    y[:] = 7
    assert first.tolist() == [1, 1] and (means.estimate(*key, NOTHING) <= 3).all()


@pytest.fixture(scope="module")
def of_four(calibrated):
    """Store, config and plan of the calibrated model on four ranks."""
    store = ModelStore(calibrated)
    config = ModelConfig.from_dict(store.meta["config"])
    disks = [{table: store.entries(table) for table in ("query", "ffn")}] * 4
    yield store, config, make_plan(config, "auto", disks, store.meta["calibration"])
    store.close()


def one_by_one(store, config, plan, kind, layer, rank, x) -> np.ndarray:
    """The sum of the stored estimates of a worker's groups or heads."""
    table, owners = ("group_estimate", plan.ffn) if kind == Kind.FFN else ("head_estimate", plan.query)
    layout, y = store.layout(table), 0
    for entry in np.flatnonzero(owners[layer] == rank):
        inward, outward, bias = (layout.unpack(store.read(table, layer, entry), name) for name in ("inward", "outward", "bias"))
        y = y + (x @ inward.T) @ outward + bias[0]
    return y


@pytest.mark.parametrize("kind", [Kind.FFN, Kind.ATTENTION])
def test_a_workers_estimate_is_the_sum_of_its_groups_and_heads(of_four, kind):
    store, config, plan = of_four
    estimates = LowRankEstimates(of_four[0], of_four[2])
    x = np.random.default_rng(1).standard_normal((1, config.hidden), np.float32)
    owners = plan.ffn if kind == Kind.FFN else plan.query
    for layer in range(config.layers):
        for rank in set(owners[layer].tolist()) - {0}:
            expected = one_by_one(store, config, plan, kind, layer, rank, x[0])
            assert estimates.estimate((kind, layer, rank), 3, x) == pytest.approx(expected, rel=1e-2, abs=1e-2)
    assert estimates.nbytes == pytest.approx(estimate_bytes(store, config, plan), rel=0.01)


def test_the_last_answer_tells_of_the_estimates_error_as_long_as_it_is_new(of_four):
    store, config, plan = of_four
    estimates, key = LowRankEstimates(of_four[0], of_four[2]), (Kind.ATTENTION, 1, 3)
    x, y = np.random.default_rng(2).standard_normal((2, 1, config.hidden), np.float32)
    memory, plain = float(estimates._maps[key][3]), estimates.estimate(key, 4, x)
    assert 0 < memory < 1
    estimates.observe(key, 4, x, y)
    for age in (1, 3):
        assert estimates.estimate(key, 4 + age, x) == pytest.approx(plain + memory**age * (y[0] - plain), rel=1e-2, abs=1e-2)
    estimates.begin_text()
    assert (estimates.estimate(key, 5, x) == plain).all()


def test_nothing_is_learned_from_the_first_token_of_a_text(of_four):
    predictor = make_predictor(*of_four, 4, True)
    x, y = np.random.default_rng(2).standard_normal((2, 1, of_four[1].hidden), np.float32)
    plain = predictor.estimate((Kind.FFN, 1, 3), 1, x)
    predictor.observe((Kind.FFN, 1, 3), 0, x, y)
    assert (predictor.estimate((Kind.FFN, 1, 3), 1, x) == plain).all() and predictor.seconds > 0


def test_shares_add_up_to_the_syncs_whatever_is_predicted(of_four):
    store, config, plan = of_four
    shares = PredictedShares(*of_four, 4)
    usual = [shares.share(kind, layer, {0, 1, 2, 3}) for kind in (Kind.FFN, Kind.ATTENTION) for layer in range(config.layers)]
    assert sum(usual) == pytest.approx(2 * config.layers, rel=1e-3)
    before = shares.share(Kind.FFN, 1, {1})
    shares.look_ahead(1, 5 * np.random.default_rng(3).standard_normal((1, config.hidden), np.float32))
    assert shares.share(Kind.FFN, 1, {1}) != before
    assert shares.share(Kind.FFN, 1, {0, 1, 2, 3}) == pytest.approx(usual[1], rel=1e-3)
    shares.look_ahead(config.layers, np.zeros((1, config.hidden), np.float32))  # after the last layer there is nothing to predict


def test_the_rest_of_a_token_is_the_sum_of_its_shares(of_four):
    store, config, plan = of_four
    shares = PredictedShares(*of_four, 4)
    in_turn = [shares.share(kind, layer, {2, 3}) for layer in range(config.layers) for kind in (Kind.ATTENTION, Kind.FFN)]
    for sync in range(2 * config.layers + 1):
        assert shares.rest(sync, {2, 3}) == pytest.approx(sum(in_turn[sync:]), abs=1e-6)
    assert shares.rest(0, {0, 1, 2, 3}) == pytest.approx(2 * config.layers, rel=1e-3)


def test_inputs_like_no_other_give_shares_all_the_same(of_four):
    shares = PredictedShares(*of_four, 4)
    shares.look_ahead(1, np.full((1, of_four[1].hidden), 1e4, np.float32))
    assert np.isfinite([shares.share(kind, 1, {1, 2, 3}) for kind in (Kind.FFN, Kind.ATTENTION)]).all()


def test_a_layer_that_seemed_to_cost_nothing_counts_a_little():
    cost = relative_costs([[1.0, 3.0], [-0.5, 0.0]], 2)
    together = np.concatenate([cost[Kind.ATTENTION], cost[Kind.FFN]])
    assert together.mean() == pytest.approx(1)
    assert together.min() / together.mean() == pytest.approx(LEAST_SENSITIVITY, rel=0.1)
    assert (relative_costs(None, 3)[Kind.FFN] == 1).all()


def test_without_calibration_shares_are_of_the_work():
    config = ModelConfig("shape", 2, 64, 4, 2, 16, 96, 320, 128, 1e-5, 10000.0)
    everything = {"query": set(range(config.heads)), "ffn": set(range(config.groups))}
    shares = WorkShares(make_plan(config, "even", [everything] * 3), 3)
    assert shares.share(Kind.FFN, 0, {1, 2}) == pytest.approx(2 / 3)
    assert shares.share(Kind.ATTENTION, 1, {2}) == pytest.approx(1 / 2)
    assert shares.rest(0, {2}) == pytest.approx(4 / 2) and shares.rest(4, {2}) == 0


def test_what_matters_too_much_is_not_done_without(of_four, monkeypatch):
    shares = PredictedShares(*of_four, 4)
    part = 4 * shares.share(Kind.FFN, 1, {2})
    for price, costly in ((0.9 * part, True), (1.1 * part, False)):
        monkeypatch.setattr("halo_mpi.predict.importance.PRICE", price)
        assert shares.too_costly(Kind.FFN, 1, 2) == costly
