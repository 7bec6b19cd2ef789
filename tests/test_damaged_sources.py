"""Files with flipped bytes and files cut short: a HaloError, or what an independent reading of the file as it is gives."""

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import load_file

from halo_mpi.errors import HaloError
from halo_mpi.model.tokenizer import Tokenizer
from halo_mpi.sources import open_source
from halo_mpi.sources.expected import expected_shapes
from halo_mpi.sources.gguf import NAMING as GGUF_NAMES
from halo_mpi.sources.huggingface import NAMING as HUGGINGFACE_NAMES
from halo_mpi.store.encoding import Blocks
from tests.tiny_models import TINY, interleave, write_tiny_gguf, write_tiny_hf

SMALL = replace(TINY, layers=1, hidden=32, heads=2, kv_heads=1, ffn=32, vocabulary=300)
HEADER = range(1024)

pytestmark = pytest.mark.timeout(120)


def read_everything(path):
    """Every tensor by canonical name, f32; None if the file is refused."""
    try:
        with open_source(path) as source:
            tokenizer = Tokenizer(source.tokenizer)
            tokenizer.decode(tokenizer.encode("the dog 12"))
            found = {}
            for name, shape, _ in expected_shapes(source.config):
                values = source.rows(name, 0, shape[0]) if len(shape) == 2 else source.vector(name)
                if values is not None:
                    found[name] = values.dequantize() if isinstance(values, Blocks) else values
            return found, source.config
    except HaloError as error:
        assert "\n" not in str(error), str(error)
        return None, None


def gguf_as_it_is(path, names):
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    found = {name: tensors[GGUF_NAMES.stored(name)] for name in names}
    return {name: dequantize(tensor.data, tensor.tensor_type) for name, tensor in found.items()}


def safetensors_as_it_is(path, names):
    tensors = load_file(path)
    return {name: tensors[HUGGINGFACE_NAMES.stored(name)] for name in names}


def damaged_versions(content, seed, count, header=HEADER):
    """The content with one byte of the header changed, each in turn, with random bytes changed, and cut short."""
    random = np.random.default_rng(seed)
    places = [*header, *random.integers(0, len(content), count)]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << random.integers(8) if random.random() < 0.7 else random.integers(1, 256)
        yield place, bytes(flipped)
    for size in random.integers(0, len(content), count // 2):
        yield size, content[:size]


def same(found, expected):
    return found.shape == expected.shape and np.array_equal(found, expected)


@pytest.mark.parametrize("tokenizer, tensor_type, header", [("gpt2", "Q4_1", HEADER), ("llama", "F16", HEADER[::4])])
def test_damaged_gguf_files_are_refused_or_read_as_they_are(tmp_path, tokenizer, tensor_type, header):
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, SMALL, tensor_type=tensor_type, tokenizer=tokenizer)
    content = path.read_bytes()
    original, _ = read_everything(path)
    opened = refused = 0
    for place, damaged in damaged_versions(content, 1, 200, header):
        path.write_bytes(damaged)
        found, config = read_everything(path)
        if found is None:
            refused += 1
            continue
        opened += 1
        for name, expected in gguf_as_it_is(path, found).items():
            if name.endswith((".q", ".k")):
                found[name] = interleave(found[name], config.head_dim)
            assert same(found[name], expected), (place, name)
        changed = [name for name in original if name[-2:] not in (".q", ".k") and not same(found[name], original[name])]
        assert len(changed) <= 1, place
    assert refused > 100 and opened > 100


def test_damaged_safetensors_files_are_refused_or_read_as_they_are(tmp_path):
    write_tiny_hf(tmp_path / "tiny", SMALL)
    path = tmp_path / "tiny" / "model.safetensors"
    content = path.read_bytes()
    original, _ = read_everything(path.parent)
    opened = refused = 0
    for place, damaged in damaged_versions(content, 2, 200):
        path.write_bytes(damaged)
        found, _ = read_everything(path.parent)
        if found is None:
            refused += 1
            continue
        opened += 1
        for name, expected in safetensors_as_it_is(path, found).items():
            assert same(found[name], expected), (place, name)
        assert sum(not same(found[name], original[name]) for name in original) <= 1, place
    assert refused > 400 and opened > 50


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_damaged_settings_are_refused_or_leave_the_weights_alone(tmp_path, name):
    write_tiny_hf(tmp_path / "tiny", SMALL, shards=2)
    path = tmp_path / "tiny" / name
    content = path.read_bytes()
    original, _ = read_everything(path.parent)
    for place, damaged in damaged_versions(content, 3, 150, header=range(min(len(content), 300))):
        path.write_bytes(damaged)
        found, _ = read_everything(path.parent)
        for tensor in found or {}:
            assert same(found[tensor], original[tensor]), (place, tensor)


NAMES = (b"output.weight", b"blk.0.attn_q.bias", b"blk.1.attn_q.bias", b"blk.1.ffn_up.weight", b"rope_freqs.weight")


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_tensor_name_is_no_tensor_less(tmp_path, name):
    """Without the tensor the model would be another one: tied, without a bias, without rotary scaling."""
    config = replace(TINY, rope_factors=(2.0,) * (TINY.head_dim // 2))
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, config, biases=True)
    content = path.read_bytes()
    place = content.index(name) + len(name) - 3
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(HaloError, match="model.gguf"):
        open_source(path)
