"""The engine on compiled kernels: any shape, any number of ranks, weights that move, and weights that are read at every token."""

from dataclasses import replace
from shutil import copytree

import numpy as np
import pytest

from halo_mpi.engine.options import SyncOptions
from halo_mpi.errors import UsageError
from halo_mpi.model.kernels.choice import _lacking, make_kernel
from halo_mpi.model.loading import down_dtype
from halo_mpi.store.reader import ModelStore
from tests.conftest import calibrate, converted
from tests.mpi import halo, report_of, succeed
from tests.simulator import CONTEXT, IDS, NO_STALL, QUICK, RANKS, STRICT, Simulation
from tests.test_moves import any_plan, finish_moving
from tests.test_protocol import caches_are_complete
from tests.tiny_models import TINY, write_tiny_hf

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(_lacking() is not None, reason=str(_lacking()))]
ODD = replace(TINY, hidden=72, heads=6, kv_heads=2, head_dim=20, ffn=144, layers=3)  # nothing fills its tiles; the last group is half


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A model of odd shape, with biases, in a storage dtype."""
    folder = tmp_path_factory.mktemp("odd")
    write_tiny_hf(folder / "source", ODD, biases=True)

    def get(dtype: str):
        path = folder / f"{dtype}.halo"
        return path if path.exists() else converted(folder / "source", path, dtype, shards=1)

    return get


def logits(model, kernel: str, sync: SyncOptions = STRICT, prefill: int = 0) -> np.ndarray:
    return Simulation(model, RANKS, sync, QUICK, NO_STALL, CONTEXT, keeps=True, kernel=kernel).text(IDS, prefill)


@pytest.mark.parametrize("dtype, error", [("int8", 0.02), ("int4", 0.02)])
def test_logits_are_those_of_the_reference_but_for_inputs_in_8_bits(stored, dtype, error):
    wanted, found = logits(stored(dtype), "reference"), logits(stored(dtype), "llvm")
    assert np.abs(found - wanted).max() < error * np.abs(wanted).max() and not np.array_equal(found, wanted)


@pytest.mark.mpi
@pytest.mark.slow
def test_a_calibrated_model_in_int4_has_a_down_in_int8(stored, tmp_path):
    """Sorting neurons tears its 4-bit blocks apart."""
    model = tmp_path / "calibrated.halo"
    copytree(stored("int4"), model)
    calibrate(model, "--tokens", 500, "--window", 64)
    assert down_dtype(ModelStore(model)) == "int8"
    wanted, found = logits(model, "reference"), logits(model, "llvm")
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    options = ("--model", model, "--prompt", "The quick", "--max-tokens", "5", "--ignore-eos", "--wire", "f32")
    alone, streamed = (report_of(ranks, "generate", tmp_path, *options, *more) for ranks, more in ((1, ()), (2, ("--memory", "100K"))))
    assert streamed["token_ids"] == alone["token_ids"] and streamed["devices"][0]["streamed_bytes"] > 0


def test_a_prompt_gives_bit_for_bit_what_its_tokens_give_one_by_one(stored):
    """Norms and sums are added up row by row, so a verified token is the one that would have been computed alone."""
    one_by_one, at_once = logits(stored("int4"), "llvm"), logits(stored("int4"), "llvm", prefill=7)
    assert np.array_equal(at_once, one_by_one[6:])


def test_a_cache_in_f16_changes_little(stored):
    for kernel, error in (("reference", 0.003), ("llvm", 0.03)):  # a number that is rounded to the next of 255 changes others
        wanted = logits(stored("int8"), kernel)
        found = Simulation(stored("int8"), RANKS, STRICT, QUICK, NO_STALL, CONTEXT, kernel=kernel, cache="f16").text(IDS, 0)
        assert 0 < np.abs(found - wanted).max() < error * np.abs(wanted).max()


def test_work_moves_with_its_caches(stored):
    simulation = Simulation(stored("int4"), RANKS, STRICT, QUICK, NO_STALL, CONTEXT, keeps=True, kernel="llvm")
    wanted = simulation.text(IDS, 0)
    for seed in range(3):
        simulation.text(IDS[:5], 0)
        simulation.root.mover.aim_at(any_plan(simulation, seed))
        finish_moving(simulation, IDS[:5])
        simulation.settle()
        caches_are_complete(simulation, 5)
        found = simulation.text(IDS, 0)
        assert np.abs(found - wanted).max() < 0.01 * np.abs(wanted).max()  # sums in another order, rounded to 8 bits again


def test_a_model_in_f32_cannot_be_computed_by_compiled_kernels():
    with pytest.raises(UsageError, match="--kernel llvm cannot be used: the model's weights are f32"):
        make_kernel("llvm", TINY, "f32", 1)
    assert make_kernel("auto", TINY, "f32", 1).name == "reference" and make_kernel("auto", TINY, "int8", 1).name == "llvm"


@pytest.mark.mpi
def test_the_text_is_the_same_on_any_number_of_ranks(stored, tmp_path):
    options = ("--model", stored("int4"), "--prompt", "The quick", "--max-tokens", "20", "--ignore-eos", "--wire", "f32")
    texts = []
    for ranks in (1, 2, 3, 4):
        report = report_of(ranks, "generate", tmp_path, *options)
        assert report["kernel"] == "llvm"
        texts.append(report["token_ids"])
    assert texts[1:] == [texts[0]] * 3


@pytest.mark.mpi
def test_weights_that_memory_does_not_hold_are_read_at_every_token(stored, tmp_path):
    options = ("--model", stored("int8"), "--prompt", "The quick", "--max-tokens", "12", "--ignore-eos", "--wire", "f32")
    whole = report_of(2, "generate", tmp_path, *options)
    read = report_of(2, "generate", tmp_path, *options, "--memory", "100K")
    assert read["token_ids"] == whole["token_ids"] and read["devices"][0]["streamed_bytes"] > 0


@pytest.mark.mpi
def test_a_kernel_that_cannot_be_used_is_refused_in_one_line(tiny):
    finished = halo(2, "generate", "--model", tiny, "--prompt", "The", "--kernel", "llvm")
    assert finished.code == 2 and "--kernel llvm cannot be used" in finished.err and "Traceback" not in finished.err


def test_the_reference_can_be_asked_for(stored, tmp_path):
    report = report_of(1, "generate", tmp_path, "--model", stored("int4"), "--prompt", "The", "--max-tokens", "3", "--kernel", "reference")
    assert report["kernel"] == "reference"
    succeed(halo(1, "evaluate", "--model", stored("int4"), "--text", __file__, "--tokens", "64", "--context", "64"))
