"""GGUF files: what is read is what the gguf package and the written weights say."""

import os
import struct
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from halo_mpi.errors import DamagedFileError, InputError
from halo_mpi.sources import open_source
from halo_mpi.sources.expected import expected_shapes
from halo_mpi.sources.formats import decode
from halo_mpi.sources.gguf import NAMING
from halo_mpi.sources.gguf_header import read_header
from halo_mpi.sources.source import Source, Tensor
from halo_mpi.store.encoding import Blocks
from tests.tiny_models import K_QUANTS, TINY, TINY_256, interleave, tiny_weights, write_tiny_gguf


def floats(values):
    return values.dequantize() if isinstance(values, Blocks) else values


def whole(source, name):
    return source.rows(name, 0, source.tensors[name].shape[0])


def written(path):
    """Every tensor of a GGUF file as the gguf package reads it, f32 in the file's order of rows."""
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(path).tensors}


def assert_equals_independent_reading(source, path):
    tensors = written(path)
    for name, shape, required in expected_shapes(source.config):
        expected = tensors.get(NAMING.stored(name))
        if expected is None:
            assert not required and source.vector(name) is None
            continue
        found = floats(whole(source, name)) if len(shape) == 2 else source.vector(name)
        if name.removesuffix(".bias").endswith((".q", ".k")):
            found = interleave(found, source.config.head_dim)
        assert np.array_equal(found, expected), name


@pytest.fixture
def model(tmp_path):
    def write(**options):
        path = tmp_path / "tiny.gguf"
        write_tiny_gguf(path, **options)
        return path

    return write


