"""What a record is: a few named matrices, encoded and laid out one after the other in one contiguous run of bytes.

    record    | matrix 0 | pad | matrix 1 | pad | ...      each matrix begins at a multiple of 64 bytes

A table is a grid of records of one layout, [layers, entries]. It is stored in HDF5 as a group of its name:

    NAME/records   uint8 [layers, entries, record bytes], one HDF5 chunk per record, no filter: one read loads it
    NAME/crc32     uint32 [layers, entries], of each record's bytes
    NAME/index     int32 [entries], the entry's number in the whole model (a shard holds only some)
    NAME           attribute `layout`: the matrices' names, shapes and dtypes, as JSON
"""

import hashlib
import json
from dataclasses import dataclass

import h5py
import numpy as np

from halo_mpi.store.encoding import BLOCK, Blocks, decode, decode_blocks, encode, encoded_bytes

FORMAT = 1  # of the files; another number cannot be read
ALIGNMENT = 64  # bytes; a cache line, and the widest vector register


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of a record."""

    name: str
    rows: int
    columns: int
    dtype: str


class RecordLayout:
    """Names, shapes, encodings and byte offsets of the matrices of a record."""

    def __init__(self, parts: list[Part]):
        self.parts = {part.name: part for part in parts}
        self.offsets: dict[str, int] = {}
        end = 0
        for part in parts:
            self.offsets[part.name] = end
            size = encoded_bytes(part.rows, part.columns, part.dtype)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.nbytes = end

    def pack(self, matrices: dict[str, np.ndarray | Blocks]) -> np.ndarray:
        """The record's bytes, uint8 [nbytes]. A matrix with fewer rows or columns than its part is padded with zeros."""
        record = np.zeros(self.nbytes, np.uint8)
        for name, part in self.parts.items():
            matrix = _padded(matrices[name], part)
            data = np.frombuffer(encode(matrix, part.dtype), np.uint8)
            record[self.offsets[name] : self.offsets[name] + data.size] = data
        return record

    def unpack(self, record: np.ndarray, name: str) -> np.ndarray:
        """One matrix of a record, f32 [rows, columns]; for the f32 encoding a view of the record."""
        part = self.parts[name]
        return decode(self.bytes_of(record, name), part.rows, part.columns, part.dtype)

    def bytes_of(self, record: np.ndarray, name: str) -> np.ndarray:
        """One matrix of a record as it is stored, a view, uint8."""
        part, start = self.parts[name], self.offsets[name]
        return record[start : start + encoded_bytes(part.rows, part.columns, part.dtype)]

    def stored(self, record: np.ndarray, name: str) -> np.ndarray | Blocks:
        """The same with quantized matrices as the blocks that they are, so that `pack` puts them back unchanged."""
        part = self.parts[name]
        if part.dtype not in ("int4", "int8"):
            return self.unpack(record, name)
        return decode_blocks(self.bytes_of(record, name), part.rows, part.columns, part.dtype)

    def to_json(self) -> str:
        return json.dumps([[part.name, part.rows, part.columns, part.dtype] for part in self.parts.values()])

    @classmethod
    def from_json(cls, text: str) -> "RecordLayout":
        return cls([Part(*fields) for fields in json.loads(text)])


def content_digest(file: h5py.File) -> str:
    """sha256 (hex) over the metadata and every table's layout, index and checksums, and so over all content."""
    digest = hashlib.sha256(file["meta"][()].tobytes())
    for name in sorted(key for key in file if key != "meta"):
        group = file[name]
        digest.update(name.encode() + group.attrs["layout"].tobytes() + repr(group["records"].shape).encode())
        digest.update(group["index"][()].tobytes())
        digest.update(group["crc32"][()].tobytes())
    return digest.hexdigest()


def _padded(matrix: np.ndarray | Blocks, part: Part) -> np.ndarray | Blocks:
    if matrix.shape == (part.rows, part.columns):
        return matrix
    if isinstance(matrix, Blocks):
        columns = -(-part.columns // BLOCK) * BLOCK
        margin = ((0, part.rows - matrix.shape[0]), (0, columns - matrix.shape[1]))
        planes = ((0, margin[0][1]), (0, margin[1][1] // BLOCK))
        minimum = None if matrix.minimum is None else np.pad(matrix.minimum, planes)
        return Blocks(np.pad(matrix.codes, margin), np.pad(matrix.scale, planes), minimum)
    padded = np.zeros((part.rows, part.columns), np.float32)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded
