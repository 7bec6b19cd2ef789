"""What ranks say to each other before the work begins."""

import json
from types import SimpleNamespace

import pytest

from halo_mpi.errors import HaloError
from halo_mpi.wire import exchange

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def first_words(monkeypatch):
    """The root of three ranks, and what the others send it, by rank, one after the other."""

    def play(said: dict[int, list]) -> list[list[int]]:
        asked = []

        def receive(comm, ranks, most_s):
            asked.append(list(ranks))
            return {rank: json.dumps(said[rank].pop(0)).encode() for rank in ranks}

        monkeypatch.setattr(exchange, "_receive", receive)
        exchange.open_connections(SimpleNamespace(rank=exchange.ROOT, size=3), 4)
        return asked

    return play


def test_the_root_hears_every_connection_of_each_worker_before_it_says_anything(first_words):
    assert first_words({1: [4] * 4, 2: [2] * 2}) == [[1, 2], [1, 2], [1], [1]]


def test_a_worker_of_an_older_version_is_named(first_words):
    with pytest.raises(HaloError, match="rank 2 has another version of halo_mpi; install the same version on all hosts"):
        first_words({1: [4] * 4, 2: ["0.1.0, protocol 7"]})
