"""The kernel torch: products, whole models, and what is chosen where nothing can be compiled."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halo_mpi.errors import UsageError
from halo_mpi.model.kernels import cache, choice, trial
from halo_mpi.model.kernels.choice import make_kernel
from halo_mpi.model.layer_weights import LayerWeights
from halo_mpi.model.loading import ffn_part
from halo_mpi.model.sizes import Shape, shape_bytes
from halo_mpi.sources.expected import expected_shapes
from halo_mpi.store.layout import Part, RecordLayout
from halo_mpi.store.reader import ModelStore
from tests.conftest import converted
from tests.mpi import EVEN, report_of, run, succeed
from tests.simulator import CONTEXT, IDS, NO_STALL, QUICK, RANKS, STRICT, Simulation
from tests.test_moves import any_plan, finish_moving
from tests.tiny_models import TINY, write_tiny_hf

PACKABLE = replace(TINY, hidden=96, heads=3, kv_heads=1, head_dim=32, ffn=144)  # the last group is half; 16, 32 and 48 rows are left over
ODD = replace(TINY, hidden=72, heads=6, kv_heads=2, head_dim=20, ffn=144)  # nothing fills whole blocks
ROUNDING = 2.0**-8  # of bf16


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A model, with biases, in a storage dtype."""
    folder = tmp_path_factory.mktemp("torch")

    def get(config, dtype: str):
        source, path = folder / f"{config.hidden}", folder / f"{config.hidden}-{dtype}.halo"
        if not source.exists():
            write_tiny_hf(source, config, biases=True)
        return path if path.exists() else converted(source, path, dtype, shards=1)

    return get


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["int4", "int8", "f16", "bf16", "f32"]), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4),
    st.integers(0, 8), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_products_are_those_of_the_stored_weights_but_for_bf16(dtype, tiles, blocks, tokens, skipped, seed):
    random, rows, columns = np.random.default_rng(seed), 16 * tiles, 32 * blocks
    layout = RecordLayout([Part("w", rows, columns, dtype)])
    record = layout.pack({"w": random.standard_normal((rows, columns), np.float32)})
    weights = layout.unpack(record, "w")
    matrix = make_kernel("torch", PACKABLE, dtype, 1).make(Shape((rows, columns), "int4" if dtype == "int4" else "bf16"))
    cut = 16 * (tiles // 2)  # written in two parts, the second one first
    matrix.write(slice(cut, rows), slice(0, columns), layout, record, "w", cut)
    if cut:
        matrix.write(slice(0, cut), slice(0, columns), layout, record, "w")
    x, first = random.standard_normal((tokens, columns), np.float32), 16 * min(skipped, tiles - 1)
    with torch.inference_mode():
        found = matrix.product(torch.from_numpy(x), first).numpy()
    wanted, size = x @ weights[first:].T, np.abs(x) @ np.abs(weights[first:]).T
    assert found.shape == wanted.shape and (np.abs(found - wanted) <= 3 * ROUNDING * size + 1e-6).all()


def logits(model, kernel: str, prefill: int = 0) -> np.ndarray:
    return Simulation(model, RANKS, STRICT, QUICK, NO_STALL, CONTEXT, keeps=True, kernel=kernel).text(IDS, prefill)


@pytest.mark.parametrize("config", [PACKABLE, ODD], ids=["packable", "odd"])
@pytest.mark.parametrize("dtype", ["int4", "int8", "bf16"])
def test_logits_are_those_of_the_reference_but_for_bf16(stored, config, dtype):
    model = stored(config, dtype)
    wanted = logits(model, "reference")
    for prefill in (0, 7):
        found = logits(model, "torch", prefill)
        assert 0 < np.abs(found - wanted[-len(found):]).max() < 0.03 * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_work_moves_with_its_caches(stored, dtype):
    simulation = Simulation(stored(PACKABLE, dtype), RANKS, STRICT, QUICK, NO_STALL, CONTEXT, keeps=True, kernel="torch")
    wanted = simulation.text(IDS, 0)
    for seed in range(2):
        simulation.text(IDS[:5], 0)
        simulation.root.mover.aim_at(any_plan(simulation, seed))
        finish_moving(simulation, IDS[:5])
        simulation.settle()
        assert np.abs(simulation.text(IDS, 0) - wanted).max() < 0.03 * np.abs(wanted).max()


@pytest.mark.parametrize("dtype, share", [("int4", 0.16), ("int8", 0.5), ("bf16", 0.5)])
def test_matrices_take_what_sizes_tell(dtype, share):
    kernel, reference = (make_kernel(name, PACKABLE, dtype, 1) for name in ("torch", "reference"))
    shapes = kernel.sizes.attention([0, 1, 2]) | kernel.sizes.ffn([0])
    assert all(kernel.make(shape).nbytes == shape.nbytes for shape in shapes.values())
    assert shape_bytes(shapes) <= share * shape_bytes(reference.sizes.attention([0, 1, 2]) | reference.sizes.ffn([0]))


def test_where_nothing_can_be_compiled_the_quicker_one_is_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_lacking", lambda: "llvmlite is not installed here")
    for first, second, expected in ((1.0, 2.0, "torch"), (2.0, 1.0, "reference")):
        config = replace(PACKABLE, name=expected)
        times = iter((first, second))
        monkeypatch.setattr(trial, "token_ms", lambda kernel: next(times))
        assert make_kernel("auto", config, "int4", 1).name == expected
        assert make_kernel("auto", config, "int4", 1).name == expected  # with no times left to measure
    assert len(list(cache.cache_folder().iterdir())) == 2
    assert make_kernel("auto", PACKABLE, "f32", 1).name == "reference"  # torch would lose digits
    with pytest.raises(UsageError, match="llvmlite is not installed here; use --kernel auto"):
        make_kernel("llvm", PACKABLE, "int4", 1)


def test_a_trial_measures_both_kernels():
    assert all(0 < trial.token_ms(make_kernel(name, PACKABLE, "int4", 1)) < 1000 for name in ("torch", "reference"))


@pytest.mark.mpi
@pytest.mark.slow
def test_a_computer_without_llvmlite_writes_a_text(stored, tmp_path):
    options = ("--model", stored(PACKABLE, "int4"), "--prompt", "The quick", "--max-tokens", "5", "--ignore-eos")
    file = tmp_path / "report.json"
    succeed(run(3, "-m", "tests.programs.no_llvmlite", *EVEN, *options, "--json", file))
    report = json.loads(file.read_text())
    assert report["kernel"] in ("torch", "reference") and report["generated_tokens"] == 5


@pytest.mark.mpi
@pytest.mark.slow
def test_three_ranks_write_what_one_writes(stored, tmp_path):
    options = ("--model", stored(PACKABLE, "int4"), "--prompt", "The quick", "--max-tokens", "5", "--ignore-eos", "--kernel", "torch",
               "--wire", "f32")  # fmt: skip
    alone, three = (report_of(ranks, "generate", tmp_path, *options) for ranks in (1, 3))
    assert alone["kernel"] == three["kernel"] == "torch" and alone["token_ids"] == three["token_ids"]
    assert alone["devices"][0]["weights_bytes"] < 0.4 * 4 * parameters(PACKABLE)


def parameters(config) -> int:
    return sum(int(np.prod(shape)) for _, shape, required in expected_shapes(config) if required)


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_memory_may_be_used_again_for_the_next_layer(stored, dtype):
    """As where weights are read at every token."""
    kernel, store = make_kernel("torch", PACKABLE, dtype, 1), ModelStore(stored(PACKABLE, dtype))
    x, results = torch.ones(2, PACKABLE.hidden), []
    slot = np.full(2**20, 255, np.uint8)
    for layer in (0, 1, 0):
        for memory in (None, slot[-slot.ctypes.data % 64 :]):
            weights = LayerWeights()
            part = ffn_part(store, kernel, layer, [0, 2, 4], weights)
            part.make_room(memory)
            part.read()
            results.append(weights.gate_up.product(x))
    assert all(torch.equal(results[n], results[n + 1]) for n in (0, 2, 4)) and torch.equal(results[0], results[4])
    assert not torch.equal(results[0], results[2])
