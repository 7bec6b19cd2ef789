"""The format of a message: a 16-byte header, little-endian, then the vectors.

    0     4          8       10    12     13     14     15      16
    | seq | position | layer | lag | rows | kind | wire | epoch | vectors [rows, width] ...

seq grows by one per request over the whole job, and an answer carries the seq of its request. position is the place in
the text of the first of `rows` tokens; epoch counts the texts (modulo 256): what is asked under an old one is no longer
computed. lag: the answer to any request before seq - lag is no longer of use. Vectors are f32, f16, or q8: for each row the
scales (f16) of its blocks of 32 values, then one signed byte per value. At hidden 576 a decode message is 1168 bytes with
f16 and 628 with q8, so one TCP segment.
"""

from enum import IntEnum

import numpy as np

from halo_mpi.errors import HaloError

HEADER = np.dtype(
    [("seq", "<u4"), ("position", "<u4"), ("layer", "<u2"), ("lag", "<u2"), ("rows", "u1"), ("kind", "u1"), ("wire", "u1"),
     ("epoch", "u1")]
)  # fmt: skip
PROTOCOL = 4  # ranks with another number refuse to work together
TAG = 7
WIRES = ("f32", "f16", "q8")
BLOCK = 32  # values that share a scale in q8
EPOCHS = 256
PINGS = 8  # with which the root begins


class Kind(IntEnum):
    """What a message is. Each but the last two is answered by one of the same kind."""

    PING = 1
    ATTENTION = 2
    FFN = 3
    STOP = 4
    KICK = 5  # sent while waiting: a packet behind a lost one makes TCP repair the loss
    REPLAY = 6  # inputs of attention whose K and V a worker lacks
    TRAILER = 7  # for the same reason as a kick, right behind a message
    ELSEWHERE = 8  # keeps the place of a message that goes over the other line alone


class ProtocolError(HaloError):
    """A message that cannot be: ranks of different versions, or a defect of this program."""


def vector_bytes(width: int, wire: str) -> int:
    """Bytes of one vector of `width` values."""
    return width + 2 * _blocks(width) if wire == "q8" else width * _float(wire).itemsize


class Message:
    """A buffer that holds one message of at most `rows` vectors of `width` values, read and written in place."""

    def __init__(self, rows: int, width: int):
        self.buffer = np.zeros(HEADER.itemsize + rows * width * 4, np.uint8)
        self.header = self.buffer[: HEADER.itemsize].view(HEADER).reshape(())
        self._width = width

    def write(self, seq: int, kind: Kind, layer: int = 0, position: int = 0, x: np.ndarray | None = None, wire: str = "f32",
              epoch: int = 0, lag: int = 0) -> np.ndarray:  # fmt: skip
        """Fill the message with x, f32 [rows, width] or None; returns the bytes to send.

        Raises HaloError if a value is too large for the wire format.
        """
        rows = 0 if x is None else len(x)
        self.header[...] = (seq, position, layer, min(lag, 0xFFFF), rows, kind, WIRES.index(wire), epoch)
        size = rows * vector_bytes(self._width, wire)
        data = self.buffer[HEADER.itemsize : HEADER.itemsize + size]
        if rows:
            with np.errstate(over="ignore", invalid="ignore"):
                fits = _write_q8(data, x) if wire == "q8" else _write_float(data, x, _float(wire))
            if not fits:
                raise HaloError(f"a value of layer {layer} ({kind.name.lower()}) is not finite in {wire}; use --wire f32")
        return self.buffer[: HEADER.itemsize + size]

    def read(self) -> np.ndarray:
        """The vectors, f32 [rows, width]; with f32 on the wire a view that the next message overwrites."""
        rows, wire = int(self.header["rows"]), WIRES[self.header["wire"]]
        data = self.buffer[HEADER.itemsize : HEADER.itemsize + rows * vector_bytes(self._width, wire)]
        if wire == "q8":
            return _read_q8(data.reshape(rows, -1), self._width)
        return data.view(_float(wire)).reshape(rows, self._width).astype(np.float32, copy=False)


def _float(wire: str) -> np.dtype:
    return np.dtype("<f4" if wire == "f32" else "<f2")


def _write_float(data: np.ndarray, x: np.ndarray, dtype: np.dtype) -> bool:
    vectors = data.view(dtype).reshape(x.shape)
    vectors[...] = x
    return dtype.itemsize == 4 or bool(np.isfinite(vectors).all())


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


def _write_q8(data: np.ndarray, x: np.ndarray) -> bool:
    rows, width = x.shape
    blocks = _blocks(width)
    if width % BLOCK:
        x = np.pad(x, ((0, 0), (0, blocks * BLOCK - width)))
    x = x.reshape(rows, blocks, BLOCK)
    scales = (np.abs(x).max(-1) / 127).astype("<f2")
    divisors = np.where(scales > 0, scales, 1).astype(np.float32)
    codes = np.rint(x / divisors[..., None]).clip(-127, 127).astype(np.int8)
    table = data.reshape(rows, -1)
    table[:, : 2 * blocks] = scales.view(np.uint8)
    table[:, 2 * blocks :] = codes.reshape(rows, -1)[:, :width].view(np.uint8)
    return bool(np.isfinite(scales).all())


def _read_q8(table: np.ndarray, width: int) -> np.ndarray:
    rows, blocks = len(table), _blocks(width)
    scales = np.ascontiguousarray(table[:, : 2 * blocks]).view("<f2").astype(np.float32)
    codes = table[:, 2 * blocks :].view(np.int8).astype(np.float32)
    if width % BLOCK == 0:
        return (codes.reshape(rows, blocks, BLOCK) * scales[..., None]).reshape(rows, width)
    return codes * np.repeat(scales, BLOCK, axis=1)[:, :width]
