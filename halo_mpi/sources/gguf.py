"""Models in llama.cpp's file format, GGUF."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES

from halo_mpi.errors import DamagedFileError, HaloError, InputError
from halo_mpi.model.config import ModelConfig
from halo_mpi.sources.expected import Naming, collect_tensors, even_head_dim
from halo_mpi.sources.gguf_header import Header, read_header
from halo_mpi.sources.gguf_tokenizer import tokenizer_files
from halo_mpi.sources.source import Source, Tensor, nearest_dtype

ROPE_FACTORS = "rope_freqs.weight"
NAMING = Naming(
    model={"embedding": "token_embd", "head": "output", "final_norm": "output_norm"},
    layers="blk",
    parts={
        "attention_norm": "attn_norm",
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output",
        "ffn_norm": "ffn_norm",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    },
)


def open_gguf(path: Path) -> Source:
    """Open a GGUF file of the LLaMA architecture.

    Raises InputError for other architectures and what is not supported of this one, DamagedFileError for damage.
    """
    header = read_header(path)
    config = _config(header)
    content = np.memmap(path, np.uint8, mode="r")

    def find(name: str) -> Tensor | None:
        info = header.tensors.get(name)
        if info is None:
            return None
        rows = info.shape[0] if len(info.shape) == 2 else 1
        data = content[info.offset : info.offset + info.bytes].reshape(rows, -1)
        return Tensor(path, name, info.type.name, info.shape, data, *GGML_QUANT_SIZES[info.type])

    tensors = collect_tensors(path, config, NAMING, find, header.tensors)
    config = dataclasses.replace(config, rope_factors=_rope_factors(header, config, find(ROPE_FACTORS)))
    types = Counter(info.type.name for info in header.tensors.values())
    return Source(
        config=config,
        tokenizer=tokenizer_files(header, config.vocabulary),
        summary={"format": "GGUF", "file": path.name, "tensor_types": dict(types.most_common())},
        native_dtype=nearest_dtype(tensors),
        tensors=tensors,
        interleaved=True,
    )


def _config(header: Header) -> ModelConfig:
    """The model's sizes, rotary factors still left out."""
    path = header.path
    architecture = header.get("general.architecture", str)
    if architecture != "llama":
        raise InputError(f"{path}: is a model of the architecture {architecture!r}; only the LLaMA architecture is supported")
    if header.get("split.count", int, 1) > 1:
        raise InputError(f"{path}: is one part of a split model; join the parts with llama-gguf-split --merge")
    if header.get("llama.expert_count", int, 0) > 0:
        raise InputError(f"{path}: is a mixture of experts, which is not supported; use a dense LLaMA model")
    embedding = header.tensors.get(NAMING.stored("embedding"))
    if embedding is None:
        raise DamagedFileError(f"{path}: tensor {NAMING.stored('embedding')} is missing; download it again")
    hidden = header.get("llama.embedding_length", int)
    heads = header.get("llama.attention.head_count", int)
    try:
        head_dim = header.get("llama.attention.key_length", int, None) or even_head_dim(hidden, heads)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if header.get(key, int, head_dim) != head_dim:
                raise InputError(f"{key} differs from the head dimension {head_dim}, which is not supported")
        return ModelConfig(
            name=" ".join(header.get("general.name", str, "").split()) or path.stem,
            layers=header.get("llama.block_count", int),
            hidden=hidden,
            heads=heads,
            kv_heads=header.get("llama.attention.head_count_kv", int, heads),
            head_dim=head_dim,
            ffn=header.get("llama.feed_forward_length", int),
            vocabulary=embedding.shape[0],
            context=header.get("llama.context_length", int),
            norm_eps=header.get("llama.attention.layer_norm_rms_epsilon", float),
            rope_theta=header.get("llama.rope.freq_base", float, 10000.0),
            tied=NAMING.stored("head") not in header.tensors,
        )
    except DamagedFileError:
        raise
    except HaloError as error:
        raise InputError(f"{path}: {error}") from error


def _rope_factors(header: Header, config: ModelConfig, stored: Tensor | None) -> tuple[float, ...] | None:
    """The stored factors times that of linear scaling. As in llama.cpp, scaling of unstated type is linear."""
    path, half = header.path, config.head_dim // 2
    scaling = header.get("llama.rope.scaling.type", str, "linear")
    if scaling not in ("none", "linear"):
        raise InputError(f"{path}: rotary scaling of type {scaling!r} is not supported; use a model with linear or no scaling")
    factors = np.ones(half)
    if scaling == "linear":
        factors *= header.get("llama.rope.scaling.factor", float, 0.0) or 1.0
    if stored is not None:
        if stored.shape != (half,) or stored.type != "F32":
            raise DamagedFileError(
                f"{path}: tensor {stored.name} is {stored.type} {list(stored.shape)}, not F32 {[half]}; download it again"
            )
        factors *= stored.data.view("<f4")[0]
    if not np.isfinite(factors).all() or (factors <= 0).any():
        raise DamagedFileError(f"{path}: its rotary frequency factors are not all positive numbers; download it again")
    return None if (factors == 1).all() else tuple(factors.tolist())
