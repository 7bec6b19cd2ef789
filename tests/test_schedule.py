"""Placement of heads and groups, and the check of memory."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halo_mpi.errors import InputError, MemoryBudgetError, UsageError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.records import shard_index, split_evenly
from halo_mpi.model.sizes import Sizes, shape_bytes
from halo_mpi.schedule.advice import Advice
from halo_mpi.schedule.cost import Cluster, Device
from halo_mpi.schedule.memory import Need, check_memory
from halo_mpi.schedule.placement import Plan, make_plan, order_of_heads
from halo_mpi.schedule.shares import Work, with_cost

SMOLLM2 = ModelConfig("smollm2", 30, 576, 9, 3, 64, 1536, 49152, 8192, 1e-5, 1e5, None, True)
configs = st.builds(
    lambda kv, rep, ffn: replace(SMOLLM2, layers=2, kv_heads=kv, heads=kv * rep, ffn=ffn),
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 5000),
)  # fmt: skip


def disks(config: ModelConfig, ranks: int, shards: int, held=lambda rank, shard: True):
    """What each rank's disk holds if it has the shards that `held` says."""
    result = []
    for rank in range(ranks):
        own = [shard_index(config, shard, shards) for shard in range(shards) if held(rank, shard)]
        result.append({table: {entry for index in own for entry in index[table]} for table in ("query", "ffn")})
    return result


@settings(deadline=None)
@given(config=configs, ranks=st.integers(1, 20), shards=st.integers(1, 9))
def test_even_shares_differ_by_at_most_one(config, ranks, shards):
    plan = make_plan(config, "even", disks(config, ranks, shards))
    for table, count in ((plan.query, config.heads), (plan.ffn, config.groups)):
        assert table.shape == (config.layers, count)
        sizes = np.bincount(table[0], minlength=ranks)
        assert sizes.sum() == count and sizes.max() - sizes.min() <= 1


@settings(deadline=None)
@given(config=configs, ranks=st.integers(1, 8))
def test_a_rank_with_one_shard_gets_work_from_that_shard_only(config, ranks):
    available = disks(config, ranks, ranks, lambda rank, shard: rank == shard)
    plan = make_plan(config, "even", available)
    for rank in range(ranks):
        assert set(plan.query_heads(rank)[0]) <= available[rank]["query"]
        assert set(plan.groups(rank)[0]) <= available[rank]["ffn"]


@settings(deadline=None)
@given(config=configs, shards=st.integers(1, 12))
def test_the_shards_hold_everything_and_every_head_lies_beside_its_kv_head(config, shards):
    indexes = [shard_index(config, shard, shards) for shard in range(shards)]
    assert sorted(head for index in indexes for head in index["query"]) == list(range(config.heads))
    assert sorted(group for index in indexes for group in index["ffn"]) == list(range(config.groups))
    for index in indexes:
        assert {head // config.heads_per_kv for head in index["query"]} == set(index["kv"])


def test_the_root_gets_no_more_than_others():
    assert split_evenly(9, 4) == [2, 2, 2, 3]
    for ranks in (2, 4, 5, 8):
        plan = make_plan(SMOLLM2, "even", disks(SMOLLM2, ranks, 4))
        for owner in (plan.query[0], plan.ffn[0]):
            assert np.bincount(owner, minlength=ranks)[0] == np.bincount(owner, minlength=ranks).min()


def test_root_attention_keeps_all_heads_on_the_root():
    plan = make_plan(SMOLLM2, "root-attention", disks(SMOLLM2, 4, 4))
    assert (plan.query == 0).all() and len(set(plan.ffn[0])) == 4


def found_by_calibration(seed: int = 0) -> dict:
    """A calibration's importance of SmolLM2's heads, at random."""
    return {"heads": {"importance": np.random.default_rng(seed).random((SMOLLM2.layers, SMOLLM2.heads)).tolist()}}


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 13])
def test_the_root_gets_what_matters_most_and_the_workers_alike(ranks):
    found = found_by_calibration()
    plan = make_plan(SMOLLM2, "auto", disks(SMOLLM2, ranks, 4), found)
    assert plan.name == "importance"
    counts = np.bincount(plan.ffn[0], minlength=ranks)
    assert counts.max() - counts.min() <= 1 and set(plan.groups(0)[0]) == set(range(counts[0]))
    if ranks in (3, 4):  # each worker has some of the better and some of the worse
        assert np.ptp([np.mean(plan.groups(rank)[0]) for rank in range(1, ranks)]) <= ranks
    for layer, importance in enumerate(np.array(found["heads"]["importance"])):
        heads = plan.query_heads(0)[layer]
        of_kv = importance.reshape(SMOLLM2.kv_heads, -1).sum(1)
        assert len(heads) == SMOLLM2.heads // ranks
        if heads and len(heads) <= SMOLLM2.heads_per_kv:
            assert {head // SMOLLM2.heads_per_kv for head in heads} == {of_kv.argmax()}
    if ranks == 4:  # and in each layer another worker has the next best heads
        best = found["heads"]["importance"]
        ranked = [np.array(best[layer])[plan.query_heads(rank)[layer]].mean() for layer in range(30) for rank in (1, 2, 3)]
        assert np.ptp(np.reshape(ranked, (30, 3)).mean(0)) < 0.2
    for layer, importance in enumerate(np.array(found["heads"]["importance"])):
        heads = plan.query_heads(0)[layer]
        of_kv = importance.reshape(SMOLLM2.kv_heads, -1).sum(1)
        if heads and len(heads) <= SMOLLM2.heads_per_kv:
            assert min(importance[heads]) >= max(
                [importance[head] for head in range(9) if head // 3 == of_kv.argmax() and head not in heads], default=0
            )


def test_what_only_a_worker_has_on_its_disk_is_its_own_whatever_it_matters():
    available = disks(SMOLLM2, 3, 3, lambda rank, shard: rank == shard)
    plan = make_plan(SMOLLM2, "auto", available, found_by_calibration())
    for rank in range(3):
        assert {group for own in plan.groups(rank) for group in own} <= available[rank]["ffn"]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=8).filter(any), st.booleans())
