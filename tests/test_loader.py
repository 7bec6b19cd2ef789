"""Weights that are read while the rank computes: what stays in memory, what is read again, and that nobody notices but the clock."""

import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halo_mpi.engine.loader import Loader
from halo_mpi.errors import DamagedFileError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.llama import LayerWeights
from halo_mpi.model.kernels.reference import Reference
from halo_mpi.model.kernels.choice import make_kernel
from halo_mpi.model.loading import HeadBlock, down_dtype, head_parts, scores_part, share_parts
from halo_mpi.model.whole import load_layer
from halo_mpi.model.sizes import shape_bytes
from halo_mpi.schedule.residence import SLOTS, reside
from halo_mpi.store.reader import ModelStore, RecordFile
from tests.mpi import EVEN, halo, report_of

PROMPT = ["--prompt", "The dog", "--max-tokens", "12", "--ignore-eos"]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(-10, 1500))
def test_what_stays_is_within_the_budget_if_anything_can_be(sizes, budget):
    found = reside(sizes, budget)
    assert found.sizes == tuple(sizes) and found.stay_bytes + found.streamed_bytes == sum(sizes)
    assert all(stays for size, stays in zip(sizes, found.stays) if not size)
    least = min(sum(sizes), SLOTS * max(sizes))
    assert found.nbytes <= max(budget, least)
    if found.streamed_bytes:
        missing = [size for size, stays in zip(sizes, found.stays) if not stays]
        assert found.slot >= max(missing) and found.nbytes + min(missing) > budget, "more could have stayed"


def test_without_a_budget_everything_stays_and_there_are_no_slots():
    assert reside([3, 0, 4], None).nbytes == 7


def test_what_stays_lies_evenly_between_the_rest():
    stays = reside([10] * 60, 20 + 300).stays
    assert sum(stays) == 30 and all(1 <= sum(stays[start : start + 4]) <= 3 for start in range(0, 60, 4))


@contextmanager
def loading(model, heads, groups, budget, read=lambda part, read: read(), expect=lambda part: None):
    """A loader, the layers that it fills, and the matrices of each part as they should be. `read`, `expect`: called for a part."""
    store = ModelStore(model)
    config = ModelConfig.from_dict(store.meta["config"])
    expected = [load_layer(store, config, layer, heads, groups) for layer in range(config.layers)]
    layers, parts = share_parts(store, Reference(config), [heads] * config.layers, [groups] * config.layers)
    sizes = [shape_bytes(part.shapes) for part in parts]
    parts = [replace(part, read=partial(read, number, part.read), expect=partial(expect, number)) for number, part in enumerate(parts)]
    loader = Loader(parts, reside(sizes, None if budget is None else int(budget * sum(sizes))))
    try:
        yield loader, lambda part: matrices(layers, part) == matrices(expected, part)
    finally:
        loader.close()
        store.close()


