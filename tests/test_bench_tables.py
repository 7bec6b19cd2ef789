"""What the longer benchmarks make of their runs: time against quality, scenarios, stress, bad devices, losses for good."""

import json
from contextlib import closing

import numpy as np
import pytest
from click.testing import CliRunner

from bench import estimates, moving, placement, reader, report, scenes, stress, tradeoff, unstable
from halo_mpi.store.reader import ModelStore
from tests.test_bench import run_of

pytestmark = pytest.mark.timeout(60)


def scored(logprobs: list[float], tpot_ms: list[float] = (9.0, 1.0, 2.0), deferred: int = 0, wire: str = "f16", **cell) -> dict:
    """A run of evaluate as a benchmark records it."""
    run = run_of(list(tpot_ms), logprobs=logprobs, top1=list(range(len(logprobs))), wire=wire, **cell)
    run["report"] |= {
        "sync": {"mode": "relaxed", "wire": wire},
        "ledger": {"partial_sums": 100, "on_time": 100 - deferred, "deferred": {"1": deferred} if deferred else {}, "substituted": 0,
                   "inexact_importance": deferred / 200},
    }  # fmt: skip
    return run


def tradeoff_content(runs: list[dict]) -> dict:
    settings = {"model": "tiny", "ranks": 4, "pace_ms": 0.7}
    return {"benchmark": "tradeoff", "settings": settings, "complete": True, "why_incomplete": None, "runs": runs}


def some_runs() -> list[dict]:
    settings = {"deadline": "auto", "max_lag": 8, "quality": 0.3}
    return [
        scored([-1.0, -2.0, -3.0], mode="reference", wire="f32", loss=None, repeat=0),
        scored([-1.0, -2.0, -3.0], mode="reference", wire="f16", loss=None, repeat=0),
        scored([], [9.0, 2.0], mode="twice", loss=0.0),
        scored([], [9.0, 4.0], mode="repair", loss=5.0),
        scored([-1.0, -2.0], [9.0, 3.0], deferred=10, mode="relaxed", loss=5.0, **settings),
    ]


def test_quality_is_judged_on_the_tokens_that_both_scored():
    reference, run = some_runs()[0], scored([-1.0, -2.5])
    ratio, same = tradeoff.quality(run, reference)
    assert ratio == pytest.approx(np.exp(0.25)) and same == 1.0
    assert tradeoff.quality(run_of([1.0, 2.0]), reference) is None


def test_exact_modes_are_as_good_as_their_wire_and_relaxed_ones_as_they_scored():
    content = tradeoff_content(some_runs())
    rows = {row[0]: row for row in tradeoff.table(content).rows}
    assert rows["repair, loss 5 %"][5:7] == ["x 2.00", "+0.00%"]
    relaxed = rows["relaxed auto ms, lag 8, quality 0.3, loss 5 %"]
    assert relaxed[5] == "x 1.50" and relaxed[8:] == ["10.0%", "5.0%"]


