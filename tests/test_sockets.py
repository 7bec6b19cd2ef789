"""Tuning connections: those to peers, all that the kernel takes, and no others."""

import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from halo_mpi.wire.sockets import (
    ask_for_connections,
    count_connections,
    TCP_RTO_MAX_MS,
    TCP_RTO_MIN_US,
    TCP_THIN_LINEAR_TIMEOUTS,
    TCP_USER_TIMEOUT,
    own_addresses,
    tune_sockets,
)

pytestmark = pytest.mark.timeout(30)


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


@linux
def test_connections_to_a_peer_are_counted(stack, here):
    assert count_connections({here}) == 0
    connected(stack, here), connected(stack, here)
    assert count_connections({here}) == 4 and count_connections({"192.0.2.1"}) == 0, "both ends are here"


@pytest.mark.parametrize(
    "arguments, count",
    [
        (["--prompt", "--copies"], 4),
        (["--copies", "2", "--verbose"], 2),
        (["--copies=1"], 1),
        (["--prompt", "a", "--copies=4"], 4),
        (["--copies", "many"], 4),
    ],
    ids=str,
)
def test_mpi_is_asked_for_as_many_connections_as_copies_may_need(monkeypatch, arguments, count):
    for name in [name for name in os.environ if name.startswith("OMPI_MCA_btl_tcp_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", environment := dict(os.environ))
    assert ask_for_connections(arguments) == count
    assert environment.get("OMPI_MCA_btl_tcp_links") == (None if count == 1 else str(count))


def test_what_the_user_asked_mpi_for_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"OMPI_MCA_btl_tcp_links": "3"})
    ask_for_connections([])
    assert os.environ["OMPI_MCA_btl_tcp_links"] == "3"
