"""The simulation of lost partial sums in bench/losses.py, against the engine and against what must hold."""

import numpy as np
import pytest
import torch

from bench.estimates import alone, ways_of, workers_of
from bench.losses import Simulation, Way, stored_layer
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.llama import Share, rms_norm
from halo_mpi.model.whole import load_layer, load_trunk
from halo_mpi.predict.judge import rank_correlation, recall_of_least
from halo_mpi.store.reader import ModelStore
from halo_mpi.wire.messages import Kind

pytestmark = pytest.mark.timeout(150)  # the first test waits for the calibration


@pytest.fixture(scope="module")
def opened(calibrated):
    torch.set_grad_enabled(False)
    store = ModelStore(calibrated)
    yield store, ModelConfig.from_dict(store.meta["config"])
    store.close()


def losses(opened, ways: list[Way], windows: np.ndarray) -> tuple[np.ndarray, Simulation]:
    store, config = opened
    simulation = Simulation(config, load_trunk(store, config), windows, ways)
    return simulation.run(lambda layer: stored_layer(store, config, layer, windows.shape[1]), lambda steps: steps), simulation


@pytest.fixture
def windows(opened) -> np.ndarray:
    return np.random.default_rng(0).integers(0, opened[1].vocabulary, (3, 40)).astype(np.int32)


def test_without_losses_it_is_the_model(opened, windows):
    store, config = opened
    everything = (list(range(config.heads)), list(range(config.groups)))
    layers = [load_layer(store, config, layer, *everything) for layer in range(config.layers)]
    share, trunk = Share(config, layers, 40), load_trunk(store, config)
    x = trunk.embedding[torch.from_numpy(windows[0]).long()]
    for layer in range(config.layers):
        x = x + share.attention(layer, rms_norm(x, trunk.attention_norms[layer], config.norm_eps), 0)
        x = x + share.ffn(layer, rms_norm(x, trunk.ffn_norms[layer], config.norm_eps))
    logits = rms_norm(x, trunk.final_norm, config.norm_eps) @ trunk.head.T
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(windows[0, 1:]).long(), reduction="none")
    found, simulation = losses(opened, [Way("exact", "zero", 0.0, {})], windows)
    assert found[0, :39] == pytest.approx(expected.numpy(), abs=1e-4)
    assert all(np.shape(by_window) == (3, config.layers, 2) for by_window in simulation.judged.values())


def test_importance_is_judged_by_what_each_group_really_says(opened, windows):
    store, config = opened
    _, simulation = losses(opened, [Way("exact", "zero", 0.0, {})], windows)
    layer, trunk = stored_layer(store, config, 0, 40), load_trunk(store, config)
    x = trunk.embedding[torch.from_numpy(windows[1]).long()]
    first = rms_norm(x, trunk.attention_norms[0], config.norm_eps)
    inner = layer.share.activations(0, rms_norm(x + layer.share.attention(0, first, 0), trunk.ffn_norms[0], config.norm_eps))
    down = layer.share.layers[0].down
    groups = [config.group_neurons(group) for group in range(config.groups)]
    actual = torch.stack([(inner[:, own] @ down[:, own].T).norm(dim=-1) for own in (slice(g.start, g.stop) for g in groups)], 1)[1:]
    predicted = (first @ layer.weight.T + layer.bias)[1:, : config.groups]
    expected = rank_correlation(predicted, actual), recall_of_least(predicted, actual)
    assert simulation.judged[Kind.FFN][1][0] == pytest.approx(expected)


def test_the_same_is_lost_in_every_way(opened, windows):
    groups = alone(opened[1], Kind.FFN)
    found, simulation = losses(opened, [Way(filled, filled, 0.2, groups) for filled in ("zero", "mean", "estimate")], windows)
    assert simulation.lost[0] == simulation.lost[1] == simulation.lost[2]
    assert 0.15 < simulation.lost[0][0] / simulation.lost[0][1] < 0.25
    assert len({row.tobytes() for row in found}) == 3


@pytest.mark.parametrize("chosen", ["any", "static", "predicted"])
def test_so_much_is_skipped_as_was_asked(opened, windows, chosen):
    groups = alone(opened[1], Kind.FFN)
    _, simulation = losses(opened, [Way(chosen, "zero", 0.15, groups, chosen)], windows)
    assert simulation.lost[0][0] / simulation.lost[0][1] == pytest.approx(0.15, abs=0.03)


def test_workers_lose_what_is_theirs(opened):
    store, config = opened
    units = workers_of(config, "auto", 3, store.meta["calibration"])
    for layer in range(1, config.layers - 1):
        for kind, count in ((Kind.ATTENTION, config.heads), (Kind.FFN, config.groups)):
            lost = [part for unit in units[kind, layer] for part in unit]
            assert len(lost) == len(set(lost)) < count
    assert (Kind.FFN, 0) not in units and (Kind.FFN, config.layers - 1) not in units
    assert len({way.name for way in ways_of(config, store.meta["calibration"])}) == len(
        ways_of(config, store.meta["calibration"])
    )
