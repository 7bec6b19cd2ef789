"""The configuration of a Hugging Face model: config.json, as transformers 4 and 5 write it."""

import json
from pathlib import Path
from typing import Any

from halo_mpi.errors import DamagedFileError, HaloError, InputError
from halo_mpi.model.config import ModelConfig, llama3_rope_factors
from halo_mpi.sources.expected import even_head_dim

REQUIRED = object()


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises DamagedFileError if there is none.
    """
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: is not valid JSON ({error}); download it again") from error
    if not isinstance(fields, dict):
        raise DamagedFileError(f"{path}: is not a JSON object; download it again")
    return fields


def read_config(folder: Path) -> tuple[dict, ModelConfig]:
    """The fields of config.json, and the sizes from it, rotary factors still left out.

    Raises InputError for models that are not supported, DamagedFileError for fields that are missing or of wrong types.
    """
    path = folder / "config.json"
    fields = read_json(path)
    _check_architecture(path, fields)
    hidden = _get(path, fields, "hidden_size", int)
    heads = _get(path, fields, "num_attention_heads", int)
    rope = _rope(path, fields)
    try:
        return fields, ModelConfig(
            name=folder.resolve().name,
            layers=_get(path, fields, "num_hidden_layers", int),
            hidden=hidden,
            heads=heads,
            kv_heads=_get(path, fields, "num_key_value_heads", int, heads),
            head_dim=_get(path, fields, "head_dim", int, None) or even_head_dim(hidden, heads),
            ffn=_get(path, fields, "intermediate_size", int),
            vocabulary=_get(path, fields, "vocab_size", int),
            context=_get(path, fields, "max_position_embeddings", int, 2048),
            norm_eps=_get(path, fields, "rms_norm_eps", float, 1e-6),
            rope_theta=_get(path, rope, "rope_theta", float, None) or _get(path, fields, "rope_theta", float, 10000.0),
            tied=_get(path, fields, "tie_word_embeddings", bool, False),
        )
    except DamagedFileError:
        raise
    except HaloError as error:
        raise InputError(f"{path}: {error}") from error


def rope_factors(folder: Path, fields: dict, config: ModelConfig) -> tuple[float, ...] | None:
    """The divisors of the rotary frequencies that config.json asks for.

    Raises InputError for kinds of scaling that are not supported, DamagedFileError for values that make no sense.
    """
    path = folder / "config.json"
    rope = _rope(path, fields)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("default", "none"):
        return None
    if kind not in ("linear", "llama3"):
        raise InputError(f"{path}: rotary scaling of type {kind!r} is not supported; use a model with linear, llama3 or none")
    factor = _positive(path, rope, "factor")
    if kind == "linear":
        return None if factor == 1 else (factor,) * (config.head_dim // 2)
    low, high = _positive(path, rope, "low_freq_factor"), _positive(path, rope, "high_freq_factor")
    original_context = _get(path, rope, "original_max_position_embeddings", int)
    if not low < high or original_context < 1:
        raise DamagedFileError(f"{path}: the values of its rotary scaling contradict each other; download it again")
    return llama3_rope_factors(config.head_dim, config.rope_theta, factor, low, high, original_context)


def _check_architecture(path: Path, fields: dict):
    kind = fields.get("model_type") or fields.get("architectures")
    if kind not in ("llama", ["LlamaForCausalLM"]):
        raise InputError(f"{path}: is a model of the type {kind!r}; only the LLaMA architecture is supported")
    if fields.get("quantization_config"):
        raise InputError(f"{path}: the model is quantized; use its original in f32, f16 or bf16, or a GGUF file")
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise InputError(f"{path}: the activation {activation!r} is not supported; LLaMA models have silu")
    if fields.get("partial_rotary_factor") not in (None, 1):
        raise InputError(f"{path}: rotary embeddings of a part of the head are not supported")


def _rope(path: Path, fields: dict) -> dict:
    """The fields that describe rotary embeddings: `rope_parameters` since transformers 5, `rope_scaling` before."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise DamagedFileError(f"{path}: its rotary scaling is not an object; download it again")
    return rope


def _get(path: Path, fields: dict, key: str, kind: type, default: Any = REQUIRED) -> Any:
    value = fields.get(key)
    if value is None:
        if default is REQUIRED:
            raise DamagedFileError(f"{path}: {key} is missing; download it again")
        return default
    if kind is float and type(value) is int and abs(value) < 1 << 63:
        value = float(value)
    if type(value) is not kind:
        raise DamagedFileError(f"{path}: {key} is {str(value)[:40]!r}, not {kind.__name__}; download it again")
    return value


def _positive(path: Path, fields: dict, key: str) -> float:
    value = _get(path, fields, key, float)
    if not 0 < value < float("inf"):
        raise DamagedFileError(f"{path}: {key} is {value}, not a positive number; download it again")
    return value
