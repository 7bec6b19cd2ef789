"""The cost model, the shares that it leads to, and `plan`."""

import json
import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.solver import drawn
from halo_mpi.errors import MemoryBudgetError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.shapes import SHAPES
from halo_mpi.model.sizes import Sizes, shape_bytes
from halo_mpi.schedule.advice import advise
from halo_mpi.schedule.cost import Cluster, Device, Reads, sync_cost, token_cost
from halo_mpi.schedule.placement import make_plan
from halo_mpi.schedule.reading import reading_of
from halo_mpi.schedule.residence import reside
from halo_mpi.schedule.search import tables
from halo_mpi.schedule.shares import Work, best_shares, fits, with_cost
from halo_mpi.wire.messages import Kind
from tests.lab import SCENARIOS
from tests.lab import run as run_lab
from tests.mpi import halo, report_of, succeed
from tests.test_schedule import disks, found_by_calibration

SMOLLM2 = SHAPES["smollm2-135m"]
mpi, lab = pytest.mark.mpi, pytest.mark.lab
small_devices = st.builds(
    Device, st.just("pi"), st.floats(1, 20), st.floats(1, 20), st.floats(0, 0.5), st.floats(0, 5),
    st.sampled_from([0.0, 0.1]), st.just(10.0),
)  # fmt: skip


def splits(count: int, parts: int):
    """All ways to share `count` things."""
    return (shares for shares in product(range(count + 1), repeat=parts) if sum(shares) == count)


@settings(deadline=None, max_examples=60)
@given(
    devices=st.lists(small_devices, min_size=1, max_size=3),
    memory=st.none() | st.lists(st.floats(0.2, 1.2), min_size=3, max_size=3),
    read_gbps=st.lists(st.none() | st.floats(1e-5, 1e-3), min_size=3, max_size=3),
    heads=st.integers(1, 6),
    groups=st.integers(1, 6),
    further_ms=st.floats(0, 1),
)
def test_no_other_shares_are_much_faster(devices, memory, read_gbps, heads, groups, further_ms):
    work = Work(2, heads, groups, 2 if heads % 2 == 0 else 1, 10, 7, 20, 15, 100, 3, 12, 6, 2)
    if memory:
        whole = work.bytes_of(heads, groups) + work.root_bytes
        limits = zip(memory, read_gbps)
        devices = [replace(device, memory=int(part * whole), read_gbps=gbps) for device, (part, gbps) in zip(devices, limits)]
    cluster, ranks = Cluster(devices, 0.2, further_ms, 1.0), len(devices)
    every = (counts for counts in product(splits(heads, ranks), splits(groups, ranks)) if fits(cluster, work, counts))
    best = min((with_cost(cluster, work, *counts).cost.tpot_ms for counts in every), default=None)
    try:
        found = best_shares(cluster, work)
    except MemoryBudgetError:
        assert best is None
        return
    assert best is not None and fits(cluster, work, (found.heads, found.groups))
    assert found.cost.tpot_ms <= 1.001 * best


@settings(deadline=None)
@given(
    device=small_devices,
    memory=st.none() | st.floats(0.1, 1.2),
    read_gbps=st.none() | st.floats(1e-5, 1e-2),
    heads=st.sampled_from([2, 3, 8]),
    groups=st.integers(1, 12),
    is_root=st.booleans(),
)
def test_more_groups_never_make_a_share_shorter(device, memory, read_gbps, heads, groups, is_root):
    """By this the search counts how many groups a device may have."""
    work = Work(2, heads, groups, 2 if heads % 2 == 0 else 1, 10, 7, 20, 15, 100, 3, 12, 6, 2)
    whole = work.bytes_of(heads, groups) + work.root_bytes
    device = replace(device, memory=memory and int(memory * whole), read_gbps=read_gbps)
    for table in tables(work, device, is_root)[:2]:
        table = np.where(np.isfinite(table), np.round(table, 9), np.inf)
        assert (table[:, 1:] >= table[:, :-1]).all()


@pytest.mark.parametrize("disks, found_ms", ((False, 3249.5), (True, 3547.5)))
def test_shares_of_sixteen_devices_are_found_soon(disks, found_ms):
    """In less than a second where nothing else runs: `bench.solver`. `found_ms`: by an earlier search."""
    sizes = Sizes(SHAPES["llama-2-13b"])
    work = Work.of(sizes, 512)
    cluster = drawn(np.random.default_rng(7), sizes, work, 16, disks)
    begin = time.process_time()
    shares = best_shares(cluster, work)
    assert time.process_time() - begin < 2
    assert (sum(shares.heads), sum(shares.groups)) == (work.heads, work.groups)
    assert shares.gathered or fits(cluster, work, (shares.heads, shares.groups))
    assert shares.cost.tpot_ms < 1.02 * found_ms


