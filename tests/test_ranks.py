"""The same logits on any number of ranks, and the same as transformers', for every variant of the architecture."""

import json
from dataclasses import replace

import numpy as np
import pytest

from halo_mpi.model.config import ModelConfig, llama3_rope_factors
from tests.conftest import converted
from tests.mpi import run, succeed
from tests.tiny_models import TINY, write_tiny_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.mpi

ODD = ModelConfig("odd", 3, 56, 7, 7, 8, 129, 320, 256, 1e-5, 10000.0)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
VARIANTS = {
    "multi-head": {"config": replace(TINY, kv_heads=4)},
    "grouped-query": {"config": TINY},
    "one KV head": {"config": replace(TINY, kv_heads=1, heads=8)},
    "tied": {"config": replace(TINY, tied=True)},
    "biases": {"config": TINY, "biases": True},
    "llama3 rope": {"config": TINY, "fields": {"rope_scaling": None, "rope_theta": None, "rope_parameters": LLAMA3}},
    "linear rope": {"config": replace(TINY, rope_factors=(2.0,) * 8)},
    "7 heads, FFN of 129": {"config": ODD},
    "7 heads, FFN of 129, biases": {"config": replace(ODD, tied=True), "biases": True},
}
IDS = [int(token) for token in np.random.default_rng(3).integers(3, 300, 100)]  # more than one prefill chunk


@pytest.fixture(scope="module")
def variants(tmp_path_factory) -> dict:
    """Per variant: the converted model and the logits of transformers, f32 [T, V]."""
    folder, result = tmp_path_factory.mktemp("variants"), {}
    for number, (name, options) in enumerate(VARIANTS.items()):
        source = folder / f"source-{number}"
        write_tiny_hf(source, seed=number, **options)
        reference = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = reference(torch.tensor([IDS])).logits[0].numpy()
        result[name] = converted(source, folder / f"{number}.halo", "f32", shards=number % 4 + 1), logits
    return result


@pytest.mark.parametrize("ranks", [1, 2, 3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (4, 5, 8))])
def test_logits_are_those_of_transformers_on_any_number_of_ranks(variants, ranks, tmp_path):
    jobs = [
        {"model": str(model), "ids": IDS, "out": str(tmp_path / f"{number}.npz")}
        for number, (model, _) in enumerate(variants.values())
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    succeed(run(ranks, "-m", "tests.programs.logits", tmp_path / "jobs.json"))
    for job, (name, (_, expected)) in zip(jobs, variants.items()):
        results = np.load(job["out"])
        assert np.abs(results["steps"] - expected).max() < 1e-3, name
        assert np.abs(results["prefill"] - expected[-1]).max() < 1e-3, name


def test_llama3_scaling_is_in_effect(variants):
    """Guards the variant above: without the scaling its logits would be others."""
    factors = llama3_rope_factors(TINY.head_dim, 1e4, 8.0, 1.0, 4.0, 64)
    assert max(factors) == pytest.approx(8) and min(factors) == 1
    assert np.abs(variants["llama3 rope"][1] - variants["grouped-query"][1]).max() > 0.1


@pytest.mark.parametrize("placement", [{"heads": [1, 0, 3], "groups": [0, 3, 0]}, pytest.param("root-attention", marks=pytest.mark.slow)])
def test_uneven_shares_give_the_same_logits(variants, placement, tmp_path):
    model, expected = variants["grouped-query"]
    if isinstance(placement, dict):
        path = tmp_path / "placement.json"
        path.write_text(json.dumps(placement))
        placement = str(path)
    (tmp_path / "jobs.json").write_text(json.dumps([{"model": str(model), "ids": IDS, "out": str(tmp_path / "out.npz")}]))
    succeed(run(3, "-m", "tests.programs.logits", tmp_path / "jobs.json", "--placement", placement))
    assert np.abs(np.load(tmp_path / "out.npz")["steps"] - expected).max() < 1e-3


@pytest.mark.parametrize("wire, tolerance", [pytest.param("f16", 0.05, marks=pytest.mark.slow), ("q8", 0.5)])
def test_short_numbers_on_the_wire_stay_close(variants, wire, tolerance, tmp_path):
    model, expected = variants["grouped-query"]
    (tmp_path / "jobs.json").write_text(json.dumps([{"model": str(model), "ids": IDS, "out": str(tmp_path / "out.npz")}]))
    succeed(run(3, "-m", "tests.programs.logits", tmp_path / "jobs.json", "--wire", wire))
    difference = np.abs(np.load(tmp_path / "out.npz")["steps"] - expected).max()
    assert 0 < difference < tolerance  # not 0: the messages really are shorter
