"""Models in Hugging Face's folders: config.json, safetensors and tokenizer.json."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors import safe_open

from halo_mpi.errors import DamagedFileError, InputError
from halo_mpi.sources.expected import Naming, collect_tensors
from halo_mpi.sources.huggingface_config import read_config, read_json, rope_factors
from halo_mpi.sources.huggingface_tokenizer import tokenizer_files
from halo_mpi.sources.source import Source, Tensor, nearest_dtype

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt")
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
NAMING = Naming(
    model={"embedding": "model.embed_tokens", "head": "lm_head", "final_norm": "model.norm"},
    layers="model.layers",
    parts={
        "attention_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
)


def open_huggingface(folder: Path) -> Source:
    """Open a folder with a model of the LLaMA architecture.

    Raises InputError for other architectures, what is not supported of this one and missing files, DamagedFileError for
    damage.
    """
    if not (folder / "config.json").is_file():
        files = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))[:3])
        hint = f"; give the path of the .gguf file ({files})" if files else ", so it is no Hugging Face model"
        raise InputError(f"{folder}: the folder has no config.json{hint}")
    fields, config = read_config(folder)
    stored = _stored_tensors(folder)
    tensors = collect_tensors(folder, config, NAMING, stored.get, stored)
    config = dataclasses.replace(config, rope_factors=rope_factors(folder, fields, config))
    types = Counter(tensor.type for tensor in stored.values())
    return Source(
        config=config,
        tokenizer=tokenizer_files(folder, fields, config.vocabulary),
        summary={"format": "Hugging Face", "file": folder.resolve().name, "tensor_types": dict(types.most_common())},
        native_dtype=nearest_dtype(tensors),
        tensors=tensors,
    )


def _stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files by their names there."""
    if (folder / WEIGHTS).is_file():
        return _read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        if any(path for pattern in PICKLES for path in folder.glob(pattern)):
            raise InputError(
                f"{folder}: has its weights in pickle files, which are not read as they can run any program; "
                "convert them to safetensors"
            )
        raise InputError(f"{folder}: has neither {WEIGHTS} nor {INDEX}; download the model again")
    shard_of = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise DamagedFileError(f"{folder / INDEX}: does not say which file each weight is in; download it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard:
            raise DamagedFileError(f"{folder / INDEX}: names the file {shard!r} outside of the folder; download it again")
        if not (folder / shard).is_file():
            raise InputError(f"{folder / shard}: the file is missing, but {INDEX} names it; download it again")
        content = _read_safetensors(folder / shard)
        tensors.update((name, tensor) for name, tensor in content.items() if shard_of.get(name) == shard)
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="np"):  # checks the header: lengths, overlaps, gaps
            pass
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
    except OSError:
        raise
    except Exception as error:
        raise DamagedFileError(f"{path}: is not a whole safetensors file ({error}); download it again") from error
    content = np.memmap(path, np.uint8, mode="r")[8 + header_bytes :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        rows = shape[0] if len(shape) == 2 else 1
        data = content[start:stop].reshape(rows, -1) if start < stop else content[:0]
        tensors[name] = Tensor(path, name, entry["dtype"], shape, data, block_bytes=ITEM_BYTES.get(entry["dtype"], 0))
    return tensors
