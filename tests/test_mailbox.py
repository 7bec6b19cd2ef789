"""The order of receiving, copies of messages and how many of them, with communicators that are stood in for."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halo_mpi.wire import lateness, mailbox, receiving
from halo_mpi.wire.messages import HEADER, Kind, Message

pytestmark = pytest.mark.timeout(30)


class Request:
    """Stands in for a persistent receive."""

    def __init__(self, line: "Line", buffer: np.ndarray, peer: int):
        self.line, self.buffer, self.done, self.size, self.peer = line, buffer, False, 0, peer

    def Start(self):
        self.done = False
        self.line.started.append(self)

    def Test(self):
        if self.peer in self.line.ended:
            raise Ended
        return self.done


class Line:
    """Stands in for a communicator: what arrives goes into the receives in the order in which they were started."""

    def __init__(self):
        self.started = deque()
        self.ended = set()

    def Recv_init(self, buffer, peer, tag):
        return Request(self, buffer[0], peer)

    def arrive(self, seq: int, kind: Kind, rows: int, receive: int = 0) -> None:
        request, message = self.started[receive], Message(4, 8)
        data = message.write(seq, kind, x=np.full((rows, 8), seq, np.float32))
        del self.started[receive]
        request.buffer[: data.size] = data
        request.done, request.size = True, data.size


class Ended(Exception):
    """Stands in for MPI's exception."""


calls = []  # of some_done: how many requests each


def some_done(requests, statuses):
    """As ULFM does it: of all that are complete, failed ones included, the statuses; where some failed, not which they are."""
    calls.append(len(requests))
    live = [request for request in requests if request]
    failed = [request for request in live if request.peer in request.line.ended]
    for request in [each for each in live if each.done or each in failed]:
        statuses.append(SimpleNamespace(Get_count=lambda _, size=request.size: size, source=request.peer, error=request in failed))
    if failed:
        raise Ended
    done = [index for index, request in enumerate(requests) if request and request.done]
    for index in done:
        requests[index].done = False
    return done


@pytest.fixture
def lines(monkeypatch) -> list[Line]:
    fake = SimpleNamespace(
        Request=SimpleNamespace(Testsome=some_done, Testall=lambda requests: False), BYTE=None, Exception=Ended,
        REQUEST_NULL=None,
    )  # fmt: skip
    monkeypatch.setattr(mailbox, "MPI", fake)
    monkeypatch.setattr(receiving, "MPI", fake)
    return [Line() for _ in range(4)]


def received(box: mailbox.Mailbox) -> list[int]:
    """The seqs of what has come, whose vectors must be its own."""
    found = []
    for peer, message in box.poll():
        seq = int(message.header["seq"])
        assert peer == 1 and (message.read() == seq).all()
        found.append(seq)
    return found


def test_a_small_message_does_not_overtake_a_large_one(lines):
    """MPI matches one peer's messages in order, but may complete a small one before a large one that was sent first."""
    box = mailbox.Mailbox(lines[0], [1], 4, 8, "f32")
    lines[0].arrive(1, Kind.FFN, 1, receive=1)
    assert received(box) == []
    lines[0].arrive(2, Kind.FFN, 1, receive=1)
    assert received(box) == []
    lines[0].arrive(0, Kind.FFN, 4)
    assert received(box) == [0, 1, 2]


def test_a_peer_that_has_ended_is_told_and_what_others_sent_meanwhile_is_not_lost(lines):
    box = mailbox.Mailbox(lines[0], [1, 2], 4, 8, "f32")
    lines[0].arrive(0, Kind.FFN, 1)
    lines[0].ended.add(2)
    assert received(box) == [0] and box.ended == {2}
    lines[0].arrive(1, Kind.FFN, 1, receive=next(i for i, each in enumerate(lines[0].started) if each.peer == 1))
    assert received(box) == [1], "as if the other had never been"


def test_however_many_lines_there_are_mpi_is_asked_once_what_has_come(lines, sent):
    """What that costs is the pass over all connections, not the requests."""
    box = mailbox.Mailbox(lines[0], [1, 2], 4, 8, "f32", copies=lines[1:])
    for receives in (4 * mailbox.DEPTH, 6 * mailbox.DEPTH):
        calls.clear()
        for line in lines[:2]:
            line.arrive(0, Kind.WIDER, 0)
        assert received(box) == [] and calls == [receives], "lines opened on the way are seen to the next time"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(large=st.lists(st.booleans(), max_size=40), order=st.lists(st.booleans(), max_size=80))
def test_of_two_lines_the_first_copy_counts_and_none_twice(lines, large, order):
    for line in lines:
        line.started.clear()
    box = mailbox.Mailbox(lines[0], [1], 4, 8, "f32", copies=lines[1:2])
    came, found = [0, 0], []
    for number in [*order, *[False] * len(large), *[True] * len(large)]:
        seq = came[number]
        if seq == len(large) or not lines[number].started:
            continue
        rows, kind = (4, Kind.ATTENTION) if large[seq] else (1, Kind.FFN)
        lines[number].arrive(seq, *((Kind.ELSEWHERE, 0) if number and large[seq] else (kind, rows)))
        came[number] += 1
        found += received(box)
        here = [seq < came[0] or seq < came[1] and not large[seq] for seq in range(len(large))]
        assert found == list(range((*here, False).index(False))), "everything that is there, in order, once"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.integers(0, 20), behind=st.integers(0, 20), order=st.lists(st.integers(0, 3), max_size=120))
