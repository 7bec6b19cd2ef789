"""What the laboratory's network does to packets."""

import re
import signal
import socket
import struct
import subprocess
import threading
import time
from math import sqrt
from statistics import mean, median

import numpy as np
import pytest

from bench.lab.costs import round_trips_us, udp_socket
from bench.lab.lab import Lab
from bench.lab.scenario import Burst, Host
from bench.lab.system import inside
from tests.lab import BACKENDS, ONE_IN_A_MILLION, SO_RCVBUFFORCE, binomial_interval, lanes, lossy_lab, numbers_received

ETH_P_ALL = 3
SO_TIMESTAMPNS = 35

pytestmark = [pytest.mark.lab, pytest.mark.timeout(60)]


# Losses


def losses(number: int, received: list[int]) -> np.ndarray:
    """One where a packet was lost, zero where it came."""
    lost = np.ones(number, int)
    lost[received] = 0
    return lost


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", (0.01, 0.1, 0.3))
def test_losses_are_as_many_as_the_scenario_says_and_as_the_counters_tell(can, backend, loss):
    can(backend)
    number = 10_000
    with lossy_lab(backend, Host(loss=loss), Host(loss=loss)) as lab:
        there, back = len(numbers_received(lab, number)), len(numbers_received(lab, number, "pi2", "pi1"))
        counted = lanes(lab)
    for received, direction in ((there, "down"), (back, "up")):
        assert number - received in binomial_interval(number, loss)
        lane = counted["pi2", direction]
        assert (lane.judged, lane.dropped) == (number, number - received)
    assert counted["pi1", "up"].judged == counted["pi1", "down"].judged == 0, "each packet is judged once"


