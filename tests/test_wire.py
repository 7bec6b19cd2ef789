"""The parts of the wire, each alone: the format of messages, deadlines, kicks, sockets."""

import itertools
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing
from types import SimpleNamespace

import numpy as np
import pytest

from halo_mpi.errors import HaloError
from halo_mpi.wire import mailbox
from halo_mpi.wire.deadline import ENOUGH, FIRST_S, FORGIVEN, PATIENT_S, WINDOW, Deadline
from halo_mpi.wire.messages import BLOCK, HEADER, WIRES, Kind, Message, vector_bytes
from halo_mpi.wire.root_link import KICKS_BEFORE_BACKOFF, KICKS_IN_FLIGHT, LONGEST_KICK_S, RootLink
from halo_mpi.wire.sockets import (
    TCP_RTO_MAX_MS,
    TCP_RTO_MIN_US,
    TCP_THIN_LINEAR_TIMEOUTS,
    TCP_USER_TIMEOUT,
    own_addresses,
    tune_sockets,
)
from halo_mpi.wire.worker_link import WorkerLink
from tests.simulator import TICK_S, Box, Clock

pytestmark = pytest.mark.timeout(30)
WIDTHS = (1, 31, 32, 33, 100, 576)
KICK_S = 1e-3


# Messages


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
    data = sender.write(4_000_000_000, Kind.REPLAY, 65_535, 3_000_000_000, vectors(2, 8), "f16", epoch=255, lag=200)
    receiver.buffer[: len(data)] = data
    fields = {"seq": 4_000_000_000, "position": 3_000_000_000, "layer": 65_535, "rows": 2, "kind": Kind.REPLAY,
              "wire": WIRES.index("f16"), "epoch": 255, "lag": 200}  # fmt: skip
    assert {name: int(receiver.header[name]) for name in HEADER.names} == fields


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


# Deadlines


def learned(latencies_ms: list[float]) -> Deadline:
    deadline = Deadline(None)
    for latency_ms in latencies_ms:
        deadline.observe(latency_ms / 1e3)
    return deadline


def clean(number: int = WINDOW) -> list[float]:
    """Round trips of about 0.5 ms."""
    return (0.5 + np.abs(np.random.default_rng(1).normal(0, 0.05, number))).tolist()


def lossy(number: int = WINDOW) -> list[float]:
    """One in ten is repaired after 9 ms, as with 5 % loss in each direction."""
    lost = np.random.default_rng(2).random(number) < 0.1
    assert lost[:ENOUGH].sum() > FORGIVEN
    return (np.array(clean(number)) + 9 * lost).tolist()


def test_the_usual_time_is_the_median_of_the_recent_answers():
    assert learned(clean()).usual_s == pytest.approx(0.53e-3, rel=0.05)
    assert learned([5.0] * WINDOW + clean()).usual_s < 0.6e-3


def test_a_deadline_is_patient_before_anything_is_known_and_on_a_clean_link():
    assert Deadline(None).at(7.0, 7.0) == 7.0 + FIRST_S
    assert learned(clean()).at(7.0, 7.0) == 7.0 + PATIENT_S


def test_a_deadline_is_short_where_answers_are_often_late():
    assert 1e-3 < learned(lossy()).at(0.0, 0.0) < 4e-3
    often = [9.5 if number % 5 == 0 else 0.5 for number in range(ENOUGH)]
    assert learned(often[:-1]).at(0.0, 0.0) >= PATIENT_S, "too little is known"
    assert learned(often).at(0.0, 0.0) < 4e-3


def test_hiccups_of_a_busy_machine_are_forgiven():
    latencies = clean()
    latencies[50 : 50 + FORGIVEN] = [40.0] * FORGIVEN
    assert learned(latencies).at(0.0, 0.0) == PATIENT_S
    latencies[50 : 50 + 5 * FORGIVEN] = [40.0] * 5 * FORGIVEN
    assert learned(latencies).at(0.0, 0.0) < 4e-3


def test_a_link_that_recovered_is_waited_for_again():
    assert learned(lossy() + clean()).at(0.0, 0.0) == PATIENT_S


def test_a_slow_link_gets_the_time_it_takes():
    assert learned([60 + latency for latency in clean()]).at(0.0, 0.0) > 0.06


def test_a_deadline_is_never_before_the_root_is_done_itself():
    assert learned(lossy()).at(0.0, 0.1) == 0.1


