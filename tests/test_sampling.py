"""How the next token is chosen."""

import numpy as np
import pytest

from halo_mpi.engine.sampling import Sampler, Sampling
from halo_mpi.errors import HaloError, UsageError

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def shares(sampling: Sampling, text=(), draws=4000, banned=()) -> np.ndarray:
    """How often each of the four tokens is drawn."""
    sampler = Sampler(sampling, banned)
    return np.bincount([sampler.pick(LOGITS, list(text)) for _ in range(draws)], minlength=4) / draws


def test_temperature_zero_takes_the_likeliest():
    assert Sampler(Sampling()).pick(LOGITS, []) == 0


def test_temperature_one_draws_by_probability():
    assert shares(Sampling(temperature=1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_temperature_flattens_and_sharpens():
    assert shares(Sampling(temperature=0.25))[0] > 0.8
    assert shares(Sampling(temperature=20.0))[3] > 0.2
    assert shares(Sampling(temperature=1e-308))[0] == 1


def test_top_k_leaves_k_tokens():
    assert shares(Sampling(temperature=1.0, top_k=2)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)


def test_top_p_leaves_the_fewest_tokens_that_reach_it():
    assert shares(Sampling(temperature=1.0, top_p=0.7)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(Sampling(temperature=1.0, top_p=0.01))[0] == 1


def test_min_p_leaves_out_what_is_unlikely_beside_the_likeliest():
    assert shares(Sampling(temperature=1.0, min_p=0.2)) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.03)


def test_the_repetition_penalty_holds_for_either_sign():
    penalized = Sampling(repetition_penalty=5.0)
    assert Sampler(penalized).pick(np.array([2.0, 1.0], np.float32), [0]) == 1
    assert Sampler(penalized).pick(np.array([-1.0, -2.0], np.float32), [0]) == 1
    assert Sampler(penalized).pick(np.array([2.0, 1.0], np.float32), []) == 0


def test_a_banned_token_is_never_chosen():
    assert shares(Sampling(temperature=1.0), banned=(0,))[0] == 0
    assert Sampler(Sampling(), banned=(0,)).pick(LOGITS, []) == 1


def test_the_seed_decides():
    draws = [[Sampler(Sampling(temperature=1.0, seed=seed)).pick(LOGITS, []) for _ in range(1)] for seed in range(30)]
    again = [[Sampler(Sampling(temperature=1.0, seed=seed)).pick(LOGITS, []) for _ in range(1)] for seed in range(30)]
    assert draws == again and len({tuple(draw) for draw in draws}) > 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    with pytest.raises(HaloError, match="not finite"):
        Sampler(Sampling()).pick(np.array([0.0, bad], np.float32), [])


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -1),
        ("repetition_penalty", 0),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_names_its_option(name, value):
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}"):
        Sampling(**{name: value})


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.9, top_p=0.8), Sampling(temperature=2.0, top_p=0.97, top_k=900),
                                      Sampling(temperature=1.3, top_k=7), Sampling(temperature=1.0, min_p=0.1, top_p=0.9)])  # fmt: skip
def test_what_is_kept_of_many_tokens_is_what_sorting_all_of_them_says(sampling):
    logits = np.random.default_rng(3).normal(size=5000).astype(np.float32).round(1) * 2  # with many equals
    order = np.argsort(-logits.astype(np.float64), kind="stable")[: sampling.top_k or None]
    probability = np.exp((logits[order].astype(np.float64) - logits.max()) / sampling.temperature)
    probability /= probability.sum()
    keep = (np.cumsum(probability) - probability < sampling.top_p) & (probability >= sampling.min_p * probability[0])
    sampler, wanted = Sampler(sampling), set(order[keep].tolist())
    drawn = [sampler.pick(logits, []) for _ in range(3000)]
    assert set(drawn) <= wanted and len(set(drawn)) > 0.8 * min(len(wanted), 500)