def test_packets_wait_while_the_relay_has_no_core(can):
    can("relay")
    number = 3000
    with lossy_lab("relay", Host(), Host()) as lab:
        relay = lab.links.process
        relay.send_signal(signal.SIGSTOP)
        threading.Timer(0.2, relay.send_signal, [signal.SIGCONT]).start()
        assert len(numbers_received(lab, number)) == number


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_without_bursts_fall_independently(can, backend):
    can(backend)
    number, loss = 10_000, 0.3
    with lossy_lab(backend, Host(loss=loss), Host(loss=loss)) as lab:
        lost = losses(number, numbers_received(lab, number))
    for apart in (1, 2, 10):
        first, second = lost[:-apart], lost[apart:]
        assert (first & second).sum() in binomial_interval(int(first.sum()), loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_worse_link_of_two_hosts_judges(can, backend):
    can(backend)
    number = 1000
    with lossy_lab(backend, Host(), Host(loss=0.5), Host()) as lab:
        assert len(numbers_received(lab, number, "pi1", "pi3")) == number
        received = len(numbers_received(lab, number, "pi2", "pi3"))
        counted = lanes(lab)
        lab.conditions.lossy = False
        lab.apply()
        assert len(numbers_received(lab, number)) == number, "losses can be switched off"
    assert received in binomial_interval(number, 0.5)
    assert (counted["pi2", "up"].judged, counted["pi2", "up"].dropped) == (number, number - received)


def test_bursts_have_the_length_and_the_loss_that_the_scenario_says(can):
    can("relay")
    number, burst = 30_000, Burst(good=50, bad=10)
    with lossy_lab("relay", Host(burst=burst), Host(burst=burst)) as lab:
        lost = "".join(".x"[is_lost] for is_lost in losses(number, numbers_received(lab, number)))
    for sign, spell in (("x", burst.bad), (".", burst.good)):  # geometric: mean, and how many of one packet
        lengths = [len(run) for run in re.findall(re.escape(sign) + "+", lost)]
        assert abs(mean(lengths) - spell) <= ONE_IN_A_MILLION * sqrt(spell * (spell - 1) / len(lengths))
        assert lengths.count(1) in binomial_interval(len(lengths), 1 / spell)
    persistence = 1 - 1 / burst.good - 1 / burst.bad
    spread = sqrt(burst.loss * (1 - burst.loss) / number * (1 + persistence) / (1 - persistence))
    assert abs(lost.count("x") / number - burst.loss) <= ONE_IN_A_MILLION * spread


def test_losses_within_the_spells_are_as_many_as_the_scenario_says(can):
    """Where a spell cannot be seen, how often two packets so far apart are both lost tells the losses in it and its length."""
    can("relay")
    number, block, burst = 60_000, 300, Burst(good=50, bad=10, loss_good=0.02, loss_bad=0.5)
    with lossy_lab("relay", Host(burst=burst), Host(burst=burst)) as lab:
        lost = losses(number, numbers_received(lab, number))
    time_in = np.array([burst.good, burst.bad]) / (burst.good + burst.bad)
    loss_in = np.array([burst.loss_good, burst.loss_bad])
    step = np.array([[1 - 1 / burst.good, 1 / burst.good], [1 / burst.bad, 1 - 1 / burst.bad]])
    for apart in (1, 2, 5, 20):
        expected = time_in * loss_in @ np.linalg.matrix_power(step, apart) @ loss_in
        both = (lost[:-apart] & lost[apart:])[: (number - apart) // block * block].reshape(-1, block).mean(axis=1)
        assert abs(both.mean() - expected) <= ONE_IN_A_MILLION * both.std(ddof=1) / sqrt(len(both))


def test_a_seed_decides_which_packets_the_relay_drops(can):
    can("relay")
    survivors = []
    for seed in (7, 7, 8):
        with lossy_lab("relay", Host(loss=0.2), Host(loss=0.2), seed=seed) as lab:
            survivors.append(numbers_received(lab, 300))
    assert survivors[0] == survivors[1] != survivors[2]


# Delay, rate, size


@pytest.mark.parametrize("backend", BACKENDS)
def test_delays_are_as_long_as_the_scenario_says_and_do_not_reorder(can, backend):
    link = Host(delay_ms=20.0, jitter_ms=5.0)
    can(backend, delay_ms=20.0, jitter_ms=5.0)
    with lossy_lab(backend, link, link) as lab:
        times_ms = [us / 1000 for us in round_trips_us(lab, 40)]
        arrived = numbers_received(lab, 200)
    assert min(times_ms) >= 30
    assert 38 <= median(times_ms) <= 44, "40 plus what the machine adds"
    assert arrived == list(range(200))


def one_way_ms(lab: Lab, number: int, gap_s: float, sender: str = "pi1", receiver: str = "pi2") -> list[float]:
    """How long packets that are sent with gaps between them are under way, by the kernel's time of their arrival."""
    with udp_socket(lab, sender) as outgoing, udp_socket(lab, receiver) as incoming:
        incoming.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        for _ in range(number):
            outgoing.sendto(time.time_ns().to_bytes(8, "big"), incoming.getsockname())
            time.sleep(gap_s)
        times_ms = []
        for _ in range(number):
            sent, [(_, _, arrived)], *_ = incoming.recvmsg(8, socket.CMSG_SPACE(16))
            seconds, ns = struct.unpack("qq", arrived)
            times_ms.append((seconds * 10**9 + ns - int.from_bytes(sent, "big")) / 1e6)
        return times_ms


@pytest.mark.parametrize("backend", BACKENDS)
def test_jitter_spreads_the_delays_evenly_as_wide_as_the_scenario_says(can, backend):
    link = Host(delay_ms=20.0, jitter_ms=5.0)
    can(backend, delay_ms=20.0, jitter_ms=5.0)
    with lossy_lab(backend, link, link) as lab:
        times_ms = one_way_ms(lab, 200, gap_s=0.011)  # further apart than they jitter: none waits for another
    assert 15 <= min(times_ms) <= 16
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):  # not the spread: a busy machine delays a few packets by much
        spread_ms = ONE_IN_A_MILLION * 10 * sqrt(share * (1 - share) / len(times_ms))
        assert abs(np.quantile(times_ms, share) - (15 + 10 * share)) <= spread_ms + 0.5


def test_the_longer_delay_of_two_hosts_counts_once(can):
    can("relay")
    with lossy_lab("relay", Host(), Host(delay_ms=8.0), Host(delay_ms=20.0)) as lab:
        ways = {("pi1", "pi2"): 8, ("pi2", "pi1"): 8, ("pi2", "pi3"): 20, ("pi3", "pi2"): 20}
        for (sender, receiver), delay_ms in ways.items():
            one_way_ms(lab, 1, 0, sender, receiver)  # address resolution
            assert delay_ms <= median(one_way_ms(lab, 20, 0.001, sender, receiver)) <= delay_ms + 2


def transfer_s(lab: Lab, size: int) -> float:
    """How long a TCP connection takes to carry so many bytes from pi1 to pi2."""

    def listen():
        return socket.create_server((lab.names.address("pi2"), 7008))

    def connect():
        return socket.create_connection((lab.names.address("pi2"), 7008))

    with inside(lab.names.namespace("pi2"), listen) as server, inside(lab.names.namespace("pi1"), connect) as sender:
        receiver, _ = server.accept()
        with receiver:
            for end in (sender, receiver):
                assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"cubic"
            started = time.perf_counter()
            thread = threading.Thread(target=sender.sendall, args=(bytes(size),))
            thread.start()
            while size > 0:
                size -= len(receiver.recv(1 << 20))
            thread.join()
            return time.perf_counter() - started


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_limits_a_transfer(can, backend):
    can(backend, rate_mbit=20)
    with lossy_lab(backend, Host(rate_mbit=20), Host(rate_mbit=20)) as lab:
        took_s = transfer_s(lab, 1_000_000)
    assert 0.38 <= took_s <= 0.65, "8 Mbit and 5 % of headers at 20 Mbit/s"


@pytest.mark.parametrize("backend", BACKENDS)
def test_packets_on_the_links_are_no_larger_than_the_mtu(can, backend):
    can(backend)
    sizes = []

    def listen():
        return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))

    with lossy_lab(backend, Host(), Host()) as lab, inside(lab.names.namespace("pi2"), listen) as capture:
        capture.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        capture.settimeout(0.2)
        transfer_s(lab, 500_000)
        try:
            while True:
                sizes.append(len(capture.recv(1 << 16)))
        except TimeoutError:
            pass
    assert sum(sizes) > 500_000 and max(sizes) == 1514


