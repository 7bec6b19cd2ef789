"""When work moves, where to, and what is known of the devices by then: without any network."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halo_mpi.model.shapes import SHAPES
from halo_mpi.model.sizes import Sizes, shape_bytes
from halo_mpi.schedule.cost import KINDS, Cluster, Device
from halo_mpi.schedule.placement import changed_keys, make_plan, moved, without_ends
from halo_mpi.schedule.room import room
from halo_mpi.schedule.shares import with_cost
from halo_mpi.schedule.work import Work
from halo_mpi.schedule.telemetry import Telemetry
from halo_mpi.schedule.watch import HOLD_S, LOOK_S, Watch
from halo_mpi.wire.messages import Kind
from tests.test_schedule import SMOLLM2, disks, found_by_calibration

pytestmark = pytest.mark.timeout(60)
WORK = Work.of(Sizes(SHAPES["smollm2-135m"]), 512)
ALIKE = Cluster([Device("pi1", 3, 6), *[Device(f"pi{number}", 3, 6, link_ms=0.2) for number in (2, 3, 4)]])
EVEN = [2, 2, 2, 3], [3, 3, 3, 3]
ALL = disks(SMOLLM2, 4, 4)


def with_device(rank: int, **fields) -> Cluster:
    return replace(
        ALIKE, devices=[replace(device, **fields) if at == rank else device for at, device in enumerate(ALIKE.devices)]
    )


HOT = with_device(2, attention_ms=12, ffn_ms=24)


# Telemetry


class Tokens:
    """Tokens of ten layers on even shares, 0.1 s each."""

    def __init__(self):
        self.telemetry, self.now = Telemetry(ALIKE), 0.0

    def pass_by(self, count: int = 8, slower=(1, 1, 1, 1), late=(0, 0, 0, 0), over_ms: float = 0.2, waited_for: bool = True):
        for _ in range(count):
            for sync in range(20):
                for rank, device in enumerate(ALIKE.devices):
                    kind = KINDS[sync % 2]
                    self.telemetry.computed(rank, kind, 0.25, slower[rank] * 0.25 * device.whole_ms(kind))
                    if rank:
                        self.telemetry.answered(rank, 9.2 if sync < 20 * late[rank] else over_ms, waited_for)
            self.end()
        return self.telemetry.cluster().devices

    def end(self) -> None:
        self.now += 0.1
        self.telemetry.end_token(self.now)


def test_a_device_that_became_slow_is_known_after_some_tokens_and_one_hiccup_is_nothing():
    tokens = Tokens()
    assert not tokens.telemetry.known
    tokens.pass_by()
    assert tokens.telemetry.known and tokens.pass_by(1, (1, 1, 9, 1))[2].ffn_ms == pytest.approx(6)
    hot = tokens.pass_by(8, (1, 1, 4, 1))
    assert hot[2].ffn_ms == pytest.approx(24, rel=0.1) and hot[1].ffn_ms == pytest.approx(6)
    assert tokens.pass_by()[2].attention_ms == pytest.approx(3)


def test_what_holds_up_small_shares_too_is_forgiven():
    tokens = Tokens()
    for _ in range(8):
        tokens.telemetry.computed(2, Kind.FFN, 1 / 12, 0.5 + 0.1)
        tokens.end()
    assert tokens.telemetry.cluster().devices[2].ffn_ms == pytest.approx(6)


def test_who_has_none_of_one_kind_is_as_fast_as_with_the_other():
    tokens = Tokens()
    tokens.pass_by(8, (1, 1, 4, 1))
    for _ in range(8):
        tokens.telemetry.computed(2, Kind.FFN, 1 / 12, 0.5)
        tokens.end()
    assert tokens.telemetry.cluster().devices[2].attention_ms == pytest.approx(3)


def test_late_answers_are_counted():
    devices = Tokens().pass_by(late=(0, 0, 0, 0.3))
    assert devices[3].late_rate == pytest.approx(0.3) and devices[3].late_ms == pytest.approx(9) and devices[1].late_rate == 0
    assert devices[3].link_ms == 0.2


def test_what_may_have_come_while_the_root_was_away_is_not_late():
    tokens = Tokens()
    tokens.pass_by()
    for unseen_ms in (9.0, 0.1):
        for _ in range(30):
            tokens.telemetry.answered(3, 9.2, True, unseen_ms)
        tokens.telemetry.computed(3, Kind.FFN, 0.25, 1.5)
        tokens.end()
        assert (tokens.telemetry.cluster().devices[3].late_rate > 0) == (unseen_ms < 1)
    tokens.telemetry.probed(3, 1 / 12, 0.5, 9.0, 8.9)
    tokens.end()
    assert tokens.telemetry.cluster().devices[3].late_rate == pytest.approx(30 / 221)


def test_a_link_that_became_slow_is_known_where_the_root_waited_for_it():
    tokens = Tokens()
    assert tokens.pass_by(over_ms=1.5, waited_for=False)[1].link_ms == 0.2, "the answers came while the root computed"
    assert tokens.pass_by(over_ms=1.5)[1].link_ms == pytest.approx(1.5)
    assert tokens.pass_by(over_ms=0.3, waited_for=False)[1].link_ms == 0.2


def test_an_idle_workers_link_is_as_bad_as_it_was_until_many_probes_came_in_time():
    tokens = Tokens()
    tokens.pass_by(late=(0, 0, 0, 0.3))

    def idle(seconds: float, over_ms: float) -> float:
        for _ in range(int(seconds / 0.1)):
            tokens.telemetry.probed(3, 1 / 12, 0.5, over_ms)
            tokens.end()
        return tokens.telemetry.cluster().devices[3].late_rate

    assert idle(6, 9.0) > 0.2 and idle(5, 2.0) > 0.1 and idle(12, 2.0) == 0


def test_a_device_that_is_gone_can_do_nothing():
    assert Telemetry(ALIKE).cluster({2}).devices[2].disk_groups == 0


# Hysteresis


def seconds(watch: Watch, cluster: Cluster, shares=EVEN, begin: float = 0.0, length: float = 60.0):
    """When and what it wants to move, looked at as often as it is due."""
    for now in np.arange(begin, begin + length, LOOK_S / 2):
        if watch.due(now) and (target := watch.look(cluster, *shares, now)):
            return now, target
    return None


def test_nothing_moves_between_devices_that_are_alike():
    assert seconds(Watch(WORK, False), ALIKE) is None


def test_a_hot_device_gives_work_away_within_seconds_and_gets_it_back():
    watch = Watch(WORK, False)
    now, target = seconds(watch, HOT)
    shares = target.advice.shares
    assert now < 3 and shares.groups[2] < 2 and target.gain > 0.4 and "instead of" in target.why
    assert seconds(watch, HOT, (shares.heads, shares.groups), now) is None
    cooled = now + 60 + HOLD_S
    back, target = seconds(watch, ALIKE, (shares.heads, shares.groups), cooled)
    assert back - cooled < 5 and target.advice.chosen == "even"


def test_shares_become_as_they_were_at_the_start_though_little_is_gained():
    """As in the lab: what the three others do without the hot one is nearly as good, by the model."""
    cool = Cluster([Device("pi1", 3, 3), *[Device("pi", 3, 3, link_ms=0.3)] * 3], 0.5, 0.2)
    hot = replace(cool, devices=[*cool.devices[:2], Device("pi", 12, 12, link_ms=0.3), cool.devices[3]])
    first, away = ([3, 2, 2, 2], [4, 3, 3, 2]), ([4, 3, 0, 2], [5, 4, 0, 3])
    costs = [with_cost(cool, WORK, *counts).cost.tpot_ms for counts in (first, away)]
    assert 1 < costs[1] / costs[0] < 1.1
    watch = Watch(WORK, False, (), first)
    assert seconds(watch, cool, first) is None
    now, target = seconds(watch, hot, first, 60.0)
    assert target.advice.chosen == "measured" and seconds(watch, hot, away, now) is None
    cooled = now + 60 + HOLD_S
    back, target = seconds(watch, cool, away, cooled)
    assert back - cooled < 5 and (target.advice.shares.heads, target.advice.shares.groups) == ((3, 2, 2, 2), (4, 3, 3, 2))
    assert seconds(watch, cool, first, back) is None


def test_one_look_is_not_enough():
    watch = Watch(WORK, False)
    for number in range(20):
        cluster = HOT if number % 2 else ALIKE
        assert watch.look(cluster, *EVEN, LOOK_S * number) is None
    assert watch.look(HOT, *EVEN, 20 * LOOK_S + 3.0), "but it is if tokens take so long"


def test_a_device_that_changes_all_the_time_is_left_alone_for_longer_and_longer():
    watch, shares, now, moves = Watch(WORK, False), EVEN, 0.0, []
    while now < 300:
        found = seconds(watch, HOT if len(moves) % 2 == 0 else ALIKE, shares, now, 300 - now)
        if found is None:
            break
        now, target = found
        shares = target.advice.shares.heads, target.advice.shares.groups
        moves.append(now)
    assert len(moves) <= 8 and np.diff(moves)[-1] > 4 * np.diff(moves)[0]


def test_the_work_of_one_that_is_gone_moves_though_a_token_takes_longer_without_it():
    watch, gone = Watch(WORK, False), Telemetry(ALIKE).cluster({2})
    now, target = seconds(watch, gone)
    shares = target.advice.shares
    assert now < 5 and shares.heads[2] == shares.groups[2] == 0 and target.why == "rank 2 does not answer"
    assert seconds(watch, gone, (shares.heads, shares.groups), now + HOLD_S) is None


def test_an_unstable_worker_gets_what_matters_least_and_keeps_it_for_a_while():
    watch = Watch(WORK, True)
    lossy, better, good = (with_device(3, late_rate=rate, late_ms=0.1) for rate in (0.3, 0.03, 0.0))
    now, target = seconds(watch, lossy)
    assert target.advice.unstable == (3,) and "what matters least should be on rank 3" in target.why
    assert seconds(watch, better, EVEN, now) is None
    _, target = seconds(watch, good, EVEN, now + 60)
    assert target.advice.unstable == ()


# Where to

counts = st.lists(st.integers(0, 12), min_size=4, max_size=4)


def to_sum(wanted: list[int], total: int) -> list[int]:
    """Counts that add up to the total."""
    whole = sum(wanted) or 1
    result = [count * total // whole for count in wanted]
    result[0] += total - sum(result)
    return result


@settings(deadline=None, max_examples=40)
@given(counts, counts, st.sets(st.integers(1, 3), max_size=2), st.booleans())
def test_a_move_gives_everybody_what_it_should_have(heads, groups, unstable, calibrated):
    found = found_by_calibration() if calibrated else None
    before = make_plan(SMOLLM2, "auto", ALL, found)
    heads, groups = to_sum(heads, 9), to_sum(groups, 12)
    after = moved(before, SMOLLM2, heads, groups, sorted(unstable), ALL, found)
    for layer in range(SMOLLM2.layers):
        assert np.bincount(after.query[layer], minlength=4).tolist() == heads
        assert np.bincount(after.ffn[layer], minlength=4).tolist() == groups
    if calibrated and unstable:
        of_unstable = [group for rank in unstable for group in after.groups(rank)[7]]
        others = [group for rank in range(4) if rank not in unstable for group in after.groups(rank)[7]]
        assert not of_unstable or not others or min(of_unstable) > max(others)


def test_a_move_moves_no_more_than_it_must():
    before = make_plan(SMOLLM2, "even", ALL)
    after = moved(before, SMOLLM2, [3, 3, 0, 3], [4, 4, 0, 4], [], ALL, None)
    assert ((before.ffn != after.ffn).sum(1) == 3).all() and ((before.query != after.query).sum(1) == 2).all()
    assert not changed_keys(before, moved(before, SMOLLM2, *before.counts(4), [], ALL, None))


def test_a_move_respects_the_disks():
    own = disks(SMOLLM2, 2, 2, lambda rank, shard: rank == shard)
    before = make_plan(SMOLLM2, "even", own)
    after = moved(before, SMOLLM2, [9, 0], [12, 0], [], own, None)
    assert not changed_keys(before, after), "rank 0's disk lacks what rank 1 has"


def test_nothing_of_the_first_and_last_layer_is_on_the_unstable():
    found = found_by_calibration()
    before = make_plan(SMOLLM2, "auto", ALL, found)
    after = without_ends(before, [2, 3], 4, ALL)
    for layer in range(SMOLLM2.layers):
        owners = set(after.query[layer]) | set(after.ffn[layer])
        assert owners == ({0, 1} if layer in (0, 29) else {0, 1, 2, 3})
    assert {key[1] for key in changed_keys(before, after)} == {0, 29}


def test_what_is_left_of_memory_is_counted_by_rank():
    plan = make_plan(SMOLLM2, "even", ALL)
    assert room(plan, Sizes(SMOLLM2), ALIKE, WORK) is None
    taken = sum(map(shape_bytes, Sizes(SMOLLM2).parts(plan.query_heads(2), plan.groups(2))))
    taken += Sizes(SMOLLM2).cache_bytes(plan.query_heads(2), WORK.context)
    assert room(plan, Sizes(SMOLLM2), with_device(2, memory=taken + 7), WORK) == 7
    assert room(plan, Sizes(SMOLLM2), with_device(2, memory=taken - 7), WORK) == -7