def test_time_against_quality_is_drawn(tmp_path):
    tradeoff.plot(tradeoff_content(some_runs()), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    tradeoff.plot(tradeoff_content(some_runs()[:3]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_scenes_show_what_became_of_late_sums():
    runs = [
        scored([], [9.0, 2.0], mode="strict", scene="bursts", loss=None),
        scored([], [9.0, 1.0], deferred=20, mode="relaxed", scene="bursts"),
    ]
    settings = {"model": "tiny", "pace_ms": 0.7, "modes": ["strict", "relaxed"], "scenes": ["bursts", "wifi"]}
    drawn = scenes.table({**tradeoff_content(runs), "settings": settings})
    assert drawn.rows[1][:2] == ["bursts", "relaxed"] and drawn.rows[1][7] == "0.50 (1 pair)" and drawn.rows[1][9] == "20.00%"
    assert drawn.rows[2][2] == "0"


def scheduled(name: str, tpot_ms: list[float], predicted_ms: float) -> dict:
    run = scored([], tpot_ms, scene="hot-pi", placement=name)
    devices = [
        {"attention_ms": whole, "ffn_ms": whole, "fixed_ms": 0.0, "link_ms": link}
        for whole, link in ((2.0, 0.0), (4.0, 1.0), (4.0, 99.0))
    ]
    options = {name: {"tpot_ms": ms, "groups": [8, 4, 0]} for name, ms in (("even", 99.0), ("measured", predicted_ms))}
    run["report"]["scheduler"] = {
        "devices": devices,
        "sync_ms": 0.0,
        "further_ms": 0.0,
        "head_ms": 1.0,
        "chosen": "measured",
        "options": options,
    }
    return run


def test_ideal_shares_take_equally_long_and_leave_out_what_is_too_far():
    scheduler = scheduled("auto", [9.0, 5.0], 4.0)["report"]["scheduler"]
    sync = (1 + 1.0 / 4) / (1 / 2 + 1 / 4)  # t = 2 a = 1 + 4 b, a + b = 1
    assert placement.ideal_ms(scheduler, 3) == pytest.approx(3 * 2 * sync + 1)
    content = tradeoff_content([scheduled("even", [9.0, 8.0], 9.0), scheduled("auto", [9.0, 5.0], 4.0)])
    content["settings"] |= {"scenes": ["hot-pi"], "layers": 3}
    even, auto = placement.table(content).rows
    assert even[6] == "99.0" and auto[2] == "8 4 0" and auto[7] == "1.25" and auto[-1] == "0.62 (1 pair)"


def test_a_move_is_timed_from_the_change_that_it_follows():
    tpot_ms = [100.0] * 80 + [200.0] * 20 + [300.0] + [200.0] * 9 + [120.0] * 300
    run = scored([], tpot_ms, scene="hot-later", way="moves")
    events = [(0, "even shares by rank"), (95, "moving work, since"), (110, "moved: heads")]
    run["report"] |= {"events": [{"token": token, "what": what} for token, what in events], "token_ids": [1, 2]}
    assert moving.moves(run) == [(95, 110)] and moving.longest(run) == pytest.approx(1.5)
    assert moving.adapted(run) == ["6.1", "-"]  # 80 x 0.1 s + 29 x 0.2 + 0.3 - 8 s
    assert {name: set(times) for name, times in moving.phases(run).items()} == {
        "before": {100.0}, "trouble": {120.0}, "after": {120.0},
    }  # fmt: skip
    other = scored([], [1.0], scene="hot-later", way="even")
    other["report"]["token_ids"] = [1, 3, 4]
    assert moving.same_text([run, run, other]) == ["token ids: the same, as far as both go, in 1 of 3 pairs of runs"]
    content = tradeoff_content([run])
    content["settings"] |= {"scenes": ["hot-later"], "ways": ["moves"]}
    (row,) = moving.table(content).rows
    assert row[3:6] == ["100", "120", "120"] and row[6:] == ["6.1 / -", "1", "1.50"]


def test_links_flap_within_the_time_and_at_workers_only():
    events = stress.flaps(4, 300.0, seed=1)
    assert events == stress.flaps(4, 300.0, seed=1) != stress.flaps(4, 300.0, seed=2)
    assert all(event["at_s"] < 300 and event["host"] in ("pi2", "pi3", "pi4") and 0.2 <= event["for_s"] <= 3 for event in events)
    assert len(events) > 10


def test_growth_is_between_the_settled_quarters():
    flat = [100, 5000] + [1000] * 30
    assert stress.growth(flat) == 0
    assert stress.growth(list(range(0, 4000, 100))) > 1000


def test_bad_devices_are_the_last_tier():
    assert unstable.tiers_of("two-bad-of-eight") == [[0], [1, 2, 3, 4, 5], [6, 7]]
    assert unstable.tiers_of("loss-5") == [[0], [1, 2, 3]]


def test_all_ways_to_read_weights_read_the_same(tiny):
    with closing(ModelStore(tiny)) as store:
        for shard in store.shards.values():
            counts = [list(read(shard)) for read in reader.READERS.values()]
            assert counts[0] and counts[0] == counts[1] == counts[2]


def test_a_reading_thread_is_told_in_times_of_what_nobody_reading_takes():
    ways = {"nobody": [1.0, 1.0, 2.0], "h5py": [3.0, 3.0, 6.0]}
    runs = [{"dtype": "f32", "way": way, "repeat": 0, "status": "ok", "mb_s": 5.0, "part_ms": ms} for way, ms in ways.items()]
    drawn = reader.table({**tradeoff_content(runs), "settings": {"dtypes": ["f32"]}})
    assert [row[-2:] for row in drawn.rows] == [["1.00", "1.00"], ["3.00", "3.00"]]


def test_every_kind_of_result_has_its_place_on_the_page(tmp_path):
    lost = [
        {"name": "exact", "lost": 0.0, "loss": 3.0, "loss_novel": 3.5, "loss_reference": 2.5},
        {"name": "FFN groups, zero", "lost": 0.05, "loss": 3.4, "loss_novel": 3.9, "loss_reference": 2.9},
        {"name": "FFN groups, estimate", "lost": 0.05, "loss": 3.1, "loss_novel": 3.6, "loss_reference": 2.6},
    ]
    content = {**tradeoff_content(lost), "benchmark": "estimates", "settings": {"model": "tiny", "tokens": 100}}
    content["importance"] = {"FFN": [[0.8, 0.6], [0.9, 0.7]], "ATTENTION": [[0.7, 0.7], [0.7, 0.7]]}
    assert estimates.table(content).rows[2][-1] == "75%"
    bad = [
        scored([-1.0, -2.0], way="reference"),
        scored([-1.0, -2.5], deferred=5, way="tiers", deadline="1", max_lag=8, quality=0.3),
    ]
    settings = {"model": "tiny", "scene": "two-bad-of-eight", "pace_ms": 0.7}
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "b.json").write_text(json.dumps({**tradeoff_content(bad), "benchmark": "unstable", "settings": settings}))
    (tmp_path / "c.json").write_text(json.dumps(tradeoff_content(some_runs())))
    done = CliRunner().invoke(report.main, [*(str(tmp_path / f"{name}.json") for name in "abc"), "--out", str(tmp_path / "page")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page" / "report.md").read_text()
    assert "75%" in page and "what matters least to the bad devices" in page and "x 1.50" in page