def test_shares_are_in_proportion_to_speed():
    cluster = Cluster([Device("pi5", 4, 8), *[Device("pi4", 12, 24)] * 3])
    shares = best_shares(cluster, Work.of(Sizes(SHAPES["llama-2-7b"]), 512))
    assert shares.heads == (17, 5, 5, 5) or sorted(shares.heads) == [5, 5, 6, 16]
    assert shares.groups[0] == pytest.approx(43, abs=1) and max(shares.groups[1:]) - min(shares.groups[1:]) <= 1


def test_a_root_that_cannot_hold_the_vocabulary_is_told():
    devices = [Device("pi", 2, 2, memory=10 * 2**20), Device("server", 2, 2)]
    with pytest.raises(MemoryBudgetError, match="the root's memory, 10 MiB, does not hold"):
        best_shares(Cluster(devices), Work.of(Sizes(SMOLLM2), 512))


def test_shares_that_fit_evenly_are_never_refused():
    config = ModelConfig("Llama-3-8B shape", 32, 4096, 32, 8, 128, 14336, 128256, 8192, 1e-5, 5e5)
    work = Work.of(Sizes(config), 8192)
    heads, groups = [list(range(4))] * 32, [list(range(14))] * 32
    weights, cache = sum(map(shape_bytes, Sizes(config).parts(heads, groups))), Sizes(config).cache_bytes(heads, 8192)
    devices = [Device("pi", 10, 10, memory=weights + cache + (work.root_bytes if rank == 0 else 0)) for rank in range(8)]
    assert max(best_shares(Cluster(devices), work).heads) == 4


def test_disks_limit_the_shares():
    devices = [Device("pi", 10, 10), Device("pi", 1, 1, disk_heads=2, disk_groups=0), Device("pi", 10, 10)]
    shares = best_shares(Cluster(devices), Work.of(Sizes(SMOLLM2), 512))
    assert shares.heads[1] == 2 and shares.groups[1] == 0


def test_the_one_fast_device_is_found_behind_the_slower_link():
    devices = [Device("pi", 40, 80), *[Device("slow", 400, 800, link_ms=0.4)] * 15, Device("fast", 4, 8, link_ms=0.5)]
    shares = best_shares(Cluster(devices, 0.0, 0.3), Work.of(Sizes(SHAPES["llama-2-7b"]), 512))
    assert shares.heads[16] > 25 and sum(1 for own in shares.groups if own) <= 2


def test_a_worker_behind_a_slow_link_gets_nothing_if_its_share_would_hold_everybody_up():
    near, far = Device("near", 2, 2, link_ms=0.1), Device("far", 2, 2, link_ms=50)
    shares = best_shares(Cluster([replace(near, link_ms=0), near, far]), Work.of(Sizes(SMOLLM2), 512))
    assert shares.heads[2] == shares.groups[2] == 0 and min(shares.heads[:2]) >= 4


def test_with_so_little_memory_that_all_are_needed_all_get_something():
    work = Work.of(Sizes(SMOLLM2), 512)
    each = (work.bytes_of(work.heads, work.groups) + 2 * work.kv_bytes) / 3
    devices = [Device(str(rank), 2, 2, link_ms=50 * rank, memory=int(1.1 * each)) for rank in range(3)]
    devices[0] = replace(devices[0], memory=devices[0].memory + work.root_bytes)
    shares = best_shares(Cluster(devices), work)
    assert all(shares.heads[rank] or shares.groups[rank] for rank in range(3))
    with pytest.raises(MemoryBudgetError, match="no shares were found that the devices' memory holds"):
        best_shares(Cluster(devices[:2]), work)


@pytest.mark.parametrize("counts", [((9, 0), (12, 0)), ((3, 6), (7, 5)), ((0, 9), (6, 6))])
def test_memory_is_counted_as_it_is_taken(counts):
    """Of neighbouring heads, with at most one KV head more than they may need."""
    work = Work.of(Sizes(SMOLLM2), 100)
    for heads, groups in zip(*counts):
        own = [list(range(heads))] * 30, [list(range(groups))] * 30
        weights, cache = sum(map(shape_bytes, Sizes(SMOLLM2).parts(*own))), Sizes(SMOLLM2).cache_bytes(own[0], 100)
        assert 0 <= work.bytes_of(heads, groups) - weights - cache <= work.kv_bytes
    assert work.root_bytes == Sizes(SMOLLM2).vocabulary_bytes() == 4 * 576 * 49152


