"""Names and shapes of the tensors that a LLaMA model of given sizes consists of.

    embedding [vocabulary, hidden]     head [vocabulary, hidden], unless tied     final_norm [hidden]
    layers.I.attention_norm, layers.I.ffn_norm [hidden]
    layers.I.q [heads * head_dim, hidden]    .k and .v [kv_heads * head_dim, hidden]    .o [hidden, heads * head_dim]
    layers.I.gate and .up [ffn, hidden]      .down [hidden, ffn]

Each layer's matrix may have a bias, NAME.bias [rows].
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from halo_mpi.errors import DamagedFileError, InputError
from halo_mpi.model.config import ModelConfig
from halo_mpi.sources.formats import NATIVE_DTYPES
from halo_mpi.sources.source import Tensor


@dataclass(frozen=True, slots=True)
class Naming:
    """How a file format calls the tensors."""

    model: dict[str, str]  # embedding, head, final_norm
    layers: str  # what stands before the layer's number
    parts: dict[str, str]  # of a layer

    def stored(self, name: str) -> str:
        """The file's name of a tensor: layers.0.q.bias -> blk.0.attn_q.bias in GGUF."""
        base = name.removesuffix(".bias")
        kind = "weight" if base == name else "bias"
        if base in self.model:
            return f"{self.model[base]}.{kind}"
        _, layer, part = base.split(".")
        return f"{self.layers}.{layer}.{self.parts[part]}.{kind}"


DERIVED = ("rope_freqs.weight", "rotary_emb.inv_freq")  # rotary frequencies, which some files carry


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one layer, without biases."""
    hidden, queries, keys = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "attention_norm": (hidden,),
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "ffn_norm": (hidden,),
        "gate": (config.ffn, hidden),
        "up": (config.ffn, hidden),
        "down": (hidden, config.ffn),
    }


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and whether it must be there, one after the other (a damaged layer count may be in the billions)."""
    yield "embedding", (config.vocabulary, config.hidden), True
    yield "final_norm", (config.hidden,), True
    if not config.tied:
        yield "head", (config.vocabulary, config.hidden), True
    for layer in range(config.layers):
        for part, shape in layer_shapes(config).items():
            yield f"layers.{layer}.{part}", shape, True
            if len(shape) == 2:
                yield f"layers.{layer}.{part}.bias", shape[:1], False


def collect_tensors(
    path: Path, config: ModelConfig, naming: Naming, find: Callable[[str], Tensor | None], present: Iterable[str]
) -> dict[str, Tensor]:
    """The model's tensors by canonical name; `find` gives the one that the file has under a name of its own.

    `present`: all names in the file. One that nothing asks for is refused, since a damaged name would otherwise be a
    tensor that the model goes without (a bias, the head, the rotary factors).

    Raises DamagedFileError for the first one that is missing, unknown or of another shape, InputError for an unknown
    format.
    """
    tensors = {}
    for name, shape, required in expected_shapes(config):
        stored = naming.stored(name)
        tensor = find(stored)
        if tensor is None and required:
            raise DamagedFileError(f"{path}: tensor {stored} is missing; download it again")
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise DamagedFileError(
                f"{tensor.path}: tensor {stored} has the shape {list(tensor.shape)}, but {list(shape)} follows from the "
                "model's configuration; download it again"
            )
        if tensor.type not in NATIVE_DTYPES:
            raise InputError(
                f"{tensor.path}: tensor {stored} is stored as {tensor.type}, which cannot be read; use a model in one of "
                f"{', '.join(NATIVE_DTYPES)}"
            )
        tensors[name] = tensor
    known = {naming.stored(name) for name in (*tensors, "head")}  # a tied model's file may repeat the embedding as its head
    for stored in present:
        if stored not in known and not stored.endswith(DERIVED):
            raise DamagedFileError(f"{path}: tensor {stored} is no part of a LLaMA model; download it again")
    for part in layer_shapes(config):
        layers = sum(f"layers.{layer}.{part}.bias" in tensors for layer in range(config.layers))
        if layers not in (0, config.layers):
            raise DamagedFileError(f"{path}: only {layers} of {config.layers} layers have a bias of {part}; download it again")
    return tensors


def even_head_dim(hidden: int, heads: int) -> int:
    """The head dimension of a model that does not state it.

    Raises InputError if the heads do not divide the hidden size.
    """
    if heads < 1 or hidden % heads:
        raise InputError(f"{heads} heads do not divide the hidden size {hidden}: the configuration is damaged")
    return hidden // heads