def test_a_fixed_deadline_counts_from_the_roots_own_share_and_learns_nothing():
    deadline = Deadline(0.002)
    for latency_ms in clean():
        deadline.observe(latency_ms / 1e3)
    assert deadline.at(0.0, 0.1) == 0.1 + 0.002
    assert deadline.usual_s > 0, "kicks need it all the same"


# Kicks


class Recorder(Box):
    """A box that notes when what was sent."""

    posts: list[tuple[float, Kind]]

    def post(self, peers, kind, *message, **fields) -> None:
        self.posts.append((self._clock.now(), kind))
        super().post(peers, kind, *message, **fields)

    def delay(self, seconds: float) -> None:
        self._delays = itertools.repeat(seconds)


class Star:
    """A root and a worker; every message but for pings takes `delay_s`."""

    def __init__(self, kick_s: float, delay_s: float):
        self.clock = Clock()
        self.box, worker = Recorder(self.clock, 4, 1, [delay_s]), Box(self.clock, 4, 1, [delay_s])
        self.box.posts, self.box.peers = [], {1: worker}
        worker.rank, worker.peers = 1, {0: self.box}
        self._worker = WorkerLink(worker, self.clock)
        self.clock.turns.append(self._work)
        self.link = RootLink(self.box, [1], kick_s, waiter=self.clock)
        self.peer = self.link.peers[1]

    def _work(self) -> None:
        while request := self._worker.next():
            self._worker.answer(request, request.x)

    def ask(self) -> float:
        """When."""
        self.link.ask(Kind.FFN, 0, 0, np.ones((1, 4), np.float32), [1])
        return self.clock.now()

    def wait(self, seconds: float) -> list[float]:
        """As the root waits for an answer; when it sent kicks."""
        begin, most = len(self.box.posts), 0
        for _ in range(round(seconds / TICK_S)):
            list(self.link.poll())
            if self.peer.asked_at:
                self.link.kick(1)
            most = max(most, self.peer.kicks_in_flight)
            self.clock.wait()
        assert most <= KICKS_IN_FLIGHT
        return [at for at, kind in self.box.posts[begin:] if kind == Kind.KICK]


def test_an_outage_is_kicked_a_limited_number_of_times():
    star = Star(KICK_S, 1e6)
    star.ask()
    assert len(star.wait(2.0)) == KICKS_IN_FLIGHT
    for _ in range(50):  # in relaxed mode the root goes on asking
        star.ask()
        assert not star.wait(0.01)


def test_kicks_become_rarer():
    star = Star(KICK_S, 1e6)
    asked = star.ask()
    times = star.wait(2.0)
    assert KICK_S <= times[0] - asked <= KICK_S + 2 * TICK_S
    expected = [min(KICK_S * 2 ** max(0, number - KICKS_BEFORE_BACKOFF), LONGEST_KICK_S) for number in range(1, KICKS_IN_FLIGHT)]
    gaps = np.diff(times)
    assert len(gaps) == len(expected) and (np.abs(gaps - expected) <= 2 * TICK_S).all(), gaps


def test_kicks_that_are_answered_may_go_on():
    star = Star(KICK_S, 0.005)
    for _ in range(3):
        star.ask()
        assert 3 <= len(star.wait(0.05)) and not star.peer.kicks_in_flight
    assert not star.peer.asked_at


def test_no_kick_before_the_usual_time_is_over():
    star = Star(KICK_S, 0.005)
    for _ in range(WINDOW):
        star.ask()
        star.wait(0.012)
    assert star.peer.deadline.usual_s == pytest.approx(0.01, abs=1e-3)
    star.ask()
    assert not star.wait(0.03), "the answer came after the usual time"
    star.box.delay(1.0)
    asked = star.ask()
    assert star.wait(0.03)[0] - asked >= star.peer.deadline.usual_s + KICK_S - TICK_S / 2


def test_without_kicks_there_are_none():
    star = Star(0.0, 1e6)
    star.ask()
    assert not star.wait(1.0)


# Receiving


class Request:
    """Stands in for a persistent receive."""

    def Start(self):
        pass


