"""The format of a message: a 16-byte header, little-endian, then the vectors.

    0     4          8     10      11     12     13     14      15     16
    | seq | position | lag | layer | rows | kind | wire | epoch | plan | vectors [rows, width] ...

seq grows by one per request over the whole job, and an answer carries the seq of its request. position is the place in
the text of the first of `rows` tokens; epoch counts the texts (modulo 256): what is asked under an old one is no longer
computed. plan (modulo 256) tells by which of the plans that a worker was sent its part is counted. lag: the answer to any request before
seq - lag is no longer of use; in an answer, how long it took to compute, in `TOOK_S`; position: in the answer to a PROBE, how long the
worker computed beside that. Vectors are f32, f16, or q8: for each row the scales (f16) of its blocks of 32 values, then one signed byte per
value; or plain bytes. At hidden 576 a decode message is 1168 bytes with f16 and 628 with q8, so one TCP segment.
"""

from enum import IntEnum

import numpy as np

from halo_mpi.errors import HaloError

HEADER = np.dtype(
    [("seq", "<u4"), ("position", "<u4"), ("lag", "<u2"), ("layer", "u1"), ("rows", "u1"), ("kind", "u1"), ("wire", "u1"),
     ("epoch", "u1"), ("plan", "u1")]
)  # fmt: skip
PROTOCOL = 10  # ranks with another number refuse to work together
TAG = 7
WIRES = ("f32", "f16", "q8")
BYTES = "bytes"  # of text, one per value
FORMATS = (*WIRES, BYTES)
BLOCK = 32  # values that share a scale in q8
EPOCHS = PLANS = 256
TOOK_S, LONGEST_TOOK = 1e-5, 0xFFFF  # the unit in which an answer tells how long it took; so many or more: too long to tell
PINGS = 8  # with which the root begins
TEXT_ROWS = 64  # that a text may take


class Kind(IntEnum):
    """What a message is. Each but TRAILER, ELSEWHERE, FAILURE and WIDER is answered by one of the same kind."""

    PING = 1
    ATTENTION = 2
    FFN = 3
    STOP = 4  # there is nothing more to do; the answer has a worker's last words. And again: leave; answered by its last message
    KICK = 5  # sent while waiting: a packet behind a lost one makes TCP repair the loss
    REPLAY = 6  # inputs of attention whose K and V a worker lacks
    TRAILER = 7  # for the same reason as a kick, right behind a message
    ELSEWHERE = 8  # keeps the place of a message that goes over the other line alone
    PLAN = 9  # which heads and groups a worker will have; answered when they are loaded
    REFILL = 10  # inputs of attention for the cache of heads that it will have
    PROBE = 11  # how fast is a worker that has nothing to do
    FAILURE = 12  # from a worker: what keeps it from doing its part from now on, in words
    HEAD = 13  # logits of a worker's rows of the head
    WIDER = 14  # what follows comes over all lines


class Echo(IntEnum):
    """What a PING wants beside an answer; stands where others have their lag."""

    PLAIN = 0
    WORK = 1  # computing, before the answer
    LAST = 2  # nothing: there are no more of them


class RangeError(HaloError):
    """A value that the format on the wire does not hold."""


class ProtocolError(HaloError):
    """A message that cannot be: ranks of different versions, or a defect of this program."""


def vector_bytes(width: int, wire: str) -> int:
    """Bytes of one vector of `width` values."""
    if wire == BYTES:
        return width
    return width + 2 * _blocks(width) if wire == "q8" else width * _float(wire).itemsize


class Message:
    """A buffer that holds one message of at most `rows` vectors of `width` values, read and written in place."""

    def __init__(self, rows: int, width: int):
        self.buffer = np.zeros(HEADER.itemsize + rows * width * 4, np.uint8)
        self.header = self.buffer[: HEADER.itemsize].view(HEADER).reshape(())
        self._width = width

    def write(self, seq: int, kind: Kind, layer: int = 0, position: int = 0, x: np.ndarray | None = None, wire: str = "f32",
              epoch: int = 0, lag: int = 0, plan: int = 0) -> np.ndarray:  # fmt: skip
        """Fill the message with x, f32 [rows, width] (u8 if it is bytes) or None; returns the bytes to send.

        Raises HaloError if a value is too large for the wire format.
        """
        rows = 0 if x is None else len(x)
        self.header[...] = (seq, position, min(lag, LONGEST_TOOK), layer, rows, kind, FORMATS.index(wire), epoch, plan)
        size = rows * vector_bytes(self._width, wire)
        data = self.buffer[HEADER.itemsize : HEADER.itemsize + size]
        if rows and wire == BYTES:
            data[:] = x.reshape(-1)
        elif rows:
            with np.errstate(over="ignore", invalid="ignore"):
                fits = _write_q8(data, x) if wire == "q8" else _write_float(data, x, _float(wire))
            if not fits:
                raise RangeError(f"a value of layer {layer} ({kind.name.lower()}) is not finite in {wire}; use --wire f32")
        return self.buffer[: HEADER.itemsize + size]

    def read(self) -> np.ndarray:
        """The vectors, f32 [rows, width], or u8 if they are bytes; with f32 on the wire a view that the next message overwrites."""
        rows, wire = int(self.header["rows"]), FORMATS[self.header["wire"]]
        if not rows:
            return np.empty((0, self._width), np.float32)
        data = self.buffer[HEADER.itemsize : HEADER.itemsize + rows * vector_bytes(self._width, wire)]
        if wire == BYTES:
            return data.reshape(rows, self._width).copy()
        if wire == "q8":
            return _read_q8(data.reshape(rows, -1), self._width)
        return data.view(_float(wire)).reshape(rows, self._width).astype(np.float32, copy=False)


def text_rows(text: str, width: int) -> np.ndarray:
    """A text as u8 [rows, width], spaces at its end, and cut after `TEXT_ROWS`."""
    data = text.encode()[: TEXT_ROWS * width]
    rows = max(1, -(-len(data) // width))
    return np.frombuffer(data.ljust(rows * width), np.uint8).reshape(rows, width)


def rows_text(rows: np.ndarray) -> str:
    """The text of u8 [rows, width]."""
    return rows.tobytes().decode(errors="replace").rstrip()


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