def test_nobody_needs_more_kv_heads_than_its_memory_was_reckoned_for(wanted, calibrated):
    """Who has a whole number of KV heads shares none of them, whatever the others have."""
    heads, ranks, work = [count * 9 // sum(wanted) for count in wanted], len(wanted), Work.of(Sizes(SMOLLM2), 512)
    heads[0] += 9 - sum(heads)
    shares = with_cost(Cluster([Device("pi", 3, 6)] * ranks), work, heads, split_evenly(12, ranks))
    advice = Advice({"measured": shares}, "measured", ())
    plan = make_plan(SMOLLM2, "auto", disks(SMOLLM2, ranks, 4), found_by_calibration() if calibrated else None, advice)
    assert plan.counts(ranks)[0] == heads
    for rank, layers in enumerate(map(plan.query_heads, range(ranks))):
        assert max(len({head // 3 for head in own}) for own in layers) <= work.kv_heads(heads[rank])


@pytest.mark.parametrize("heads", [[2, 3, 2, 2], [1, 3, 3, 2], [5, 3, 0, 1]])
def test_the_unstable_have_the_heads_that_matter_least_though_others_would_like_whole_kv_heads(heads):
    """Only within a tier does somebody wait until a KV head begins."""
    shares = with_cost(Cluster([Device("pi", 3, 6)] * 4), Work.of(Sizes(SMOLLM2), 512), heads, [3] * 4)
    found = found_by_calibration()
    plan = make_plan(SMOLLM2, "auto", disks(SMOLLM2, 4, 4), found, Advice({"measured": shares}, "measured", (3,)))
    for layer, importance in enumerate(found["heads"]["importance"]):
        owners = plan.query[layer][order_of_heads(SMOLLM2, importance)].tolist()
        assert owners[: heads[0]] == [0] * heads[0] and owners[9 - heads[3] :] == [3] * heads[3]


def placement_file(folder, content) -> str:
    (folder / "placement.json").write_text(json.dumps(content))
    return str(folder / "placement.json")


def test_unstable_ranks_get_what_matters_least(tmp_path):
    tiers, found = [[0], [1, 2, 5], [3, 4]], found_by_calibration()
    plan = make_plan(SMOLLM2, placement_file(tmp_path, {"tiers": tiers}), disks(SMOLLM2, 6, 4), found)
    worst = [max(group for rank in tier for group in plan.groups(rank)[1]) for tier in tiers]
    best = [min(group for rank in tier for group in plan.groups(rank)[1]) for tier in tiers]
    assert worst[0] < best[1] and worst[1] < best[2]
    assert np.bincount(plan.query[1], minlength=6).tolist() == [1, 2, 2, 1, 1, 2]  # the remainder goes to the stable workers
    for layer, importance in enumerate(np.array(found["heads"]["importance"]).reshape(SMOLLM2.layers, 3, 3).sum(2)):
        if layer in (0, SMOLLM2.layers - 1):
            assert not set(plan.query[layer]) & {3, 4} and not set(plan.ffn[layer]) & {3, 4}
            continue
        assert {head // 3 for rank in (3, 4) for head in plan.query_heads(rank)[layer]} == {importance.argmin()}


def test_tiers_may_come_with_counts(tmp_path):
    heads, groups = [0, 3, 6], [2, 4, 6]
    content = {"tiers": [[1], [2], [0]], "heads": heads, "groups": groups}
    plan = make_plan(SMOLLM2, placement_file(tmp_path, content), disks(SMOLLM2, 3, 4), found_by_calibration())
    assert np.bincount(plan.ffn[0]).tolist() == groups and np.bincount(plan.query[0], minlength=3).tolist() == heads
    assert plan.groups(1)[0] == [0, 1, 2, 3] and plan.groups(0)[0] == [10, 11]


@pytest.mark.parametrize(
    "tiers", [[[0], [1]], [[0], [1], [1, 2]], [[0, 1, 2, 3]], [0, 1, 2], [[0], [], [1, 2]], "all", [["0"], [1, 2]]]
)
def test_wrong_tiers_are_named(tmp_path, tiers):
    with pytest.raises(InputError, match="placement.json: tiers"):
        make_plan(SMOLLM2, placement_file(tmp_path, {"tiers": tiers}), disks(SMOLLM2, 3, 4), found_by_calibration())


def test_tiers_need_a_calibrated_model(tmp_path):
    with pytest.raises(UsageError, match="calibrate"):
        make_plan(SMOLLM2, placement_file(tmp_path, {"tiers": [[0], [1]]}), disks(SMOLLM2, 2, 4))


def test_without_calibration_or_workers_auto_is_even():
    assert make_plan(SMOLLM2, "auto", disks(SMOLLM2, 4, 4)).name == "even"
    assert make_plan(SMOLLM2, "auto", disks(SMOLLM2, 1, 4), found_by_calibration()).name == "even"
    even = make_plan(SMOLLM2, "even", disks(SMOLLM2, 4, 4), found_by_calibration())
    assert even.name == "even" and np.ptp([np.mean(even.groups(rank)[0]) for rank in range(4)]) <= 1  # the groups are sorted


def test_a_group_that_nobody_holds_is_named():
    with pytest.raises(InputError, match="FFN group 1;|query head 2;"):
        make_plan(SMOLLM2, "even", disks(SMOLLM2, 2, 4, lambda rank, shard: shard != 1))


def test_a_plan_survives_the_trip_through_json():
    plan = make_plan(SMOLLM2, "even", disks(SMOLLM2, 5, 2))
    again = Plan.from_dict(plan.to_dict())
    assert (again.query == plan.query).all() and (again.ffn == plan.ffn).all() and again.name == plan.name


def test_the_bytes_of_a_share_are_those_that_loading_takes(tiny):
    from halo_mpi.model.llama import Share
    from halo_mpi.model.whole import load_layer
    from halo_mpi.store.reader import ModelStore

    store = ModelStore(tiny)
    config = ModelConfig.from_dict(store.meta["config"])
    heads, groups = [[0, 2, 3], [1]], [[0, 2], []]
    layers = [load_layer(store, config, layer, heads[layer], groups[layer]) for layer in range(2)]
    share = Share(config, layers, 40)
    parts = list(map(shape_bytes, Sizes(config).parts(heads, groups)))
    assert [parts[0] + parts[1], parts[2] + parts[3]] == [layer.nbytes for layer in layers] and parts[3] == 0
    assert Sizes(config).cache_bytes(heads, 40) == sum(keys.nbytes + values.nbytes for keys, values in share.kv)


BASE_BYTES = 320 * 2**20


def need(rank, host="pi", weights=100, cache=0, available=10 * BASE_BYTES, budget=None, machine=None):
    return Need(rank, host, machine or host, weights, cache, 0, available, budget, BASE_BYTES)


def test_memory_that_suffices_is_no_error():
    check_memory([need(0), need(1), need(2, "other", budget=100)], 10)


def test_ranks_of_one_host_share_its_memory():
    share = 2 * BASE_BYTES
    check_memory([need(0, weights=share), need(1, "other", weights=share)], 10)
    with pytest.raises(MemoryBudgetError, match=r"host pi \(rank 0, 1, 2, 3\)"):
        check_memory([need(rank, weights=share) for rank in range(4)], 10)


def test_boards_of_one_name_are_not_one_machine():
    check_memory([need(rank, weights=2 * BASE_BYTES, machine=f"pi {rank}") for rank in range(4)], 10)


def test_a_share_over_the_budget_names_rank_and_parts():
    with pytest.raises(MemoryBudgetError, match=r"rank 1 on pi needs at least 30 MiB \(weights 20 MiB, KV cache 10 MiB\).*10 tokens"):
        check_memory([need(0), need(1, weights=20 * 2**20, cache=10 * 2**20, budget=2**20)], 10)
