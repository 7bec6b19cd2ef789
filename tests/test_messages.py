"""The format of messages: what each wire format keeps, and how long a message is."""

import numpy as np
import pytest

from halo_mpi.errors import HaloError
from halo_mpi.wire.messages import BLOCK, HEADER, TEXT_ROWS, WIRES, Kind, Message, rows_text, text_rows, vector_bytes

pytestmark = pytest.mark.timeout(30)
WIDTHS = (1, 31, 32, 33, 100, 576)


def vectors(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """f32 [rows, width], each of them of another size."""
    random = np.random.default_rng(seed)
    return (random.standard_normal((rows, width)) * 10.0 ** random.uniform(-1, 2, (rows, 1))).astype(np.float32)


def sent(x: np.ndarray, wire: str, rows: int | None = None) -> np.ndarray:
    """What the receiver reads; its buffer is another one, of `rows`."""
    sender, receiver = Message(rows or len(x), x.shape[1]), Message(rows or len(x), x.shape[1])
    data = sender.write(1, Kind.FFN, x=x, wire=wire)
    receiver.buffer[: len(data)] = data
    return receiver.read()


def scales(x: np.ndarray) -> np.ndarray:
    """f32 [rows, width]: the scale that q8 should give to each value's block."""
    blocks = [x[:, start : start + BLOCK] for start in range(0, x.shape[1], BLOCK)]
    steps = [np.abs(block).max(1, keepdims=True) / 127 for block in blocks]
    return np.concatenate([np.broadcast_to(step, block.shape) for step, block in zip(steps, blocks)], 1)


@pytest.mark.parametrize("width", WIDTHS)
def test_f32_arrives_as_it_was_sent(width):
    x = vectors(3, width)
    assert np.array_equal(sent(x, "f32"), x)


@pytest.mark.parametrize("width", WIDTHS)
def test_f16_arrives_rounded(width):
    x = vectors(3, width)
    assert np.array_equal(sent(x, "f16"), x.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("width", WIDTHS)
def test_q8_is_off_by_at_most_half_a_scale_of_the_block(width):
    x = vectors(64, width)
    error = np.abs(sent(x, "q8") - x)
    assert (error <= 0.5 * scales(x) * 1.002).all()  # scales are rounded to f16
    assert width == 1 or error.max() > 0


def test_q8_blocks_do_not_disturb_each_other():
    x = np.zeros((2, 3 * BLOCK), np.float32)
    x[0, :BLOCK], x[0, 2 * BLOCK :] = 1e6, 1e-2
    received = sent(x, "q8")
    assert not received[0, BLOCK : 2 * BLOCK].any() and not received[1].any()
    assert received[0, 0] == pytest.approx(1e6, rel=1e-3) and received[0, -1] == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("wire", WIRES)
def test_a_buffer_of_many_rows_holds_one_row_after_another_message(wire):
    message, many, one = Message(8, 40), vectors(8, 40), vectors(1, 40, seed=1)
    message.write(1, Kind.ATTENTION, x=many, wire="q8" if wire == "f32" else "f32")
    data = message.write(2, Kind.ATTENTION, x=one, wire=wire)
    assert len(data) == HEADER.itemsize + vector_bytes(40, wire)
    assert message.read().shape == (1, 40) and np.abs(message.read() - one).max() <= scales(one).max() / 2 * 1.002


def test_every_field_of_the_header_survives():
    sender, receiver = Message(2, 8), Message(2, 8)
    data = sender.write(4_000_000_000, Kind.REPLAY, 255, 3_000_000_000, vectors(2, 8), "f16", epoch=255, lag=60_000, plan=254)
    receiver.buffer[: len(data)] = data
    fields = {"seq": 4_000_000_000, "position": 3_000_000_000, "layer": 255, "rows": 2, "kind": Kind.REPLAY,
              "wire": WIRES.index("f16"), "epoch": 255, "lag": 60_000, "plan": 254}  # fmt: skip
    assert {name: int(receiver.header[name]) for name in HEADER.names} == fields


@pytest.mark.parametrize("width", [8, 100])
def test_a_text_arrives_as_it_was_sent_and_one_that_is_too_long_is_cut(width):
    sender, receiver = Message(TEXT_ROWS, width), Message(TEXT_ROWS, width)
    for text in ("", "é", "x" * 3 * width, "y" * 99 * width):
        data = sender.write(1, Kind.PLAN, x=text_rows(text, width), wire="bytes")
        receiver.buffer[: len(data)] = data
        assert rows_text(receiver.read()) == text[: TEXT_ROWS * width]


def test_a_lag_that_does_not_fit_is_the_largest_that_does():
    message = Message(1, 8)
    message.write(1000, Kind.FFN, x=vectors(1, 8), lag=70_000)
    assert message.header["lag"] == 0xFFFF


@pytest.mark.parametrize("wire, size", [("f32", 2320), ("f16", 1168), ("q8", 628)])
def test_a_message_is_as_long_as_documented(wire, size):
    assert HEADER.itemsize == 16
    assert Message(1, 576).write(1, Kind.FFN, x=vectors(1, 576), wire=wire).nbytes == size
    assert Message(1, 576).write(1, Kind.KICK).nbytes == 16


@pytest.mark.parametrize(
    "wire, value", [("f16", 7e4), ("f16", -7e4), ("f16", np.nan), ("q8", 1e7), ("q8", -np.inf), ("q8", np.nan)]
)
def test_a_value_that_the_format_cannot_hold_names_its_layer(wire, value):
    x = vectors(2, 100)
    x[1, 99] = value
    with pytest.raises(HaloError, match=rf"layer 17 \(ffn\) .* {wire}; use --wire f32"):
        Message(2, 100).write(1, Kind.FFN, 17, x=x, wire=wire)
    if np.isfinite(value):
        assert np.array_equal(sent(x, "f32"), x)
