"""The format of a message: a 16-byte header, little-endian, then the vectors.

    0        4          8      10     12     13     14     16
    | seq    | position | layer | rows | kind | wire | zero | vectors [rows, width] f32 or f16 ...

seq grows by one per request over the whole job, and an answer carries the seq of its request. position is the place in
the text of the first of `rows` tokens. At hidden 576 a decode message is 1168 bytes with f16, so one TCP segment.
"""

from enum import IntEnum

import numpy as np

from halo_mpi.errors import HaloError

HEADER = np.dtype(
    [("seq", "<u4"), ("position", "<u4"), ("layer", "<u2"), ("rows", "<u2"), ("kind", "u1"), ("wire", "u1"), ("zero", "<u2")]
)
PROTOCOL = 1  # ranks with another number refuse to work together
TAG = 7
WIRE_DTYPES = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2")}
WIRES = tuple(WIRE_DTYPES)


class Kind(IntEnum):
    """What a request asks for; an answer repeats the kind of its request."""

    PING = 1
    ATTENTION = 2
    FFN = 3
    STOP = 4


class ProtocolError(HaloError):
    """A message that cannot be: ranks of different versions, or a defect of this program."""


class Message:
    """A buffer that holds one message of at most `rows` vectors of `width` values, read and written in place."""

    def __init__(self, rows: int, width: int):
        self.buffer = np.zeros(HEADER.itemsize + rows * width * 4, np.uint8)
        self.header = self.buffer[: HEADER.itemsize].view(HEADER).reshape(())
        self._width = width

    def write(self, seq: int, kind: Kind, layer: int, position: int, x: np.ndarray | None, wire: str) -> np.ndarray:
        """Fill the message with x, f32 [rows, width] or None; returns the bytes to send.

        Raises HaloError if a value is too large for f16.
        """
        rows = 0 if x is None else len(x)
        self.header[...] = (seq, position, layer, rows, kind, WIRES.index(wire), 0)
        if rows:
            vectors = self._vectors(rows, WIRE_DTYPES[wire])
            with np.errstate(over="ignore"):
                vectors[...] = x
            if wire == "f16" and not np.isfinite(vectors).all():
                raise HaloError(f"a value of layer {layer} ({kind.name.lower()}) is not finite in f16; use --wire f32")
        return self.buffer[: HEADER.itemsize + rows * self._width * WIRE_DTYPES[wire].itemsize]

    def read(self) -> np.ndarray:
        """The vectors, f32 [rows, width]; with f32 on the wire a view that the next message overwrites."""
        dtype = WIRE_DTYPES[WIRES[self.header["wire"]]]
        return self._vectors(int(self.header["rows"]), dtype).astype(np.float32, copy=False)

    def _vectors(self, rows: int, dtype: np.dtype) -> np.ndarray:
        data = self.buffer[HEADER.itemsize : HEADER.itemsize + rows * self._width * dtype.itemsize]
        return data.view(dtype).reshape(rows, self._width)
