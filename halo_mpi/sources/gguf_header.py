"""The header of a GGUF file: metadata and where the tensors lie.

The gguf package's reader trusts every length in the file: a flipped bit there makes it loop or allocate without end. It
also takes 1.7 s and 160 MB for the 98 thousand strings of SmolLM2's vocabulary, this walk 0.06 s and 11 MB. Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from halo_mpi.errors import DamagedFileError, InputError

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_KEYS = MAX_TENSORS = 1 << 16  # LLaMA 405B has 1138 tensors
MAX_ARRAY = 1 << 22  # entries; LLaMA 3 has 280 thousand merges
MAX_DIMENSIONS = 4

SCALARS: dict[int, str] = {  # codes of struct, which NumPy understands as well
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<B",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
REQUIRED = object()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Type, shape (outermost dimension first) and place in the file of a tensor."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the weights. Values of metadata are int, float, bool, str, list of str or numeric ndarray."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """A value of metadata, or the default if there is none.

        Raises DamagedFileError if it is of another kind (whole numbers pass as float), or missing without a default.
        """
        value = self.metadata.get(key, default)
        if value is REQUIRED:
            raise DamagedFileError(f"{self.path}: the metadata {key} is missing; download it again")
        if kind is float and type(value) is int:
            value = float(value)
        if value is not default and type(value) is not kind:
            found = type(value).__name__
            raise DamagedFileError(f"{self.path}: the metadata {key} is of type {found}, not {kind.__name__}; download it again")
        return value


def read_header(path: Path) -> Header:
    """Read and check everything before the weights, and that all weights lie inside the file.

    Raises DamagedFileError, and InputError for a version or byte order that cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise DamagedFileError(f"{path}: does not begin as a GGUF file does; download it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            walk = _Walk(path, data)
            metadata, tensors = walk.header()
    return Header(path, metadata, tensors)


class _Walk:
    """A position in the file that never leaves it."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path = path
        self._data = data
        self._position = 4  # after the magic

    def header(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        version = self._number("<I")
        if version and version & 0xFFFF == 0:
            raise InputError(f"{self._path}: is a big-endian GGUF file; use the little-endian one of the same model")
        if version not in VERSIONS:
            raise InputError(f"{self._path}: has GGUF version {version}, only 2 and 3 can be read; convert the model again")
        tensor_count, key_count = self._number("<Q"), self._number("<Q")
        if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
            raise self._damaged(f"its header counts {tensor_count} tensors and {key_count} keys")
        metadata = {}
        for _ in range(key_count):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"the metadata {key!r} is there twice")
            metadata[key] = self._value(key, self._number("<I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        return metadata, self._placed(infos, metadata.get("general.alignment", DEFAULT_ALIGNMENT))

    def _damaged(self, what: str) -> DamagedFileError:
        return DamagedFileError(f"{self._path}: {what}; the file is damaged, download it again")

    def _claim(self, size: int) -> int:
        """Move past `size` bytes and return where they begin."""
        start = self._position
        if size > len(self._data) - start:
            raise self._damaged(f"ends within its header at byte {start}")
        self._position = start + size
        return start

    def _number(self, layout: str) -> Any:
        start = self._claim(struct.calcsize(layout))
        return struct.unpack_from(layout, self._data, start)[0]

    def _string(self) -> str:
        length = self._number("<Q")
        start = self._claim(length)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError:
            raise self._damaged(f"the text at byte {start} is not valid UTF-8") from None

    def _value(self, key: str, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind == GGUFValueType.ARRAY:
            return self._array(key)
        if kind not in SCALARS:
            raise self._damaged(f"the metadata {key!r} has the unknown type {kind}")
        value = self._number(SCALARS[kind])
        if kind == GGUFValueType.BOOL:
            if value > 1:
                raise self._damaged(f"the metadata {key!r} is {value}, neither true nor false")
            return bool(value)
        return value

    def _array(self, key: str) -> list[str] | np.ndarray:
        kind, length = self._number("<I"), self._number("<Q")
        if length > MAX_ARRAY:
            raise self._damaged(f"the metadata {key!r} claims {length} entries")
        if kind == GGUFValueType.STRING:
            return [self._string() for _ in range(length)]
        if kind not in SCALARS:
            raise self._damaged(f"the metadata {key!r} is an array of type {kind}, which is not supported")
        dtype = np.dtype(SCALARS[kind])
        start = self._claim(length * dtype.itemsize)
        return np.frombuffer(self._data[start : self._position], dtype)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name!r} claims {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        return name, shape, self._number("<I"), self._number("<Q")

    def _placed(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: Any) -> dict[str, TensorInfo]:
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"the alignment {alignment!r} is not a power of two")
        begin = -(-self._position // alignment) * alignment
        end = begin
        tensors = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise self._damaged(f"tensor {name!r} is there twice")
            try:
                kind = GGMLQuantizationType(kind)
            except ValueError:
                raise self._damaged(f"tensor {name!r} has the unknown type {kind}") from None
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if 0 in shape or shape[-1] % block:
                raise self._damaged(f"tensor {name!r} of type {kind.name} has the impossible shape {list(shape)}")
            if begin + offset != end:  # llama.cpp as well wants them one after the other
                raise self._damaged(f"tensor {name!r} begins at byte {begin + offset}, not {end}")
            tensor = TensorInfo(kind, shape, end, math.prod(shape) // block * block_bytes)
            if end + tensor.bytes > len(self._data):
                raise self._damaged(f"ends within its tensor {name!r}")
            tensors[name] = tensor
            end = -(-(end + tensor.bytes) // alignment) * alignment
        return tensors
