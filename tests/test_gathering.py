"""Ranks with whole layers, as few as possible: how many units they get, what that costs, and that the text stays the same."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halo_mpi.errors import InputError
from halo_mpi.model.shapes import SHAPES
from halo_mpi.model.sizes import Sizes
from halo_mpi.schedule.advice import advise
from halo_mpi.schedule.candidates import with_cost
from halo_mpi.schedule.cost import Cluster, Device, sync_cost
from halo_mpi.schedule.dealing import by_layer
from halo_mpi.schedule.placement import Plan, changed_keys, make_plan, moved
from halo_mpi.schedule.room import room
from halo_mpi.schedule.shares import Work, best_shares
from halo_mpi.schedule.watch import LOOK_S, Watch
from halo_mpi.wire.messages import Kind
from tests.mpi import report_of
from tests.test_schedule import SMOLLM2, disks, found_by_calibration

pytestmark = pytest.mark.timeout(120)
SIZES = Sizes(SHAPES["smollm2-135m"])
WORK = Work.of(SIZES, 512)
GOOD, BAD = Device("pi", 3, 6, link_ms=0.2), Device("far", 3, 6, link_ms=0.2, late_rate=0.3, late_ms=60)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=9).filter(any), st.integers(1, 40), st.data())
def test_everybody_has_in_all_layers_what_it_would_have_and_the_gathered_few_of_them(counts, layers, data):
    ranks = len(counts)
    gathered = data.draw(st.lists(st.integers(0, ranks - 1), unique=True))
    table, units = by_layer(counts, layers, gathered), sum(counts)
    assert table.shape == (layers, ranks) and (table >= 0).all() and (table.sum(1) == units).all()
    assert table.sum(0).tolist() == [layers * count for count in counts]
    total = layers * sum(counts[rank] for rank in gathered)
    assert (table[:, gathered].any(1)).sum() <= total // units + len(gathered) if gathered else (table == counts).all()
    for rank in gathered:
        assert (table[:, rank] == units).sum() == layers * counts[rank] // units


def test_whole_layers_lie_far_from_each_other_and_from_the_ends():
    table = by_layer([2, 2, 2, 2, 2, 1, 1], 24, [5, 6])
    theirs = np.flatnonzero(table[:, 5:].any(1))
    assert len(theirs) == 4 and np.diff(theirs).min() == np.diff(theirs).max() == 6 and 0 not in theirs and 23 not in theirs
    assert table[theirs, 5].tolist() == [12, 0, 12, 0]
    rest = np.delete(table[:, :5], theirs, 0)
    assert rest.min() >= 2 and rest.max() <= 3, "the others share evenly"


def test_the_cost_of_gathered_shares_is_the_mean_of_their_syncs():
    cluster = Cluster([GOOD, GOOD, BAD], sync_ms=0.3, further_ms=0.1, head_ms=2)
    shares = with_cost(cluster, WORK, [5, 4, 0], [6, 4, 2], [2])
    alone, others = sync_cost(cluster, Kind.FFN, [0, 0, 1.0]), [sync_cost(cluster, Kind.FFN, [own, 1 - own, 0]) for own in (7 / 12, 8 / 12)]
    rows = shares.by_layer(30)[1]
    sevens = int((rows[:, 0] == 7).sum())
    assert set(rows[:, 0].tolist()) == {0, 7, 8} and (rows[:, 2] == 12).sum() == 5
    ffn = 5 * alone.ms + sevens * others[0].ms + (25 - sevens) * others[1].ms
    assert shares.cost.tpot_ms == pytest.approx(30 * sync_cost(cluster, Kind.ATTENTION, [5 / 9, 4 / 9, 0]).ms + ffn + 2)


def with_memory_for(good: int, bad: int) -> Cluster:
    """Six devices, of which three have room for all heads and a group each and three for so many groups; and two with bad links."""
    rooms = [WORK.bytes_of(3, 1)] * 3 + [WORK.bytes_of(0, good)] * 3 + [WORK.bytes_of(0, bad)] * 2
    rooms[0] += WORK.root_bytes
    return Cluster([replace(BAD if rank > 5 else GOOD, memory=int(own) + 100) for rank, own in enumerate(rooms)], sync_ms=0.3)


def test_where_memory_needs_bad_links_their_work_is_gathered():
    cluster = with_memory_for(2, 2)
    best = best_shares(cluster, WORK)
    assert best.gathered and set(best.gathered) <= {6, 7} and any(best.groups[rank] for rank in (6, 7))
    everywhere = with_cost(cluster, WORK, best.heads, best.groups)
    assert best.cost.tpot_ms < 0.6 * everywhere.cost.tpot_ms
    found = found_by_calibration()
    plan = make_plan(SMOLLM2, "auto", disks(SMOLLM2, 8, 8), found, advise(cluster, WORK, True))
    assert plan.gathered == best.gathered and plan.counts(8) == (list(best.heads), list(best.groups))
    assert room(plan, SIZES, cluster, WORK) >= 0
    assert Plan.from_dict(plan.to_dict()).gathered == plan.gathered
    again = moved(plan, SMOLLM2, best.heads, best.groups, (6, 7), disks(SMOLLM2, 8, 8), found, best.gathered)
    assert not changed_keys(plan, again), "nothing moves without need"


@pytest.mark.parametrize("device", [GOOD, replace(GOOD, ffn_ms=20.0, attention_ms=9.0), replace(BAD, late_rate=0.01, late_ms=8)])
def test_nothing_is_gathered_where_links_are_good_or_nobody_needs_the_bad_ones(device):
    assert best_shares(Cluster([GOOD, GOOD, GOOD, device], sync_ms=0.1), WORK).gathered == ()
    assert best_shares(Cluster([GOOD, GOOD, GOOD, BAD], sync_ms=0.1), WORK).gathered == ()


def test_work_that_is_gathered_already_does_not_move_again():
    cluster = with_memory_for(2, 2)
    best = best_shares(cluster, WORK)
    watch, now = Watch(WORK, True, (6, 7)), 100.0
    for _ in range(40):
        now += LOOK_S
        assert watch.look(cluster, list(best.heads), list(best.groups), now, best.gathered) is None
    watch = Watch(WORK, True, (6,))
    for _ in range(40):
        now += LOOK_S
        assert watch.look(cluster, list(best.heads), list(best.groups), now, best.gathered) is None, "that 7 is unstable too changes nothing"
    watch, targets = Watch(WORK, True, (6, 7)), []
    for _ in range(40):
        now += LOOK_S
        targets.append(watch.look(cluster, list(best.heads), list(best.groups), now))
    found = [target for target in targets if target]
    assert found and found[0].advice.shares.gathered == best.gathered and found[0].gain > 0.1


@pytest.mark.parametrize("gathered", [[0], [4], [1, 1], "1", [1.0], [True]])
def test_wrong_ranks_to_gather_are_told(tmp_path, gathered):
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"heads": [3, 2, 2, 2], "groups": [3, 3, 3, 3], "gathered": gathered}))
    with pytest.raises(InputError, match="gathered .* must be a list of workers, ranks from 1 to 3"):
        make_plan(SMOLLM2, str(file), disks(SMOLLM2, 4, 4))


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_gathered_ranks_compute_the_same_text(deep, tmp_path, ranks):
    file = tmp_path / "p.json"
    heads, groups = ([count - ranks + 1, *[1] * (ranks - 1)] for count in (4, 3))
    file.write_text(json.dumps({"heads": heads, "groups": groups, "gathered": list(range(1, ranks))}))
    options = ("--model", deep, "--prompt", "The dog", "--max-tokens", "8", "--ignore-eos", "--wire", "f32", "--kernel", "reference")
    alone = report_of(1, "generate", tmp_path, *options)
    shared = report_of(ranks, "generate", tmp_path, *options, "--placement", file)
    assert shared["token_ids"] == alone["token_ids"]


def with_slow_disks(read_gbps: float) -> Cluster:
    """Five devices of which two have bad links, each with memory for a quarter of the work."""
    memory = WORK.bytes_of(WORK.heads, WORK.groups) // 4
    workers = [replace(device, memory=memory, read_gbps=read_gbps) for device in (GOOD, GOOD, BAD, BAD)]
    root = replace(GOOD, memory=WORK.root_bytes + memory, read_gbps=read_gbps, link_ms=0.0)
    return Cluster([root, *workers], sync_ms=0.3, further_ms=0.1)


def test_gathering_is_tried_where_memory_is_short_and_disks_are_slow():
    reading, gathering = (best_shares(with_slow_disks(read_gbps), WORK) for read_gbps in (10.0, 0.05))
    assert not reading.gathered and gathering.gathered
    assert gathering.cost.tpot_ms < with_cost(with_slow_disks(0.05), WORK, gathering.heads, gathering.groups).cost.tpot_ms


def test_gathered_shares_are_looked_for_and_not_only_made_of_the_best_in_all_layers():
    best = best_shares(with_slow_disks(0.02), WORK)  # in all layers alike the best counts have heads on a bad device, too
    assert best.gathered == (3, 4) and best.heads[3:] == (0, 0)
    assert best == best_shares(with_slow_disks(0.05), WORK), "where nobody reads, it does not matter how fast disks are"