def test_behind_a_wider_message_the_first_of_four_copies_counts_and_none_twice(lines, monkeypatch, before, behind, order):
    for line in lines:
        line.started.clear()
    box = mailbox.Mailbox(lines[0], [1], 4, 8, "f32", copies=lines[1:])
    widened = []
    monkeypatch.setattr(box, "widen", widened.append)
    few = [(seq, Kind.FFN) for seq in range(before)] + [(None, Kind.WIDER)]
    all_of_them = [(before + seq, Kind.FFN) for seq in range(behind)]
    under_way = [deque([*few, *all_of_them]), deque([*few, *all_of_them]), deque(all_of_them), deque(all_of_them)]
    found = []
    for number in [*order, *[0] * 41, *[1] * 41, *[2] * 20, *[3] * 20]:
        if under_way[number] and lines[number].started:
            seq, kind = under_way[number].popleft()
            lines[number].arrive(seq or 0, kind, int(kind == Kind.FFN))
            found += received(box)
        assert found == list(range(len(found))), "in order, once"
    assert len(found) == before + behind and widened == [1], "and it answers alike"
    assert box.received_bytes[1] == sum(2 * 16 if seq is None else 48 * (2 if seq < before else 4) for seq, _ in few + all_of_them)


def test_who_often_gets_a_message_late_asks_for_more_copies_and_sends_more(lines, sent):
    box = mailbox.Mailbox(lines[0], [1], 4, 8, "f32", copies=lines[1:])
    for seq in range(lateness.WINDOW + 8):  # the second line stands still
        lines[0].arrive(seq, Kind.FFN, 1)
        assert received(box) == [seq]
    assert [(line, data[12]) for line, _, data in sent] == [(0, Kind.WIDER), (1, Kind.WIDER)] and box.copies == {1: 4}
    sent.clear()
    box.post([1], Kind.FFN, 1, x=np.ones((1, 8), np.float32))
    assert [line for line, _, _ in sent] == [0, 1, 2, 3]
    sent.clear()
    box.post([1], Kind.FFN, 2, x=np.ones((4, 8), np.float32))
    assert [(line, len(data)) for line, _, data in sent] == [(0, 16 + 128), (1, 16), (2, 16), (3, 16)]


@pytest.mark.parametrize("connections, copies", [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_there_are_no_more_copies_than_connections(lines, sent, connections, copies):
    box = mailbox.Mailbox(lines[0], [1], 4, 8, "f32", copies=lines[1:])
    box.limit(connections)
    box.widen(1)
    assert box.copies == {1: copies}


@pytest.fixture
def sent(lines) -> list[tuple[int, int, bytes]]:
    """Line, peer and data of every message that is sent."""
    found = []
    for number, line in enumerate(lines):
        start = lambda *sent: SimpleNamespace(Start=lambda: found.append(sent))  # noqa: E731
        line.Send_init = lambda data, peer, tag, number=number, start=start: start(number, peer, bytes(data[0]))
    return found


def sender_to_two(lines: list[Line], width: int) -> mailbox.Mailbox:
    return mailbox.Mailbox(lines[0], [1, 2], 4, width, "f32", trailers=True, copies=lines[1:2])


def test_copies_are_sent_in_pairs_and_large_messages_once(lines, sent):
    sender = sender_to_two(lines, 8)
    sender.post([1, 2], Kind.FFN, 1, x=np.ones((1, 8), np.float32))
    assert [entry[:2] for entry in sent] == [(0, 1), (1, 1), (0, 2), (1, 2)] and len({entry[2] for entry in sent}) == 1
    sent.clear()
    sender.post([1], Kind.FFN, 2, x=np.ones((4, 8), np.float32))
    assert [(line, len(data)) for line, _, data in sent] == [(0, HEADER.itemsize + 4 * 8 * 4), (1, HEADER.itemsize)]
    sent.clear()
    sender.limit(1)
    sender.post([1], Kind.FFN, 3, x=np.ones((1, 8), np.float32))
    assert [(line, len(data)) for line, _, data in sent] == [(0, HEADER.itemsize + 8 * 4), (0, HEADER.itemsize)], "with a trailer"


def test_what_mpi_would_fetch_by_rendezvous_is_not_copied(lines, sent):
    width = mailbox.MOST_COPIED_VALUES + 1
    sender_to_two(lines, width).post([1], Kind.FFN, 1, x=np.ones((1, width), np.float32))
    assert [(line, len(data)) for line, _, data in sent] == [(0, HEADER.itemsize + 4 * width), (1, HEADER.itemsize)]