def fails(path, error, *words):
    with pytest.raises(error) as caught:
        open_source(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
def test_f32_weights_come_back_exactly_in_half_rotation_order(model, biases, tokenizer):
    with open_source(model(biases=biases, tokenizer=tokenizer, seed=7)) as source:
        assert source.config == replace(TINY, norm_eps=source.config.norm_eps)
        assert source.native_dtype == "f32"
        expected = tiny_weights(TINY, 7, biases)
        for name, shape, _ in expected_shapes(source.config):
            found = whole(source, name) if len(shape) == 2 else source.vector(name)
            if name in expected:
                assert found.dtype == np.float32 and np.array_equal(found, expected[name]), name
            else:
                assert found is None


@pytest.mark.parametrize(
    "tensor_type, native",
    [
        ("F16", "f16"),
        ("BF16", "bf16"),
        ("Q4_0", "int4"),
        ("Q4_1", "int4"),
        ("Q5_0", "int8"),
        ("Q5_1", "int8"),
        ("Q8_0", "int8"),
        ("Q2_K", "int4"),
        ("Q3_K", "int4"),
        ("Q4_K", "int4"),
        ("Q5_K", "int8"),
        ("Q6_K", "int8"),
    ],
)
def test_every_type_reads_as_the_gguf_package_does(model, tensor_type, native):
    path = model(config=TINY_256 if tensor_type in K_QUANTS else TINY, tensor_type=tensor_type, biases=True)
    with open_source(path) as source:
        assert source.native_dtype == native
        assert source.summary["tensor_types"][tensor_type] == 2 * 7 + 2
        assert isinstance(whole(source, "layers.0.q"), Blocks) == (tensor_type in ("Q4_0", "Q4_1", "Q8_0"))
        assert_equals_independent_reading(source, path)


@pytest.mark.parametrize("tensor_type", ["F32", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q5_1", "Q4_K"])
def test_slices_equal_the_whole(model, tensor_type):
    config = TINY_256 if tensor_type in K_QUANTS else TINY
    with open_source(model(config=config, tensor_type=tensor_type)) as source:
        half = config.head_dim * config.heads // 2
        for name, start, stop in (("layers.1.q", half, 2 * half), ("layers.0.down", 3, 5), ("embedding", 31, 32)):
            assert np.array_equal(floats(source.rows(name, start, stop)), floats(whole(source, name))[start:stop])
        for name, start, stop in (("layers.0.k", 5, 41), ("layers.1.down", 32, 96), ("layers.0.down", 1, 33)):
            columns = source.columns(name, start, stop)
            assert np.array_equal(floats(columns), floats(whole(source, name))[:, start:stop])
            aligned = start % 32 == stop % 32 == 0
            assert isinstance(columns, Blocks) == (aligned and tensor_type in ("Q4_0", "Q4_1", "Q8_0"))


def test_a_quantized_bias_is_read_as_f32(tmp_path):
    data = np.arange(34, dtype=np.uint8)
    data[:2] = np.array([0.5], "<f2").view(np.uint8)
    tensor = Tensor(tmp_path, "blk.0.attn_v.bias", "Q8_0", (32,), data[None], 32, 34)
    source = Source(TINY, None, {}, "int8", {"layers.0.v.bias": tensor})
    assert np.array_equal(source.vector("layers.0.v.bias"), np.arange(2, 34) * np.float32(0.5))


def test_partial_heads_of_q_and_k_are_refused(model):
    with open_source(model()) as source:
        with pytest.raises(ValueError, match="whole heads"):
            source.rows("layers.0.q", 0, 8)
        with pytest.raises(ValueError, match="outside"):
            source.rows("layers.0.v", 0, 33)


def test_the_result_does_not_depend_on_the_open_file(model):
    source = open_source(model())
    rows = source.rows("layers.0.v", 0, 4)
    source.close()
    rows += 1


def test_q4_0_scale_too_large_for_a_minimum_gives_f32():
    block = np.zeros((1, 18), np.uint8)
    block[0, :2] = np.array([60000.0], "<f2").view(np.uint8)
    values = decode(block, "Q4_0", 0, 32)
    assert isinstance(values, np.ndarray) and values[0, 0] == np.float32(np.float16(60000.0)) * -8


def test_a_tied_head_is_absent(model):
    path = model(config=replace(TINY, tied=True))
    with open_source(path) as source:
        assert source.config.tied and "head" not in source.tensors


def test_rotary_factors_come_from_the_tensor_and_from_linear_scaling(model):
    factors = tuple(float(2 ** (i // 2)) for i in range(8))
    config = replace(TINY, rope_factors=factors)
    assert open_source(model(config=config)).config.rope_factors == factors
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert open_source(model(metadata=scaling)).config.rope_factors == (4.0,) * 8
    assert open_source(model(metadata={**scaling, "llama.rope.scaling.type": "none"})).config.rope_factors is None
    both = open_source(model(config=config, metadata=scaling)).config.rope_factors
    assert both == tuple(4 * factor for factor in factors)
    fails(model(metadata={**scaling, "llama.rope.scaling.type": "yarn"}), InputError, "'yarn'")


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"llama.expert_count": 8}, ["mixture of experts"]),
        ({"llama.attention.value_length": 8}, ["value_length"]),
        ({"llama.rope.dimension_count": 8}, ["rope.dimension_count"]),
        ({"llama.attention.head_count": 5}, ["5 query heads"]),
        ({"llama.attention.head_count": 0}, ["heads"]),
        ({"llama.block_count": 3}, ["blk.2.attn_norm.weight", "missing"]),
        ({"llama.block_count": 255}, ["blk.2.attn_norm.weight", "missing"]),
        ({"llama.block_count": 2**31 - 1}, ["2147483647 layers", "at most 255"]),
        ({"llama.feed_forward_length": 2**31 - 1}, ["blk.0.ffn_gate.weight", "[96, 64]", "[2147483647, 64]"]),
        ({"llama.attention.key_length": 2**31 - 2, "llama.attention.value_length": 2**31 - 2}, ["head dimension"]),
        ({"llama.block_count": "many"}, ["llama.block_count", "str"]),
        ({"llama.rope.freq_base": float("nan")}, ["rope_theta"]),
        ({"split.count": 3}, ["llama-gguf-split"]),
    ],
)
def test_unsuitable_metadata_is_named(model, metadata, words):
    fails(model(metadata=metadata), InputError, *words)


def test_other_architectures_are_named(model):
    fails(model(architecture="qwen2"), InputError, "'qwen2'", "LLaMA")


def test_missing_and_misshapen_tensors_are_named(model):
    weights = tiny_weights(TINY, 0)
    del weights["layers.1.ffn_norm"]
    fails(model(weights=weights), DamagedFileError, "blk.1.ffn_norm.weight", "missing")
    weights = tiny_weights(TINY, 0) | {"layers.1.up": np.zeros((96, 32), np.float32)}
    fails(model(weights=weights), DamagedFileError, "blk.1.ffn_up.weight", "[96, 32]", "[96, 64]")


@pytest.mark.parametrize("tensor_type", ["F32", "F16", "BF16", "Q4_1"])
def test_weights_that_are_not_finite_are_reported(model, tensor_type):
    path = model(tensor_type=tensor_type)
    info = read_header(path).tensors["blk.1.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + 4] = struct.pack("<f", np.nan) if tensor_type == "F32" else b"\xff\x7f\xff\x7f"
    path.write_bytes(data)
    with open_source(path) as source:
        source.rows("layers.1.up", 1, 96)
        for read in (source.rows, source.columns):
            with pytest.raises(DamagedFileError, match=f"{path}.*blk.1.ffn_up.weight"):
                read("layers.1.up", 0, 32)


def test_paths_that_are_no_model_are_refused(tmp_path):
    fails(tmp_path / "absent.gguf", InputError, "no such file")
    other = tmp_path / "notes.txt"
    other.write_text("hello")
    fails(other, InputError, "expected a .gguf file or a Hugging Face folder")
    other.with_suffix(".gguf").write_bytes(b"")
    fails(other.with_suffix(".gguf"), DamagedFileError)
    os.mkfifo(tmp_path / "pipe.gguf")
    fails(tmp_path / "pipe.gguf", InputError)


def test_a_gguf_file_is_recognized_under_any_name(model):
    path = model().rename(model().with_name("model"))
    assert open_source(path).config.name == "tiny"


def header_with(version=3, tensors=0, keys=b"", key_count=0, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, key_count) + keys


@pytest.mark.parametrize(
    "content, words",
    [
        (header_with(version=1), ["version 1"]),
        (header_with(version=0x03000000), ["big-endian"]),
        (header_with(tensors=2**63), ["tensors"]),
        (header_with(key_count=2**60), ["keys"]),
        (header_with(key_count=1, keys=struct.pack("<Q", 2**63) + b"abc"), ["ends within its header"]),
        (header_with(key_count=1, keys=struct.pack("<Q1sIIQ", 1, b"a", 9, 0, 2**40)), ["'a'", "entries"]),
        (header_with(key_count=1, keys=struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 1)), ["'a'", "array of type 9"]),
        (header_with(key_count=1, keys=struct.pack("<Q1sIIQ", 1, b"a", 9, 10, 2**20)), ["ends within its header"]),
        (header_with(key_count=1, keys=struct.pack("<Q1sI", 1, b"a", 77)), ["type 77"]),
        (header_with(key_count=1, keys=struct.pack("<Q1sI", 1, b"\xff", 4)), ["UTF-8"]),
        (header_with(key_count=2, keys=struct.pack("<Q1sIB", 1, b"a", 0, 1) * 2), ["'a'", "twice"]),
        (header_with(tensors=1, keys=struct.pack("<Q1sI", 1, b"t", 9)), ["9 dimensions"]),
        (header_with(tensors=1, keys=struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 999, 0)), ["type 999"]),
        (header_with(tensors=1, keys=struct.pack("<Q1sIQIQ", 1, b"t", 1, 31, 2, 0)), ["shape [31]"]),
        (header_with(tensors=1, keys=struct.pack("<Q1sIQIQ", 1, b"t", 1, 2**62, 0, 0)), ["ends within its tensor 't'"]),
        (header_with(tensors=1, keys=struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 32)), ["'t' begins at byte"]),
    ],
)
def test_an_impossible_header_is_refused_at_once(tmp_path, content, words):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    fails(path, InputError, *words)


def test_smollm2_reads_as_the_gguf_package_does(smollm2_gguf):
    tensors = {tensor.name: tensor for tensor in GGUFReader(smollm2_gguf).tensors}

    def expected(name, start, stop):
        tensor = tensors[name]
        return dequantize(tensor.data[start:stop], tensor.tensor_type)

    with open_source(smollm2_gguf) as source:
        config = source.config
        assert (config.layers, config.hidden, config.heads, config.kv_heads) == (30, 576, 9, 3)
        assert (config.ffn, config.vocabulary, config.head_dim, config.rope_theta) == (1536, 49152, 64, 100000.0)
        assert config.tied and source.native_dtype == "int4"
        embedding = source.rows("embedding", 1000, 1100)
        assert embedding.dtype == "int8"
        assert np.array_equal(embedding.dequantize(), expected("token_embd.weight", 1000, 1100))
        q = source.rows("layers.29.q", 64, 192)
        assert q.dtype == "int4"
        assert np.array_equal(interleave(q.dequantize(), 64), expected("blk.29.attn_q.weight", 64, 192))
        down = source.columns("layers.3.down", 128, 256)
        assert np.array_equal(down.dequantize(), expected("blk.3.ffn_down.weight", 0, 576)[:, 128:256])
