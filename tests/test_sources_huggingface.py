"""Hugging Face folders: the same weights as in a GGUF file, and clear errors for what cannot be read."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open

from halo_mpi.errors import DamagedFileError, InputError
from halo_mpi.model.config import llama3_rope_factors
from halo_mpi.model.tokenizer import Tokenizer
from halo_mpi.sources import open_source
from halo_mpi.sources.expected import expected_shapes
from halo_mpi.sources.huggingface import NAMING
from tests.tiny_models import CHAT_TEMPLATE, TINY, tiny_tokenizer, tiny_weights, write_tiny_gguf, write_tiny_hf


@pytest.fixture
def model(tmp_path):
    def write(**options):
        write_tiny_hf(tmp_path / "tiny", **options)
        return tmp_path / "tiny"

    return write


def fails(folder, error, *words):
    with pytest.raises(error) as caught:
        open_source(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    for word in words:
        assert word in message


def edit(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("biases, shards, tied", [(False, 1, False), (True, 3, False), (True, 1, True)])
def test_slices_equal_those_of_a_gguf_file_of_the_same_weights(tmp_path, model, dtype, biases, shards, tied):
    config = replace(TINY, tied=tied)
    write_tiny_gguf(tmp_path / "tiny.gguf", config, 5, dtype, biases)
    folder = model(config=config, seed=5, dtype=dtype, biases=biases, shards=shards)
    with open_source(folder) as ours, open_source(tmp_path / "tiny.gguf") as gguf:
        assert replace(ours.config, norm_eps=gguf.config.norm_eps) == gguf.config
        assert ours.native_dtype == gguf.native_dtype == dtype.lower()
        for name, shape, required in expected_shapes(config):
            if len(shape) == 1:
                found, expected = ours.vector(name), gguf.vector(name)
                if found is None:
                    assert expected is None and not required and not biases
                    continue
                tolerance = {"F32": 0, "F16": 1e-3, "BF16": 8e-3}[dtype]  # vectors are f32 in GGUF
                assert found.dtype == np.float32 and np.allclose(found, expected, rtol=tolerance, atol=1e-6)
                continue
            assert np.array_equal(ours.rows(name, 16, 32), gguf.rows(name, 16, 32)), name
            assert np.array_equal(ours.columns(name, 7, 40), gguf.columns(name, 7, 40)), name
            assert np.array_equal(ours.rows(name, 0, shape[0]), gguf.rows(name, 0, shape[0])), name


def test_bf16_is_read_as_torch_reads_it(model):
    torch = pytest.importorskip("torch")
    folder = model(dtype="BF16")
    with open_source(folder) as source, safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in ("embedding", "layers.1.k", "layers.0.down"):
            expected = file.get_tensor(NAMING.stored(name)).to(torch.float32).numpy()
            assert np.array_equal(source.rows(name, 0, len(expected)), expected)


def test_tokenizer_and_its_settings_come_from_the_folder(model):
    files = open_source(model()).tokenizer
    assert (files.bos, files.eos, files.eos_ids) == ("<|im_start|>", "<|im_end|>", (2,))
    assert files.chat_template == CHAT_TEMPLATE
    text = "The dog, 123 東京"
    assert Tokenizer(files).encode(text) == tiny_tokenizer(320).encode(text).ids


def test_settings_may_be_in_other_files(model):
    folder = model()
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0, 2]}')
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    edit(folder / "tokenizer_config.json", lambda fields: fields.update(chat_template=named))
    files = open_source(folder).tokenizer
    assert files.eos_ids == (2, 0) and files.chat_template == "yes"
    (folder / "chat_template.jinja").write_text("file")
    assert open_source(folder).tokenizer.chat_template == "file"
    (folder / "generation_config.json").write_text('{"eos_token_id": 320}')
    fails(folder, DamagedFileError, "320")


def test_without_settings_there_is_no_template_and_no_eos(model):
    folder = model(fields={"eos_token_id": None})
    (folder / "tokenizer_config.json").unlink()
    files = open_source(folder).tokenizer
    assert files.chat_template is files.bos is files.eos is None and files.eos_ids == ()


def test_added_tokens_beyond_the_embedding_are_left_out(model):
    folder = model()
    token = {"content": "<pad>", "special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    edit(folder / "tokenizer.json", lambda fields: fields["added_tokens"].append({"id": 320, **token}))
    assert Tokenizer(open_source(folder).tokenizer).vocabulary == 320
    edit(folder / "tokenizer.json", lambda fields: fields["model"]["vocab"].update({"word": 321}))
    fails(folder, DamagedFileError, "tokenizer.json", "321")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_scaling_is_read_from_old_and_new_fields(model, key):
    def factors(**rope):
        return open_source(model(fields={key: rope})).config.rope_factors

    assert factors(rope_type="default") is None
    assert factors(type="linear", factor=4) == factors(rope_type="linear", factor=4.0) == (4.0,) * 8
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    assert factors(rope_type="llama3", **llama3) == llama3_rope_factors(16, 10000.0, 8.0, 1.0, 4.0, 64)
    fails(model(fields={key: {"rope_type": "yarn", "factor": 2.0}}), InputError, "'yarn'")
    fails(model(fields={key: {"rope_type": "linear"}}), DamagedFileError, "factor", "missing")
    fails(model(fields={key: {"rope_type": "llama3", **llama3, "high_freq_factor": 1.0}}), DamagedFileError, "contradict")
    fails(model(fields={key: [1]}), DamagedFileError, "rotary scaling")


def test_rope_theta_may_be_in_the_rotary_parameters(model):
    folder = model(fields={"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000}})
    assert open_source(folder).config.rope_theta == 500000.0


def test_fields_that_are_not_stated_have_the_defaults_of_transformers(model):
    absent = ("num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
    config = open_source(model(config=replace(TINY, kv_heads=4), fields=dict.fromkeys(absent))).config
    assert config == replace(TINY, kv_heads=4, norm_eps=1e-6, context=2048)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model_type": "mistral"}, ["'mistral'", "LLaMA"]),
        ({"hidden_act": "gelu"}, ["'gelu'"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantized"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"hidden_size": "big"}, ["hidden_size", "'big'"]),
        ({"num_hidden_layers": 255}, ["model.layers.2.input_layernorm.weight", "missing"]),
        ({"num_hidden_layers": 2**31 - 1}, ["2147483647 layers", "at most 255"]),
        ({"num_attention_heads": 0}, ["heads"]),
        ({"intermediate_size": 128}, ["model.layers.0.mlp.gate_proj.weight", "[96, 64]", "[128, 64]"]),
        ({"vocab_size": 10**400}, ["vocabulary"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps"]),
        ({"partial_rotary_factor": 0.5}, ["a part of the head"]),
    ],
)
def test_unsuitable_configurations_are_named(model, fields, words):
    fails(model(fields=fields), InputError, *words)


def test_missing_files_are_named(model, tmp_path):
    folder = model(shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    fails(folder, InputError, "model-00002-of-00002.safetensors", "missing")
    (folder / "model.safetensors.index.json").unlink()
    fails(folder, InputError, "model.safetensors.index.json")
    (folder / "pytorch_model.bin").write_bytes(b"")
    fails(folder, InputError, "pickle", "convert them to safetensors")
    folder = model()
    (folder / "tokenizer.json").unlink()
    fails(folder, InputError, "no tokenizer.json")
    (folder / "config.json").unlink()
    fails(folder, InputError, "no config.json")
    write_tiny_gguf(folder / "inside.gguf")
    fails(folder, InputError, "inside.gguf")


def test_an_index_cannot_name_files_elsewhere(model):
    folder = model(shards=2)
    edit(folder / "model.safetensors.index.json", lambda fields: fields["weight_map"].update(x="../secret.safetensors"))
    fails(folder, DamagedFileError, "'../secret.safetensors'")


def test_json_that_is_none_is_named(model):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        for content in (b"{", b"[1]", b"\xff\xfe", b"[" * 100000):
            folder = model()
            (folder / name).write_bytes(content)
            fails(folder, InputError, name)


def test_other_dtypes_are_named(model):
    folder = model()
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"dtype": "F32"', b'"dtype": "I32"'))
    fails(folder, InputError, "I32", "model.embed_tokens.weight")


def test_weights_that_are_not_finite_are_reported(model):
    weights = tiny_weights(TINY, 0)
    weights["layers.1.down"][3, 5] = np.inf
    with open_source(model(weights=weights)) as source:
        source.columns("layers.1.down", 6, 96)
        with pytest.raises(DamagedFileError, match="model.layers.1.mlp.down_proj.weight"):
            source.columns("layers.1.down", 0, 6)