def test_the_route_carries_the_tuning_of_a_root(can):
    can("kernel")
    with lossy_lab("kernel", Host(), Host(), rto_min_ms=5, quickack=True) as lab:
        route = subprocess.run(["ip", "-n", lab.names.namespace("pi2"), "route"], capture_output=True, text=True).stdout
    assert "rto_min lock 5ms" in route and "quickack 1" in route and "congctl cubic" in route


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", ("black_holes", "unplugged"))
def test_a_host_that_is_cut_off_comes_back(can, backend, fault):
    can(backend)
    with lossy_lab(backend, Host(), Host(), Host()) as lab:
        getattr(lab.conditions, fault).add("pi2")
        lab.apply()
        state = subprocess.run(["ip", "-n", lab.names.namespace("pi2"), "link", "show", "eth0"], capture_output=True, text=True)
        assert ("NO-CARRIER" in state.stdout) == (fault == "unplugged")
        assert numbers_received(lab, 10) == []
        assert len(numbers_received(lab, 10, "pi1", "pi3")) == 10
        getattr(lab.conditions, fault).clear()
        lab.apply()
        assert round_trips_us(lab, 1)
        assert len(numbers_received(lab, 10)) == 10
        if fault == "black_holes":
            assert lanes(lab)["pi2", "down"].cut >= 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lab_does_not_touch_another_with_the_same_addresses(can, backend, monkeypatch):
    can(backend)
    names = iter(("0153", "0253"))
    monkeypatch.setattr("bench.lab.lab.secrets.token_hex", lambda _: next(names))
    with lossy_lab(backend, Host(loss=0.5), Host(loss=0.5)) as lossy, lossy_lab(backend, Host(), Host()) as clean:
        assert lossy.names.network == clean.names.network
        assert len(numbers_received(clean, 1000)) == 1000
        assert len(numbers_received(lossy, 1000)) in binomial_interval(1000, 0.5)
        assert [lane.judged for lane in clean.links.lanes()] == [0] * 4
