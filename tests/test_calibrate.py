"""`calibrate` as its users run it: on one rank and several, stopped and resumed, and the model that it leaves."""

import itertools
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from halo_mpi.model.config import ModelConfig
from halo_mpi.predict.rewrite import sorted_groups, sorted_layout
from halo_mpi.predict.sorting import neurons
from halo_mpi.store.reader import ModelStore
from tests.conftest import calibrate, converted
from tests.mpi import finish, halo, report_of, run, start_command
from tests.tiny_models import TINY, write_tiny_hf

mpi = pytest.mark.mpi
OPTIONS = ("--tokens", 4000, "--window", 64, "--sensitivity-tokens", 128)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """What `calibrated` was before."""
    folder = tmp_path_factory.mktemp("plain")
    write_tiny_hf(folder / "source", replace(TINY, layers=5))
    return converted(folder / "source", folder / "plain.halo", "f32", shards=2)


def units_of(store: ModelStore, records: list[np.ndarray], layout, unit: int) -> tuple[set[bytes], set[bytes]]:
    """A layer's units of neurons, whatever their order: the bytes of their gate and up, and of their down."""
    rows, columns = set(), set()
    for record in records:
        gate, up, down = (layout.unpack(record, name) for name in ("gate", "up", "down"))
        for start in range(0, len(gate), unit):
            own = slice(start, start + unit)
            rows.add(gate[own].tobytes() + up[own].tobytes())
            columns.add(down[:, own].tobytes())
    return rows, columns


def joined(records: list[np.ndarray], layout, count: int) -> dict[str, np.ndarray]:
    """A layer's gate and up, neurons first, and down, neurons first too."""
    parts = {name: [layout.unpack(record, name) for record in records] for name in ("gate", "up", "down")}
    return {name: np.concatenate([p.T if name == "down" else p for p in each])[:count] for name, each in parts.items()}


def stored_units(store: ModelStore, layer: int, unit: int = 1) -> tuple[set[bytes], set[bytes]]:
    groups = ModelConfig.from_dict(store.meta["config"]).groups
    return units_of(store, [store.read("ffn", layer, group) for group in range(groups)], store.layout("ffn"), unit)


@mpi
def test_the_weights_change_places_and_nothing_else(plain, calibrated):
    before, after = ModelStore(plain), ModelStore(calibrated)
    assert after.meta["model_id"] == before.digest and after.digest != before.digest
    for layer in range(5):
        assert stored_units(before, layer) == stored_units(after, layer)
        for name in ("query", "kv"):
            for entry in before.entries(name):
                assert (before.read(name, layer, entry) == after.read(name, layer, entry)).all()
    before.close(), after.close()


@pytest.mark.parametrize("dtype", ["int4", "int8", "f16"])
def test_sorted_blocks_stay_as_they_are_whatever_the_storage(tmp_path, dtype):
    write_tiny_hf(tmp_path / "source", TINY)
    store = ModelStore(converted(tmp_path / "source", tmp_path / "tiny.halo", dtype))
    config = ModelConfig.from_dict(store.meta["config"])
    order = np.array([2, 0, 1])
    before = joined([store.read("ffn", 1, group) for group in range(config.groups)], store.layout("ffn"), config.ffn)
    after = joined(sorted_groups(store, config, 1, order, 32), store.layout("ffn"), config.ffn)
    for name, matrix in before.items():
        assert (after[name] == matrix[neurons(order, 32, config.ffn)]).all()
    store.close()


@pytest.mark.parametrize("dtype, stored, error", [("int4", "int8", 0.01), ("int8", "int8", 0.02), ("f16", "f16", 0)])
def test_where_single_neurons_are_sorted_only_down_is_rounded(tmp_path, dtype, stored, error):
    write_tiny_hf(tmp_path / "source", TINY)
    store = ModelStore(converted(tmp_path / "source", tmp_path / "tiny.halo", dtype))
    config, layout = ModelConfig.from_dict(store.meta["config"]), store.layout("ffn")
    order = np.random.default_rng(0).permutation(config.ffn)
    target = sorted_layout(layout, 1)
    assert target.parts["down"].dtype == stored and target.parts["gate"].dtype == dtype
    records = sorted_groups(store, config, 0, order, 1)
    before = joined([store.read("ffn", 0, group) for group in range(config.groups)], layout, config.ffn)
    after = joined(records, target, config.ffn)
    for name in ("gate", "up"):
        assert (after[name] == before[name][order]).all()
    assert np.abs(after["down"] - before["down"][order]).max() <= error * np.abs(before["down"]).max()
    store.close()


@mpi
@pytest.mark.parametrize("ranks", [pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2, 3, 4)])
def test_the_calibrated_model_says_the_same(plain, calibrated, tmp_path, ranks):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 3)
    shared = ("--text", text, "--context", 32, "--wire", "f32")
    one = report_of(1, "evaluate", tmp_path, "--model", plain, *shared)
    other = report_of(ranks, "evaluate", tmp_path, "--model", calibrated, *shared)
    assert other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)
    assert other["placement"] == ("even" if ranks == 1 else "importance")


