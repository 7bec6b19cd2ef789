"""A model file of another program, as a table of tensors in the file's own bytes."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halo_mpi.errors import DamagedFileError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.tokenizer import TokenizerFiles
from halo_mpi.sources.formats import NATIVE_DTYPES, decode
from halo_mpi.store.encoding import Blocks


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies: `data` is uint8 [rows, bytes of a row], mapped from the file; a vector is one row.

    `block` weights that follow one another in a row take `block_bytes` bytes.
    """

    path: Path
    name: str  # in the file
    type: str  # a key of NATIVE_DTYPES
    shape: tuple[int, ...]
    data: np.ndarray
    block: int = 1
    block_bytes: int = 1


@dataclass(slots=True)
class Source:
    """A model of another program, under the names of `expected.py`. Matrices are [out, in].

    `native_dtype` is the storage dtype nearest to that of most layer weights. `interleaved` says that the rows of q and k
    pair 2i with 2i + 1 within each head, as in GGUF; callers always get them in Hugging Face's order, i with
    i + head_dim / 2.
    """

    config: ModelConfig
    tokenizer: TokenizerFiles
    summary: dict
    native_dtype: str
    tensors: dict[str, Tensor]
    interleaved: bool = False

    def rows(self, name: str, start: int, stop: int) -> np.ndarray | Blocks:
        """f32 [stop - start, columns], or blocks of the same shape where the file holds such.

        Raises ValueError for q and k if the rows are not whole heads, DamagedFileError for weights that are not finite.
        """
        tensor = self.tensors[name]
        rows, columns = tensor.shape
        _check_range(name, start, stop, rows)
        return self._in_order(name, _decode(tensor, tensor.data[start:stop], 0, columns))

    def columns(self, name: str, start: int, stop: int) -> np.ndarray | Blocks:
        """f32 [rows, stop - start], or blocks of the same shape where the file holds such and the range is whole blocks.

        Raises DamagedFileError for weights that are not finite.
        """
        tensor = self.tensors[name]
        _check_range(name, start, stop, tensor.shape[1])
        first, last = start // tensor.block, -(-stop // tensor.block)  # blocks
        data = tensor.data[:, first * tensor.block_bytes : last * tensor.block_bytes]
        offset = first * tensor.block
        return self._in_order(name, _decode(tensor, data, start - offset, stop - offset))

    def vector(self, name: str) -> np.ndarray | None:
        """f32 [n] of a norm or bias, None for a bias that the model does not have.

        Raises DamagedFileError for values that are not finite.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        values = _decode(tensor, tensor.data, 0, tensor.shape[0])
        values = values.dequantize()[0] if isinstance(values, Blocks) else values[0]
        order = self._head_order(name, values.size)
        return values if order is None else values[order]

    def close(self):
        """Let go of the mapped files."""
        self.tensors = {}

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exception):
        self.close()

    def _in_order(self, name: str, values: np.ndarray | Blocks) -> np.ndarray | Blocks:
        order = self._head_order(name, values.shape[0])
        if order is None:
            return values
        if isinstance(values, Blocks):
            return values.take(order, 0)
        return values[order]

    def _head_order(self, name: str, rows: int) -> np.ndarray | None:
        """Where the rows of whole heads of q and k lie in the file, None for what lies in order."""
        if not self.interleaved or not name.removesuffix(".bias").endswith((".q", ".k")):
            return None
        head_dim = self.config.head_dim
        if rows % head_dim:
            raise ValueError(f"{name}: {rows} rows are not whole heads of {head_dim}")
        return np.arange(rows).reshape(-1, head_dim // 2, 2).transpose(0, 2, 1).ravel()


def nearest_dtype(tensors: dict[str, Tensor]) -> str:
    """The storage dtype nearest to what most weights of the layers' matrices have."""
    weights: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if name.startswith("layers.") and len(tensor.shape) == 2:
            weights[NATIVE_DTYPES[tensor.type]] += tensor.shape[0] * tensor.shape[1]
    return weights.most_common(1)[0][0]


def _check_range(name: str, start: int, stop: int, size: int):
    if not 0 <= start < stop <= size:
        raise ValueError(f"{name}: the range {start}:{stop} is empty or outside 0:{size}")


def _decode(tensor: Tensor, data: np.ndarray, start: int, stop: int) -> np.ndarray | Blocks:
    values = decode(data, tensor.type, start, stop)
    planes = (values.scale, values.minimum) if isinstance(values, Blocks) else (values,)
    if not all(np.isfinite(plane).all() for plane in planes if plane is not None):
        raise DamagedFileError(f"{tensor.path}: tensor {tensor.name} holds NaN or infinity; download or convert it again")
    return values
