"""Small random LLaMA models as GGUF files and Hugging Face folders; both formats hold the same weights for the same seed."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from halo_mpi.model.config import ModelConfig
from halo_mpi.sources.expected import expected_shapes
from halo_mpi.sources.gguf import NAMING as GGUF_NAMES
from halo_mpi.sources.gguf import ROPE_FACTORS
from halo_mpi.sources.huggingface import NAMING as HUGGINGFACE_NAMES

TINY = ModelConfig("tiny", 2, 64, 4, 2, 16, 96, 320, 128, 1e-5, 10000.0)
TINY_256 = replace(TINY, hidden=256, heads=4, head_dim=64, ffn=512)  # for formats with blocks of 256 weights
K_QUANTS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where blocks have f16 scales

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "It is a truth universally acknowledged, that a single man must be in want of a wife.",
    "def add(left, right):\n    return left + right  # 1 + 2 = 3",
    "Über den Wölkchen muß die Freiheit wohl grenzenlos sein; naïve café, 東京 と 大阪.",
    "the then there these those other mother brother another together",
)


def tiny_weights(config: ModelConfig, seed: int, biases: bool = False) -> dict[str, np.ndarray]:
    """Random f32 weights by canonical name, scaled so that activations stay near one."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape, required in expected_shapes(config):
        if not required and not biases:
            continue
        values = random.standard_normal(shape, np.float32)
        if name.endswith("norm"):
            values = 1 + values / 10
        elif name.endswith(".bias"):
            values = values / 10
        elif name != "embedding":
            values = values / np.float32(np.sqrt(shape[1]))
        weights[name] = values.astype(np.float32)
    return weights


def write_tiny_gguf(
    path: Path,
    config: ModelConfig = TINY,
    seed: int = 0,
    tensor_type: str = "F32",
    biases: bool = False,
    tokenizer: str = "gpt2",
    pre: str = "smollm",
    weights: dict[str, np.ndarray] | None = None,
    metadata: dict[str, int | float | str | bool] | None = None,
    architecture: str = "llama",
):
    """Write a model file as llama.cpp's converter would; matrices of a K-quant type are random blocks, not the weights.

    `metadata` adds keys, or replaces those with the same name.
    """
    writer = GGUFWriter(path, architecture)
    fields = {
        "llama.block_count": config.layers,
        "llama.context_length": config.context,
        "llama.embedding_length": config.hidden,
        "llama.feed_forward_length": config.ffn,
        "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "general.name": config.name,
    }
    add_tokenizer = _add_gpt2_tokenizer if tokenizer == "gpt2" else _add_llama_tokenizer
    fields.update(add_tokenizer(writer, config.vocabulary, pre))
    fields.update(metadata or {})
    for key, value in fields.items():
        _add_field(writer, key, value)
    weights = tiny_weights(config, seed, biases) if weights is None else weights
    random = np.random.default_rng(seed)
    for name, values in weights.items():
        stored_type = GGMLQuantizationType[tensor_type if values.ndim == 2 else "F32"]
        if name.removesuffix(".bias").endswith((".q", ".k")):
            values = interleave(values, config.head_dim)
        data = random_blocks(random, values.shape, tensor_type) if stored_type.name in K_QUANTS else quantize(values, stored_type)
        writer.add_tensor(GGUF_NAMES.stored(name), data, raw_dtype=stored_type)
    if config.rope_factors is not None:
        writer.add_tensor(ROPE_FACTORS, np.asarray(config.rope_factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tiny_hf(
    folder: Path,
    config: ModelConfig = TINY,
    seed: int = 0,
    dtype: str = "F32",
    biases: bool = False,
    shards: int = 1,
    weights: dict[str, np.ndarray] | None = None,
    fields: dict | None = None,
):
    """Write config.json, safetensors and a byte-level tokenizer; `fields` adds to config.json, None removes a field."""
    folder.mkdir(exist_ok=True)
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "attention_bias": biases,
        "mlp_bias": biases,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if config.rope_factors is not None:
        if len(set(config.rope_factors)) > 1:
            raise ValueError("config.json can hold equal rotary factors only; give rope_parameters in `fields`")
        content["rope_scaling"] = {"rope_type": "linear", "factor": config.rope_factors[0]}
    content = {key: value for key, value in {**content, **(fields or {})}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "tokenizer.json").write_text(tiny_tokenizer(config.vocabulary).to_str(), encoding="utf-8")
    settings = {"bos_token": SPECIAL[1], "eos_token": {"content": SPECIAL[2]}, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    weights = tiny_weights(config, seed, biases) if weights is None else weights
    names = list(weights)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", {HUGGINGFACE_NAMES.stored(n): weights[n] for n in names}, dtype)
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {HUGGINGFACE_NAMES.stored(name): weights[name] for name in names[number::shards]}
        write_safetensors(folder / file, part, dtype)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32"):
    """Write f32 tensors as F32, F16 or BF16 (the format: a length, a JSON header, the data)."""
    header, parts, offset = {}, [], 0
    for name, values in tensors.items():
        data = _as_dtype(values, dtype).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [offset, offset + len(data)]}
        parts.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def interleave(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q and k (or their bias) from Hugging Face's order, i beside i + head_dim / 2, to GGUF's, 2i beside 2i + 1."""
    heads = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)


def random_blocks(random: np.random.Generator, shape: tuple[int, int], type_name: str) -> np.ndarray:
    """uint8 [rows, bytes] of a matrix of random K-quant blocks with small finite scales."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    blocks = random.integers(0, 256, (shape[0], shape[1] // block, block_bytes), np.uint8)
    for position in K_QUANTS[type_name]:
        scale = random.uniform(1e-5, 1e-4, blocks.shape[:2]).astype("<f2")
        blocks[..., position : position + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


@lru_cache
def tiny_tokenizer(vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly this many tokens (at least 259), trained on a few sentences."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=min(vocabulary, 512), special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"]
    vocab.update({f"[PAD{number}]": number for number in range(len(vocab), vocabulary)})
    tokenizer.model = BPE(vocab, [tuple(merge) for merge in model["merges"]])
    return tokenizer


@lru_cache
def sentence_piece_vocabulary(vocabulary: int) -> tuple[tuple[str, ...], tuple[float, ...], tuple[int, ...]]:
    """Tokens, scores and token types as in the vocabularies of LLaMA 1 and 2: specials, bytes, pieces, characters."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(CORPUS[:2] + CORPUS[4:], BpeTrainer(vocab_size=vocabulary - 259, show_progress=False))
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: (len(item[0]) == 1, item[1]))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(piece for piece, _ in pieces)]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    tokens += [f"[PAD{number}]" for number in range(len(tokens), vocabulary)]
    types += [5] * (vocabulary - len(types))
    scores = [0.0] * 259 + [-float(number) for number in range(vocabulary - 259)]
    return tuple(tokens), tuple(scores), tuple(types)


def _add_gpt2_tokenizer(writer: GGUFWriter, vocabulary: int, pre: str) -> dict:
    model = json.loads(tiny_tokenizer(vocabulary).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 5 if token.startswith("[PAD") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add_llama_tokenizer(writer: GGUFWriter, vocabulary: int, pre: str) -> dict:
    tokens, scores, types = sentence_piece_vocabulary(vocabulary)
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}


def _add_field(writer: GGUFWriter, key: str, value: int | float | str | bool):
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
    add(key, value)


def _as_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "BF16":
        return values.astype({"F32": "<f4", "F16": "<f2"}[dtype])
    bits = np.ascontiguousarray(values, "<f4").view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