@pytest.mark.parametrize("heads, groups", [(9, 12), (3, 4), (0, 12)])
@pytest.mark.parametrize("is_root", [False, True])
@pytest.mark.parametrize("held", [0.3, 0.6, 0.9])
def test_what_is_read_is_what_does_not_stay(heads, groups, is_root, held):
    """Up to one part, since parts stay as a whole."""
    work, own = Work.of(Sizes(SMOLLM2), 100), [list(range(heads))] * 30
    sizes = [*map(shape_bytes, Sizes(SMOLLM2).parts(own, [list(range(groups))] * 30))]
    cache = Sizes(SMOLLM2).cache_bytes(own, 100)
    if is_root:
        sizes += [shape_bytes(Sizes(SMOLLM2).head(block)) for block in range(12)]
    budget = int(held * sum(sizes))
    residence = reside(sizes, budget)
    found = reading_of(Device("pi", 1, 1, memory=budget + cache, read_gbps=0.5), work, is_root, heads, groups)
    embedding = 4 * 4096 * 576 if is_root else 0
    assert found.read_bytes - embedding == pytest.approx(residence.streamed_bytes, abs=max(sizes))
    assert found.held_bytes == pytest.approx(residence.nbytes + cache, abs=max(sizes)) and found.held_bytes <= budget + cache
    all_ms = 30 * (found.attention_ms + found.ffn_ms) + found.head_ms + found.embedding_ms
    assert all_ms == pytest.approx(found.read_bytes / 0.5e6) and (found.embedding_ms > 0) == is_root


def test_a_share_takes_as_long_as_computing_or_reading():
    devices = [Device("root", 4, 4), Device("a", 8, 8, 0.5, 1.0, read_gbps=1)]
    assert sync_cost(Cluster(devices), Kind.FFN, [0.5, 0.5], [0, 3]).longest_ms == 1 + 0.5 + 4
    assert sync_cost(Cluster(devices), Kind.FFN, [0.5, 0.5], [0, 7]).longest_ms == 1 + 7
    assert sync_cost(Cluster(devices), Kind.FFN, [1, 0], [0, 0]).longest_ms == 4
    reads = Reads([0, 3], [0, 7], 6, 2)
    assert token_cost(Cluster(devices, head_ms=5), 10, [1, 1], [1, 1], reads).tpot_ms == 10 * (5.5 + 8) + 6 + 2