def test_a_small_message_does_not_overtake_a_large_one(monkeypatch):
    """MPI matches one peer's messages in order, but may complete a small one before a large one that was sent first."""
    made = []
    comm = SimpleNamespace(Recv_init=lambda buffer, peer, tag: made.append(Request()) or made[-1])
    arrivals = iter([[1], [2], [0], [3, 0]])  # slots as they complete

    def testsome(requests, statuses):
        done = next(arrivals)
        statuses.extend(SimpleNamespace(Get_count=lambda _: 16) for _ in done)
        return done

    fake = SimpleNamespace(Request=SimpleNamespace(Testsome=testsome), Prequest=SimpleNamespace(Startall=len), BYTE=None)
    monkeypatch.setattr(mailbox, "MPI", fake)
    ring = mailbox.ReceiveRing(comm, [1], 4, 1, 8)
    slots = {id(message): index for index, (_, message) in enumerate(ring._slots)}
    assert [[slots[id(message)] for _, message in ring.poll()] for _ in range(4)] == [[], [], [0, 1, 2], [3, 0]]


# Sockets


linux = pytest.mark.skipif(sys.platform != "linux", reason="the options are Linux's")
OPTION = {
    "user_timeout": TCP_USER_TIMEOUT,
    "thin_linear_timeouts": TCP_THIN_LINEAR_TIMEOUTS,
    "rto_max": TCP_RTO_MAX_MS,
    "rto_min": TCP_RTO_MIN_US,
}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def here() -> str:
    """An address of this host that another one could know, if there is any."""
    return next((address for address in own_addresses() if ":" not in address), "127.0.0.1")


def connected(stack: ExitStack, address: str, dual_stack: bool = False) -> list[socket.socket]:
    """Both ends of a TCP connection of this process, each the other's peer at `address`."""
    if dual_stack:
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        server = socket.create_server((address, 0))
    server = stack.enter_context(closing(server))
    client = socket.create_connection((address, server.getsockname()[1]), timeout=5, source_address=(address, 0))
    return [stack.enter_context(closing(end)) for end in (client, server.accept()[0])]


def options(end: socket.socket) -> dict[str, int]:
    """The values of those that this kernel knows."""
    values = {}
    for name, option in OPTION.items():
        try:
            values[name] = end.getsockopt(socket.IPPROTO_TCP, option)
        except OSError:
            pass
    return values


@linux
@pytest.mark.parametrize("dual_stack", [False, True])
def test_connections_to_peers_are_tuned(stack, here, dual_stack):
    if dual_stack and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    ends = connected(stack, here, dual_stack)
    known = options(ends[0])
    accepted = tune_sockets({here})
    assert accepted == {name: name in known for name in OPTION}
    for end in ends:
        tuned = options(end)
        assert tuned["thin_linear_timeouts"] == 1 and tuned["user_timeout"] == 900_000, "15 minutes of outage are survived"
        if "rto_min" in known:
            assert 5000 <= tuned["rto_min"] <= 10000 < known["rto_min"], (
                "whole ticks of the kernel's clock, 4 ms where there are 250"
            )
            assert tuned["rto_max"] == 1000 < known["rto_max"]


@linux
def test_connections_to_others_are_left_alone(stack, here):
    ours, others = connected(stack, here), connected(stack, "127.0.0.7")
    before = [options(end) for end in others]
    assert tune_sockets({here})["thin_linear_timeouts"]
    assert [options(end) for end in others] == before != [options(end) for end in ours]


@linux
def test_an_old_kernel_refuses_the_new_options(stack, here):
    ends = connected(stack, here)
    before = [options(end) for end in ends]
    assert tune_sockets({here}, old_kernel=True) == {**dict.fromkeys(OPTION, True), "rto_max": False, "rto_min": False}
    old = {"user_timeout": 900_000, "thin_linear_timeouts": 1}
    assert [options(end) for end in ends] == [{**values, **old} for values in before] != before


@linux
def test_without_connections_to_peers_nothing_is_accepted_or_refused(stack, here):
    stack.enter_context(closing(socket.create_server((here, 0))))
    stack.enter_context(closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))).connect((here, 9))
    for end in socket.socketpair():
        stack.enter_context(closing(end))
    assert tune_sockets({here}) == {}


@linux
def test_tuning_leaves_no_descriptor_open_and_the_connections_working(stack, here):
    client, server = connected(stack, here)
    connected(stack, "127.0.0.7")
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings(record=True) as unclosed:
        warnings.simplefilter("always")
        tune_sockets({here})
    assert not unclosed, "left to the garbage collector"
    assert len(os.listdir("/proc/self/fd")) == before
    client.sendall(b"still here")
    assert server.recv(100) == b"still here"


def test_own_addresses_are_those_that_others_can_reach():
    addresses = own_addresses()
    assert not {"127.0.0.1", "::1"} & set(addresses)
    assert not [address for address in addresses if "%" in address]