def matrices(layers: list[LayerWeights], part: int) -> list[list]:
    weights = layers[part // 2]
    return [matrix.tolist() for matrix in ((weights.gate_up, weights.down) if part % 2 else (weights.qkv, weights.o))]


@pytest.mark.parametrize("budget", [None, 0.7, 0.5, 0.0])
def test_a_part_is_whole_from_when_it_is_needed_until_the_next_one_is(deep, budget):
    with loading(deep, [0, 1, 3], [0], budget) as (loader, is_right):
        random = np.random.default_rng(1)
        turns = [*range(10)] * 3 + random.integers(0, 10, 40).tolist()  # in order, as tokens do; and as a worker that skips
        for part in turns:
            loader.need(part)
            assert is_right(part)
            time.sleep(random.choice([0.0, 0.0, 0.003]))
            assert is_right(part), "overwritten while in use"
        assert bool(loader.residence.streamed_bytes) == (budget is not None)


def test_the_next_part_is_read_while_this_one_is_in_use(deep):
    with loading(deep, [0, 1, 2, 3], [0], 0.0) as (loader, _):
        loader.load()
        loader.need(3)
        time.sleep(0.2)  # far longer than reading takes
        before = loader.waited_s
        loader.need(4)
        assert loader.waited_s == before


def test_a_share_without_work_is_there_at_once(deep):
    with loading(deep, [], [], None) as (loader, _):
        loader.load()
        assert loader.waited_s == loader.read_s == 0.0


def test_nothing_is_left_of_the_thread_when_the_loader_is_closed(deep):
    with loading(deep, [0], [0], 0.0):
        assert any(thread.name == "loader" for thread in threading.enumerate())
    assert not any(thread.name == "loader" for thread in threading.enumerate())


def test_what_cannot_be_read_is_an_error_when_it_is_needed(deep):
    def fail_at_5(part, read):
        if part == 5:
            raise DamagedFileError("shard-00.h5 is damaged")
        read()

    with loading(deep, [0, 1], [0], 0.0, fail_at_5) as (loader, is_right):
        for part in range(5):
            loader.need(part)
            assert is_right(part)
        for part in (5, 9):
            with pytest.raises(DamagedFileError, match="shard-00"):
                loader.need(part)


@pytest.mark.parametrize("budget, turns", [(None, 1), (0.0, 3)])
def test_the_next_part_is_expected_before_this_one_is_read(deep, budget, turns):
    """So that the disk gives it meanwhile."""
    calls = []
    with loading(deep, [0, 1, 3], [0], budget, lambda part, _: calls.append(("read", part)),
                 lambda part: calls.append(("expect", part))) as (loader, _):  # fmt: skip
        for _ in range(turns):
            loader.load()
    read = [part for name, part in calls if name == "read"]
    assert read[: 10 * turns] == [*range(10)] * turns
    ahead = [call for this, after in zip(read, [*read[1:], None]) for call in (("expect", after), ("read", this))]
    assert calls[: 20 * turns - 2] == [("expect", 0), *ahead][: 20 * turns - 2]


def test_what_stays_is_expected_before_what_is_streamed_later(deep):
    """As long as the loader runs ahead, parts that have no slot yet are not read."""
    calls = []
    with loading(deep, [0, 1, 3], [0], 0.7, lambda part, _: calls.append(("read", part)),
                 lambda part: calls.append(("expect", part))) as (loader, _):  # fmt: skip
        while len(calls) < 3 or calls[-1][0] != "read" or not loader.residence.stays[calls[-1][1]]:
            time.sleep(0.01)
        time.sleep(0.2)
        ahead = [part for name, part in calls if name == "read"]
        assert any(loader.residence.stays) and not all(loader.residence.stays)
        expected = [part for name, part in calls if name == "expect"]
        assert expected[: len(ahead)] == ahead, "in the order of reading, none for nothing"


def test_what_is_expected_of_a_part_is_what_it_reads(light, monkeypatch):
    calls = {"expect": [], "read": []}
    for name, records in calls.items():
        real = getattr(RecordFile, name)
        monkeypatch.setattr(RecordFile, name, lambda *of, records=records, real=real: (records.append(of[1:]), real(*of))[1])
    store = ModelStore(light)
    config = ModelConfig.from_dict(store.meta["config"])
    kernel = make_kernel("auto", config, store.meta["dtype"], 1, down_dtype=down_dtype(store))
    layers, parts = share_parts(store, kernel, [[0, 1, 3]] * config.layers, [[0]] * config.layers)
    blocks, of_head = head_parts(store, kernel)
    for part in (*parts, *of_head, scores_part(store, kernel, 16, config.vocabulary, HeadBlock())):
        part.make_room()
        part.expect()
        part.read()
        assert calls["read"] and sorted(calls["expect"]) == sorted(calls["read"])
        for records in calls.values():
            records.clear()
    store.close()


def test_messages_are_looked_at_while_a_part_is_waited_for(deep):
    looks = []
    with loading(deep, [0, 1], [0], 0.0, lambda part, read: (time.sleep(0.02), read())) as (loader, _):
        loader.meanwhile = lambda: looks.append(1)
        loader.load()
        assert len(looks) > 20 and loader.waited_s > 0.1


@pytest.mark.mpi
@pytest.mark.parametrize(("ranks", "sync"), [
    (1, "strict"), *(pytest.param(3, sync, marks=pytest.mark.slow) for sync in ("strict", "relaxed")),
])  # fmt: skip
def test_what_is_read_at_every_token_does_not_change_the_text(deep, tmp_path, ranks, sync):
    options = ["--model", deep, *PROMPT, *EVEN, "--sync", sync, "--wire", "f32"]
    held = report_of(ranks, "generate", tmp_path, *options)
    assert not any(device["streamed_bytes"] for device in held["devices"])
    memory = max(device["weights_bytes"] for device in held["devices"]) * 3 // 4
    read = report_of(ranks, "generate", tmp_path, *options, "--memory", memory)
    assert read["token_ids"] == held["token_ids"]
    assert read["devices"][0]["streamed_bytes"] and read["devices"][0]["read_s"]
    assert all(device["resident_bytes"] <= memory for device in read["devices"])


@pytest.mark.mpi
@pytest.mark.slow
def test_each_rank_may_have_a_memory_of_its_own(deep, tmp_path):
    options = ["--model", deep, *PROMPT, *EVEN, "--wire", "f32"]
    held = report_of(3, "generate", tmp_path, *options)
    least = min(device["weights_bytes"] for device in held["devices"][1:]) * 3 // 4
    report = report_of(3, "generate", tmp_path, *options, "--memory", f"1G,2G,{least}")
    assert [bool(device["streamed_bytes"]) for device in report["devices"]] == [False, False, True]
    assert report["devices"][2]["resident_bytes"] <= least and report["token_ids"] == held["token_ids"]
    report = report_of(3, "generate", tmp_path, *options, "--memory", f"1G,{least}")
    assert [bool(device["streamed_bytes"]) for device in report["devices"]] == [False, True, True]


@pytest.mark.mpi
@pytest.mark.slow
def test_the_least_memory_is_told_and_suffices(deep, tmp_path):
    told = halo(2, "generate", "--model", deep, *PROMPT, "--memory", "1K")
    (line,) = told.complaints
    least = re.search(r"needs at least (\d+) MiB .* but --memory allows 0 MiB", line)
    assert told.code == 2 and least
    report = report_of(2, "generate", tmp_path, "--model", deep, *PROMPT, "--memory", f"{least[1]}M")
    assert report["generated_tokens"] == 12


@pytest.mark.mpi
@pytest.mark.slow
def test_weights_read_before_the_first_prompt_are_the_same(deep, tmp_path):
    first, meanwhile = (report_of(2, "generate", tmp_path, "--model", deep, *PROMPT, *how) for how in (["--load-first"], []))
    assert first["token_ids"] == meanwhile["token_ids"] and first["load_s"] > 0 and meanwhile["load_s"] > 0
