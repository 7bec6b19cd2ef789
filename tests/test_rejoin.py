"""halo-mpirun's choice of hosts: spare ones, and --rejoin, which takes those in again that were left out."""

import json
import signal
import time

import pytest

from bench.lab.processes import parent_of
from tests.launched import TEXT, Launched
from tests.mpi import ROOT

pytestmark = pytest.mark.timeout(90)
LONG = (*TEXT, "--max-tokens", 150)
EAGER = ROOT / "tests" / "programs" / "eager_mpirun.py"
SLOW_ON_TWO = '{"3": 0.01, "2": 1.0}'


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")


def places(text, count=None, **more):
    from mpirun_hosts import read_host_list
    from mpirun_places import Places

    return Places(read_host_list(text, "Open MPI"), count, **more)


def names(chosen):
    return ",".join(host.name for host in chosen.in_use)


@pytest.mark.parametrize(
    "text, more, lost, used, ranks",
    [
        ("a,b,c", {}, set(), "a,b,c", 3),
        ("a,b,c", {}, {"b"}, "a,c", 2),
        ("a,b,c", {"count": 2}, set(), "a,b", 2),
        ("a,b,c", {"count": 2}, {"b"}, "a,c", 2),
        ("a,b,c", {"count": 2}, {"b", "c"}, "a", 1),
        ("a:4,b:4,c:4", {"count": 2}, set(), "a,b", 2),
        ("a:4,b:4,c:4", {"count": 6, "spread": False}, set(), "a,b", 6),
        ("a:4,b:4,c:4", {"count": 6, "spread": False}, {"a"}, "b,c", 6),
        ("a:4,b:4,c:4", {"count": 6, "spares": False}, set(), "a,b,c", 6),
        ("a,b", {"count": 4}, set(), "a,b", 4),
        ("a,b,c", {"per_host": 2, "spares": False}, {"c"}, "a,b", 4),
    ],
)
def test_the_first_hosts_that_answer_are_used(launch, text, more, lost, used, ranks):
    chosen = places(text, **more)
    chosen.lost |= lost
    assert (names(chosen), chosen.ranks) == (used, ranks)


@pytest.mark.parametrize(
    "lost, to_come, token_s, first_after_s, pays",
    [
        ({"b"}, 100, 0.4, 9.0, True),  # a quarter of 40 s
        ({"b"}, 100, 0.4, 11.0, False),
        ({"b", "c"}, 100, 0.4, 11.0, True),
        ({"b"}, 100, None, 1.0, False),
        ({"b"}, 100, 0.4, -1.0, False),  # no token yet since this start
    ],
)
def test_a_host_is_taken_in_if_it_saves_more_than_a_start_costs(
    launch, tmp_path, monkeypatch, lost, to_come, token_s, first_after_s, pays
):
    import mpirun_rejoin
    from mpirun_again import Restarts

    kept = tmp_path / "text.json"
    kept.write_text(json.dumps({"outlook": {"to_come": to_come, "token_s": token_s, "first_at": 1000.0 + first_after_s}}))
    chosen = places("localhost,b,c,d")
    chosen.lost |= lost
    monkeypatch.setattr(mpirun_rejoin, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(mpirun_rejoin, "hosts_that_answer", lambda names, *_: frozenset(names))
    rejoin = mpirun_rejoin.Rejoin(Restarts(chosen, "true", kept, False, True, True))
    looks = [(time.sleep(0.01), rejoin.look(1000.0))[1] for _ in range(10)]
    found = [look for look in looks if look]
    assert found[:1] == [lost] * pays
    assert len(found) <= 1, "not twice a minute"


@pytest.mark.mpi
def test_a_spare_host_takes_the_place_of_a_lost_one(tiny, whole, hosts):
    options, dead = hosts
    dead.write_text("board-b\n")  # which is not needed
    run = Launched(tiny, *TEXT, options=("-n", 2, *options)).until(20)
    dead.write_text("board-a\n")
    code, out, err, _ = run.send(parent_of(run.rank(1))).end()
    assert (code, out) == (3, whole), err
    assert "do not answer: board-a; instead: board-b;" in err and "on 2 ranks" in err


@pytest.fixture(scope="module")
def long_text(tiny):
    code, out, err, _ = Launched(tiny, *LONG, program="halo_mpi.generate").end()
    assert code == 0, err
    return out


def without_a_host(tiny, hosts):
    """A run that goes on without a host, which answers again now."""
    options, dead = hosts
    run = Launched(tiny, *LONG, options=("--rejoin", *options), launcher=EAGER, HALO_TEST_TOKEN_S=SLOW_ON_TWO).until(20)
    dead.write_text("board-a\n")
    run.send(parent_of(run.rank(1))).until(len(run.out) + 8)
    dead.write_text("")
    return run


@pytest.mark.slow
@pytest.mark.mpi
def test_a_host_that_is_back_is_taken_in_and_the_text_is_the_same_to_the_byte(tiny, long_text, hosts):
    code, out, err, _ = without_a_host(tiny, hosts).end()
    assert (code, out) == (3, long_text), err
    lines = [line.strip("\0 ") for line in err.splitlines()]  # mpirun ends its messages with a NUL
    told = [line for line in lines if line.startswith("halo-mpi")]
    assert len(told) == 2 and "left out" in told[0] and "taken in again, since they answer: board-a" in told[1], err
    assert "on 3 ranks" in err


@pytest.mark.slow
@pytest.mark.mpi
def test_sigterm_ends_a_run_that_takes_a_host_in(tiny, long_text, hosts):
    run = without_a_host(tiny, hosts)
    while b"taken in" not in (line := run.process.stderr.readline()):
        assert line
    code, out, err, took = run.send(run.process.pid, signal.SIGTERM).end()
    assert code == 143 and took < 10 and long_text.startswith(out.rstrip(b"\n")), err