@pytest.mark.parametrize("gbps, least, most", [(20.0, 9, 14), (2.0, 3, 8), (0.1, 0, 2), (None, 0, 2)])
def test_a_device_with_little_memory_gets_what_its_disk_can_give(gbps, least, most):
    shape = SHAPES["tinyllama"]
    work = Work.of(Sizes(shape), 512)
    little = work.bytes_of(0, 2) + (0 if gbps is None else 2 * work.bytes_of(0, 15) // work.layers)
    devices = [Device("pi", 12, 24), *[Device("pi", 12, 24, link_ms=0.2)] * 2]
    shares = best_shares(Cluster([*devices, Device("small", 12, 24, 0, 0.2, memory=little, read_gbps=gbps)]), work)
    assert least <= shares.groups[3] <= most


def test_reading_makes_shares_possible_that_memory_does_not_hold():
    work = Work.of(Sizes(SMOLLM2), 512)
    devices = [Device("pi", 2, 2, memory=150 * 2**20)] * 2
    with pytest.raises(MemoryBudgetError, match="or read from disk: generate --memory"):
        best_shares(Cluster(devices), work)
    reading = Cluster([replace(device, read_gbps=0.5) for device in devices])
    shares = best_shares(reading, work)
    assert shares.cost.tpot_ms > 100 and fits(reading, work, (shares.heads, shares.groups))
    with pytest.raises(MemoryBudgetError, match="no shares were found|the root's memory") as error:
        best_shares(Cluster([replace(device, memory=15 * 2**20) for device in reading.devices]), work)
    assert "--memory" not in str(error.value)


def test_a_sync_waits_for_the_longest_share_and_for_repairs():
    devices = [Device("root", 4, 4), Device("a", 8, 8, 0.5, 1.0, 0.1, 20), Device("b", 8, 8, 0.5, 2.0, 0.2, 10)]
    sync = sync_cost(Cluster(devices, 0.5, 0.25), Kind.FFN, [0.5, 0.25, 0.25])
    assert sync.longest == 2 and sync.longest_ms == pytest.approx(2 + 0.5 + 2)
    assert sync.further_ms == 0.75 and sync.stall_ms == pytest.approx(0.1 * 20 + 0.9 * 0.2 * 10)
    cost = token_cost(Cluster(devices, 0.5, 0.25, 7.0), 30, [9, 0, 0], [6, 3, 3])
    assert cost.tpot_ms == pytest.approx(30 * (4 + sync.ms) + 7)


def test_small_differences_change_nothing_and_large_ones_do():
    work = Work.of(Sizes(SMOLLM2), 512)
    even = advise(Cluster([Device("pi", 10, 10), *[Device("pi", 10.5, 10.5, link_ms=0.1)] * 3]), work, False)
    hot = advise(Cluster([Device("pi", 10, 10), *[Device("pi", 10, 10)] * 2, Device("hot", 40, 40)]), work, False)
    assert even.chosen == "even" and hot.chosen == "measured"
    assert hot.shares.groups[3] < 3 and hot.options["even"].cost.tpot_ms > 2 * hot.shares.cost.tpot_ms


def test_the_plan_takes_the_measured_shares_and_gives_what_matters_least_to_the_unstable():
    devices = [Device("pi", 10, 10)] * 2 + [Device("bad", 10, 10, late_rate=0.3, late_ms=0.1), Device("hot", 40, 40)]
    advice = advise(Cluster(devices), Work.of(Sizes(SMOLLM2), 512), True)
    plan = make_plan(SMOLLM2, "auto", disks(SMOLLM2, 4, 4), found_by_calibration(), advice)
    assert plan.name == "measured" and advice.unstable == (2,)
    for rank in range(4):
        assert len(plan.query_heads(rank)[5]) == advice.shares.heads[rank]
        assert len(plan.groups(rank)[5]) == advice.shares.groups[rank]
    assert min(plan.groups(2)[5]) > max(plan.groups(1)[5] + plan.groups(3)[5])


def test_a_disk_without_the_shard_keeps_a_rank_from_its_measured_share():
    available = disks(SMOLLM2, 2, 2, lambda rank, shard: rank == shard)
    advice = advise(Cluster([Device("pi", 10, 10), Device("hot", 100, 100)]), Work.of(Sizes(SMOLLM2), 512), False)
    plan = make_plan(SMOLLM2, "auto", available, None, advice)
    assert set(plan.groups(1)[0]) == available[1]["ffn"]


@mpi
@pytest.mark.slow
def test_a_budget_is_planned_with_what_the_disk_gives(tiny):
    planned = json.loads(succeed(halo(2, "plan", "--model", tiny, "--memory", "2G", "--json")).out)
    assert all(device["read_gbps"] > 0.01 and device["memory"] == 2 * 2**30 for device in planned["devices"])
    planned = json.loads(succeed(halo(2, "plan", "--model", tiny, "--json")).out)
    assert all(device["read_gbps"] is None for device in planned["devices"])


@mpi
@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_plan_measures_the_ranks_that_it_runs_on(tiny, ranks):
    out = succeed(halo(ranks, "plan", "--model", tiny)).out
    assert "A token takes" in out and "considered" in out and out.count("\n│") >= ranks


@mpi
@pytest.mark.slow
def test_auto_measures_and_says_what_it_chose(tiny, tmp_path):
    options = ("--model", tiny, "--prompt", "The", "--max-tokens", 4, "--placement", "auto", "--wire", "f32")
    report = report_of(3, "generate", tmp_path, *options)
    said = [event["what"] for event in report["events"] if "shares by rank" in event["what"]]
    assert len(said) == 1 and "predicted" in said[0]
    assert report["token_ids"] == report_of(1, "generate", tmp_path, *options)["token_ids"]


@mpi
@pytest.mark.parametrize("options, part", [
    (("--model", "gone.halo"), "gone.halo"),
    ((), "either --model DIR or --shape NAME"),
    (("--shape", "tinyllama"), "--shape needs --devices"),
    (("--model", "M", "--memory", "1K"), "the root's memory, 0 MiB, does not hold"),
])  # fmt: skip
def test_a_wrong_plan_is_one_line_and_code_2(tiny, options, part):
    finished = halo(2, "plan", *(tiny if option == "M" else option for option in options))
    assert finished.code == 2 and len(finished.complaints) == 1 and part in finished.complaints[0], finished.err


@lab
def test_a_hot_device_gets_less_and_a_token_takes_what_was_predicted(can, smollm2, tmp_path):
    can("kernel")
    report = tmp_path / "report.json"
    command = [
        "python",
        "-m",
        "halo_mpi.generate",
        "--model",
        smollm2("int8"),
        "--prompt",
        "The",
        "--max-tokens",
        24,
        "--ignore-eos",
    ]
    done = run_lab("run", SCENARIOS / "hot-pi.toml", "--", *command, "--json", report, timeout=100)
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    groups = [device["groups"] for device in result["devices"]]
    assert result["placement"] == "measured" and groups[2] < 0.5 * min(groups[:2] + groups[3:])