@mpi
@pytest.mark.slow
@pytest.mark.parametrize("options", [("int4", "--sort", "blocks"), ("f32", "--sort", "neurons")])
def test_biases_and_a_last_group_that_is_short_are_calibrated_too(tmp_path, options):
    """FFN 100: three groups of 32 and one of 4. Hidden 48: blocks of 32 columns are filled up."""
    dtype, *sort = options
    write_tiny_hf(tmp_path / "source", replace(TINY, hidden=48, ffn=100), biases=True)
    model = converted(tmp_path / "source", tmp_path / "model.halo", dtype)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 3)
    shared = ("--model", model, "--text", text, "--context", 32, "--wire", "f32")
    before = report_of(1, "evaluate", tmp_path, *shared)
    calibrate(model, *OPTIONS, *sort)
    after = report_of(3, "evaluate", tmp_path, *shared)
    assert after["perplexity"] == pytest.approx(before["perplexity"], rel=1e-4) and after["placement"] == "importance"
    late = report_of(3, "evaluate", tmp_path, *shared, "--sync", "relaxed", "--check", "--deadline-ms", 0, "--quality", 1)
    assert np.isfinite(late["perplexity"])


@mpi
def test_late_answers_are_estimated_and_all_is_accounted_for(calibrated, tmp_path):
    shared = ("--model", calibrated, "--prompt", "the dog", "--max-tokens", 20, "--ignore-eos", "--check")
    report = report_of(3, "generate", tmp_path, *shared, "--sync", "relaxed", "--deadline-ms", 0, "--quality", 1)
    ledger = report["ledger"]
    assert sum(ledger["deferred"].values()) > 0
    assert (
        ledger["partial_sums"] == ledger["on_time"] + sum(ledger["deferred"].values()) + ledger["substituted"] + ledger["waited"]
    )
    assert 0 < ledger["inexact_importance"] <= 1
    assert report["predictor"]["calibrated"] and report["predictor"]["ms_per_token"] > 0
    without = report_of(
        3, "generate", tmp_path, *shared, "--sync", "relaxed", "--deadline-ms", 0, "--quality", 1, "--no-calibration"
    )
    assert not without["predictor"]["calibrated"] and without["ledger"]["deferred"]


@mpi
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_ranks_find_what_one_finds(plain, tmp_path, ranks):
    found = []
    for count in (1, ranks):
        model = tmp_path / f"{count}.halo"
        shutil.copytree(plain, model)
        calibrate(model, *OPTIONS, ranks=count)
        store = ModelStore(model)
        found.append(store.meta["calibration"])
        store.close()
    one, several = found
    assert one["text_digest"] == several["text_digest"] and one["tokens"] == several["tokens"]
    for kind, name in itertools.product(("groups", "heads"), ("importance", "recovered", "correlation")):
        assert np.allclose(
            np.concatenate(np.atleast_2d(one[kind][name])), np.concatenate(np.atleast_2d(several[kind][name])), atol=0.02
        )
    assert np.allclose(one["sensitivity"], several["sensitivity"], atol=1e-4) and np.shape(one["sensitivity"]) == (5, 2)


@mpi
def test_inspect_shows_what_was_found(calibrated, tmp_path):
    command = [sys.executable, "-m", "halo_mpi.inspect", calibrated, "--verify", "--plot", tmp_path / "importance.png"]
    done = finish(start_command(command), 60)
    assert done.code == 0 and "rank correlation" in " ".join(done.out.split()) and "estimates of rank 16" in done.out
    assert (tmp_path / "importance.png").stat().st_size > 10_000


@mpi
def test_what_is_not_calibrated_cannot_be_plotted(plain, tmp_path):
    done = halo(1, "inspect", plain, "--plot", tmp_path / "importance.png")
    assert done.code == 2 and "is not calibrated" in done.complaints[0]


@mpi
def test_a_missing_shard_is_named(plain, tmp_path):
    model = tmp_path / "part.halo"
    shutil.copytree(plain, model)
    (model / "shard-01.h5").unlink()
    done = halo(1, "calibrate", model, *map(str, OPTIONS))
    assert done.code == 2 and "lacks shard-01.h5" in done.complaints[0]


@mpi
def test_other_versions_on_other_ranks_are_told(plain, calibrated, tmp_path):
    """Two hosts by the working directory: each rank finds its own version under the same name."""
    for rank, version in enumerate((calibrated, plain)):
        shutil.copytree(version, tmp_path / f"host{rank}" / "model.halo")
    script = tmp_path / "start.py"
    script.write_text(
        "import os, runpy, sys\n"
        "rank = os.environ.get('OMPI_COMM_WORLD_RANK') or os.environ['PMI_RANK']\n"
        f"os.chdir({str(tmp_path)!r} + '/host' + rank)\n"
        "sys.argv = ['generate', '--model', 'model.halo', '--prompt', 'the']\n"
        "runpy.run_module('halo_mpi.generate', run_name='__main__')\n"
    )
    done = run(2, script)
    assert done.code == 2 and len(done.complaints) == 1
    assert "(calibrated" in done.complaints[0] and "(not calibrated" in done.complaints[0]
