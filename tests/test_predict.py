"""Calibration's parts, each alone: moments and fits, sorting, judging, text, and what is kept of a stopped run."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from halo_mpi.errors import InputError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.llama import Share
from halo_mpi.model.whole import load_layer, load_trunk
from halo_mpi.model.tokenizer import Tokenizer, TokenizerFiles
from halo_mpi.predict.judge import rank_correlation, recall_of_least
from halo_mpi.predict.layer import grams_of, norms
from halo_mpi.predict.moments import Moments, apply
from halo_mpi.predict.progress_files import ProgressFiles
from halo_mpi.predict.sorting import neurons, order_of, put_in_order
from halo_mpi.predict.texts import SHIPPED, windows
from halo_mpi.predict.walk import Walk, spread
from halo_mpi.store.reader import ModelStore

pytestmark = pytest.mark.timeout(60)
torch.set_grad_enabled(False)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_an_affine_map_is_found_from_moments():
    x, map_ = drawn(500, 8), drawn(8, 5, seed=1)
    moments = Moments(8, 5)
    for part in x.split(100):
        moments.add(part, part @ map_ + 3, torch.linspace(0.1, 1, 100))
    fit = moments.solve(0.0)
    assert torch.allclose(fit.coefficients, map_, atol=1e-4)
    assert torch.allclose(fit.predict(x), x @ map_ + 3, atol=1e-3)


def test_tokens_of_no_weight_do_not_count():
    x, y = drawn(200, 4), drawn(200, 3, seed=1)
    both, first = Moments(4, 3), Moments(4, 3)
    both.add(x, y, torch.cat((torch.ones(100), torch.zeros(100))))
    first.add(x[:100], y[:100])
    assert torch.allclose(both.solve(0.1).coefficients, first.solve(0.1).coefficients, atol=1e-5)


def test_nothing_cannot_be_fitted():
    with pytest.raises(ValueError, match="no tokens"):
        Moments(2, 2).solve(0.1)


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 6), width=st.integers(1, 9), seed=st.integers(0, 100))
def test_a_low_rank_map_is_the_best_of_its_rank(rank, width, seed):
    """Against the definition: the truncated singular value decomposition of the whole map, inputs whitened."""
    x, z, out = (
        drawn(300, 7, seed=seed) @ drawn(7, 7, seed=seed + 1),
        drawn(300, 12, seed=seed + 2),
        drawn(7, width, seed=seed + 3),
    )
    z[:, :7] += x
    moments = Moments(7, 12)
    moments.add(x, z)
    fit, part = moments.solve(0.01), slice(0, width)
    found = fit.low_rank(part, out, rank)
    assert found.inward.shape == found.outward.shape == (rank, 7)
    whole = fit.coefficients[:, part] @ out.T
    root = fit.factor.T
    u, s, v = torch.linalg.svd(root @ whole)
    best = torch.linalg.solve(root, u[:, :rank] * s[:rank] @ v[:rank])
    assert torch.allclose(root @ torch.from_numpy(found.inward.T @ found.outward), root @ best, atol=1e-3 * float(s[0]))
    if rank >= width:
        assert torch.allclose(apply(found, x), fit.predict(x)[:, part] @ out.T, atol=1e-2 * float(s[0]))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 100), unit=st.integers(1, 40), seed=st.integers(0, 100))
def test_units_stay_together_and_none_is_lost(count, unit, seed):
    importance = np.random.default_rng(seed).random(count)
    order = order_of(importance, unit)
    chosen = neurons(order, unit, count)
    assert sorted(chosen) == list(range(count))
    whole = count // unit
    sums = importance[chosen][: whole * unit].reshape(whole, unit).sum(1)
    assert (np.diff(sums) <= 1e-12).all()
    assert list(order[whole:]) == list(range(whole, len(order)))  # a shorter last unit stays last


def test_ranks_and_recall():
    actual = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1]])
    assert rank_correlation(actual, actual) == pytest.approx(1) and rank_correlation(-actual, actual) == pytest.approx(-1)
    assert recall_of_least(actual, actual) == 1 and recall_of_least(-actual, actual) == 0
    half = actual.clone()
    half[:, 0], half[:, 7] = actual[:, 7], actual[:, 0]
    assert recall_of_least(half, actual) == pytest.approx(0.5)


def test_norms_are_of_the_parts_outputs():
    inner, out, parts = drawn(20, 10), drawn(6, 10, seed=1), [slice(0, 4), slice(4, 10)]
    expected = torch.stack([(inner[:, part] @ out[:, part].T).norm(dim=-1) for part in parts], 1)
    assert torch.allclose(norms(inner, grams_of(out, parts), parts), expected, rtol=1e-4)


@pytest.mark.parametrize("count, ranks", [(2, 1), (2, 3), (9, 2), (40, 3), (200, 4)])
def test_every_window_is_somebodys_and_the_root_judges(count, ranks):
    ids = np.arange(count * 3).reshape(count, 3)
    parts = [spread(ids, rank, ranks) for rank in range(ranks)]
    together = np.concatenate([own for own, _ in parts])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, ids.tolist()))
    assert parts[0][1].held_out >= 1 and all(part.held_out == 0 for _, part in parts[1:])
    ordering = sorted(tuple(own[place]) for own, part in parts for place in part.for_order)
    alone = spread(ids, 0, 1)
    assert ordering == sorted(tuple(alone[0][place]) for place in alone[1].for_order) and ordering


@pytest.fixture
def opened(deep):
    store = ModelStore(deep)
    yield store, ModelConfig.from_dict(store.meta["config"])
    store.close()


def test_the_text_that_is_shipped_is_cut_evenly(opened):
    tokenizer = Tokenizer(TokenizerFiles.from_dict(opened[0].meta["tokenizer"]))
    texts = {path.name: path.read_text() for path in SHIPPED}
    ids = windows(texts, tokenizer, 6400, 64)
    assert ids.dtype == np.int32 and ids.shape == (100, 64)
    of_code = windows({"code.txt": texts["code.txt"]}, tokenizer, 10**9, 64)
    size = {name: len(tokenizer.encode(text, special=False)) for name, text in texts.items()}
    found = sum(row.tobytes() in {own.tobytes() for own in of_code} for row in ids)
    assert found == pytest.approx(100 * size["code.txt"] / sum(size.values()), abs=6)
    assert sum(path.stat().st_size for path in SHIPPED) < 2**20


def test_too_little_text_is_refused(opened):
    tokenizer = Tokenizer(TokenizerFiles.from_dict(opened[0].meta["tokenizer"]))
    with pytest.raises(InputError, match="short.txt, other.txt.*too little"):
        windows({"short.txt": "the dog", "other.txt": "the"}, tokenizer, 1000, 64)


def test_few_windows_of_many_texts_are_two_at_least(opened):
    tokenizer = Tokenizer(TokenizerFiles.from_dict(opened[0].meta["tokenizer"]))
    texts = {f"{number}.txt": "the quick brown fox " * 40 for number in range(5)}
    for tokens in (2, 64, 128, 200):
        assert len(windows(texts, tokenizer, tokens, 64)) == max(2, tokens // 64)


def test_a_sorted_layer_computes_the_same(opened):
    store, config = opened
    share = Share(config, [load_layer(store, config, 1, list(range(config.heads)), list(range(config.groups)))], 16)
    x = drawn(5, config.hidden)
    before = share.ffn(0, x)
    put_in_order(share.layers[0], np.array([2, 0, 1]), 32)
    assert torch.allclose(share.ffn(0, x), before, atol=1e-5)


def walked(store, config, files: ProgressFiles, layers: int) -> list:
    """Calibrate as many layers as there are to do, at most so many, on random tokens; the fits there are."""
    ids = np.random.default_rng(0).integers(0, config.vocabulary, (12, 32)).astype(np.int32)
    walk = Walk(MPI.COMM_SELF, store, config, load_trunk(store, config), ids)
    done = 0
    for done in walk.fit(files, 16, 32):
        if done + 1 == layers:
            break
    return [files.load_fit(layer) for layer in range(done + 1)]


def test_a_stopped_calibration_goes_on_where_it_was(opened, tmp_path):
    store, config = opened
    at_once, in_parts = (ProgressFiles(tmp_path / name / "model", "settings", 0) for name in ("once", "parts"))
    for files in (at_once, in_parts):
        files.begin()
    expected = walked(store, config, at_once, config.layers)
    assert len(walked(store, config, in_parts, 2)) == 2
    in_parts.begin()
    assert in_parts.layers_done(MPI.COMM_SELF) == 2
    found = walked(store, config, in_parts, config.layers)
    probe = drawn(10, config.hidden)
    for one, other in zip(expected, found, strict=True):
        assert np.allclose(one.weight, other.weight, atol=1e-4) and (one.order == other.order).all()
        assert torch.allclose(apply(one.groups[0], probe), apply(other.groups[0], probe), atol=1e-3)


def test_what_belongs_to_other_settings_is_thrown_away(opened, tmp_path):
    store, config = opened
    files = ProgressFiles(tmp_path / "model", "one text", 0)
    files.begin()
    walked(store, config, files, 2)
    other = ProgressFiles(tmp_path / "model", "another text", 0)
    other.begin()
    assert other.layers_done(MPI.COMM_SELF) == 0


@pytest.mark.parametrize("name, left", [("walkers-00-0.npz", 1), ("layer-000.npz", 0), ("layer-001.npz", 0)])
def test_a_damaged_file_of_a_stopped_run_is_not_gone_on_from(opened, tmp_path, name, left):
    store, config = opened
    files = ProgressFiles(tmp_path / "model", "settings", 0)
    files.begin()
    walked(store, config, files, 2)
    assert files.layers_done(MPI.COMM_SELF) == 2
    damaged = files.folder / name
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert files.layers_done(MPI.COMM_SELF) == left
