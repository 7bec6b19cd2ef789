"""`convert` and `inspect` as a user meets them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from halo_mpi.model.whole import load_trunk
from halo_mpi.sources import open_source
from halo_mpi.store.encoding import DTYPES
from halo_mpi.store.reader import ModelStore, RecordFile
from tests.conftest import converted
from tests.mpi import ROOT
from tests.tiny_models import TINY, tiny_weights, write_tiny_gguf, write_tiny_hf


def halo_mpi(*arguments):
    command = [sys.executable, "-m", "halo_mpi.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    write_tiny_hf(folder)
    return folder


def test_convert_and_inspect(source, tmp_path):
    out = tmp_path / "tiny.halo"
    finished = halo_mpi("convert", source, out, "--dtype", "int8", "--shards", 2)
    assert finished.returncode == 0 and "as int8, 2 shards" in finished.stderr and finished.stdout == ""
    assert sorted(path.name for path in out.iterdir()) == ["model.h5", "shard-00.h5", "shard-01.h5"]
    shown = halo_mpi("inspect", out, "--verify")
    assert (
        shown.returncode == 0
        and "hidden 64, 4 query heads on 2 KV heads" in shown.stdout
        and "all checksums of 3 files match" in shown.stderr
    )
    facts = json.loads(halo_mpi("inspect", out, "--json").stdout)
    assert facts["config"]["hidden"] == 64 and facts["dtype"] == "int8" and facts["digest"] == ModelStore(out).digest


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_restores_the_weights_within_its_precision(source, dtype, tmp_path):
    store = ModelStore(converted(source, tmp_path / "m.halo", dtype))
    weights = tiny_weights(TINY, 0)
    worst = {"f32": 0, "f16": 1e-3, "bf16": 1e-2, "int8": 1e-2, "int4": 0.2}[dtype]
    for layer in range(TINY.layers):
        layout = store.layout("ffn")
        down = np.concatenate([layout.unpack(store.read("ffn", layer, group), "down") for group in range(TINY.groups)], 1)[
            :, : TINY.ffn
        ]
        assert np.abs(down - weights[f"layers.{layer}.down"]).max() <= worst
    embedding = load_trunk(store, TINY).embedding.numpy()
    difference = np.abs(embedding - weights["embedding"]).max()
    assert difference <= (0.05 if dtype in ("int4", "int8") else worst * 5), "the vocabulary keeps 8 bits with int4"


def test_gguf_and_huggingface_give_the_same_model(source, tmp_path):
    write_tiny_gguf(tmp_path / "m.gguf")
    stores = [ModelStore(converted(path, tmp_path / f"{path.name}.halo", "f32", 3)) for path in (source, tmp_path / "m.gguf")]
    for table in ("query", "kv", "ffn", "embedding", "head", "layer", "final"):
        layers, entries = (
            (1, 1) if table == "final" else (1 if table in ("embedding", "head") else TINY.layers, len(stores[0].entries(table)))
        )
        for layer, entry in np.ndindex(layers, entries):
            assert np.array_equal(*(store.read(table, layer, entry) for store in stores)), (table, layer, entry)


def test_converting_twice_gives_the_same_digest(source, tmp_path):
    digests = {ModelStore(converted(source, tmp_path / f"{number}.halo", "int4")).digest for number in range(2)}
    assert len(digests) == 1


@pytest.mark.parametrize(
    "arguments, code, part",
    [
        (["missing.gguf", "out.halo"], 2, "missing.gguf"),
        (["SOURCE", "out.halo", "--dtype", "int3"], 2, "--dtype"),
        (["SOURCE", "out.halo", "--shards", "0"], 2, "--shards"),
        (["SOURCE", "SOURCE", "--force"], 2, "no folder made by this command"),
    ],
)
def test_wrong_use_is_one_line(source, tmp_path, arguments, code, part):
    finished = halo_mpi("convert", *(source if word == "SOURCE" else word for word in arguments))
    assert finished.returncode == code and part in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1, finished.stderr


def test_an_unknown_command_is_one_line():
    finished = halo_mpi("transmogrify")
    assert finished.returncode == 2 and "transmogrify" in finished.stderr and "generate" in finished.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can only be mounted by root")
def test_a_full_disk_is_one_line_with_exit_code_1(source, tmp_path):
    """The space is there when the conversion begins, and taken by another program before it ends."""
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=900k tmpfs {small} 2>/dev/null"):
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        space = "import shutil, types; shutil.disk_usage = lambda _: types.SimpleNamespace(free=10**12)"
        program = f"{space}; from halo_mpi.cli import main; main()"
        command = [sys.executable, "-c", program, "convert", str(source), str(small / "m.halo"), "--dtype", "f32"]
        (small / "other").write_bytes(bytes(600_000))
        finished = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert finished.returncode == 1 and "is full" in finished.stderr, finished.stderr
        assert len(finished.stderr.strip().splitlines()) == 1, finished.stderr
        assert [path.name for path in small.iterdir()] == ["other"]
        finished = halo_mpi("convert", source, small / "m.halo", "--dtype", "f32")
        assert finished.returncode == 1 and "MB free" in finished.stderr
    finally:
        os.system(f"umount {small}")


def test_verify_names_every_damaged_record(source, tmp_path):
    model = converted(source, tmp_path / "m.halo", "f32", 2)
    table = RecordFile(model / "shard-00.h5").tables["kv"]
    with open(model / "shard-00.h5", "r+b") as file:
        file.seek(int(table.offsets[1, 0]) + 5)
        file.write(b"\xaa\xbb")
    finished = halo_mpi("inspect", model, "--verify")
    assert (
        finished.returncode == 2
        and "shard-00.h5 is damaged at layer 1, kv 0" in finished.stderr
        and "(1 damaged" in finished.stderr
    )


def test_a_shard_of_another_conversion_is_refused(source, tmp_path):
    one, other = converted(source, tmp_path / "one.halo", "f32", 2), converted(source, tmp_path / "other.halo", "int8", 2)
    (one / "shard-01.h5").write_bytes((other / "shard-01.h5").read_bytes())
    finished = halo_mpi("inspect", one)
    assert finished.returncode == 2 and "shard-01.h5 does not belong" in finished.stderr


def test_only_one_record_is_in_memory_at_a_time(tmp_path):
    """Peak memory of a conversion stays far below the size of the model."""
    import tracemalloc
    from dataclasses import replace

    big = replace(TINY, hidden=256, ffn=2048, layers=6, vocabulary=320)
    write_tiny_gguf(tmp_path / "big.gguf", big, tensor_type="F32")
    with open_source(tmp_path / "big.gguf") as opened:
        from halo_mpi.convert import write_model

        tracemalloc.start()
        write_model(opened, tmp_path / "big.halo", "f32", 4)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    size = sum(path.stat().st_size for path in (tmp_path / "big.halo").iterdir())
    largest = 4096 * big.hidden * 4  # a block of the vocabulary
    assert size > 40e6 and peak < 3.5 * largest, (size, peak)
