"""The benchmarks: what they make of raw runs, and one short run through the lab."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from bench import quality, report, scaling, tpot
from bench.cells import run_locally, toml
from bench.lab.scenario import load_scenario
from bench.pagecache import drop, resident, warm
from bench.results import Results
from bench.rounds import measure
from bench.shapes import SHAPES, RandomSource, meta_of
from bench.stats import Ratio, identities, pairwise, pooled, samples_of, token_ms
from halo_mpi.model.tokenizer import TokenizerFiles
from halo_mpi.store.encoding import Blocks
from halo_mpi.store.reader import ModelStore
from tests.mpi import ROOT, report_of

pytestmark = pytest.mark.timeout(60)


def run_of(tpot_ms: list[float], repeat: int = 0, ids: list[int] | None = None, status: str = "ok", **fields) -> dict:
    """A run as a benchmark records it, of a model with two syncs per token that take half its time each."""
    made = {
        "ranks": 4,
        "sync": {"mode": "strict", "wire": "f32"},
        "placement": "even",
        "model": {"digest": "d"},
        "token_ids": ids or [],
        "samples": {"tpot_ms": tpot_ms, "sync_ms": [ms / 2 for ms in tpot_ms for _ in range(2)]},
    }
    ended = {"status": status, "error": None if status == "ok" else "a reason", "wall_s": 1.0}
    report = made if status == "ok" else None
    return {"mode": "strict", "ranks": 4, "loss": 0.0, "repeat": repeat, **ended, "report": report, **fields}


def tpot_content(runs: list[dict], **changes) -> dict:
    settings = {"model": "tiny", "pace_ms": 0.7, "modes": ["strict", "strict-tuned"]}
    return {"benchmark": "tpot", "settings": settings, "complete": True, "why_incomplete": None, "runs": runs, **changes}


def test_the_first_two_tokens_are_left_out():
    samples = samples_of(run_of([900.0, 10.0, 12.0]))
    assert samples.warm
    assert samples.tpot_ms == [10.0, 12.0], "token 1 has no sample, token 2 is the first"
    assert samples.sync_ms == [5.0, 5.0, 6.0, 6.0]


def test_a_warm_up_that_is_all_there_is_counts_and_is_marked():
    samples = samples_of(run_of([900.0]))
    assert (samples.tpot_ms, samples.warm) == ([900.0], False)
    assert tpot.table(tpot_content([run_of([900.0])])).rows[0][4] == "1 *"


def test_a_time_per_token_is_estimated_from_syncs_where_no_token_was_finished():
    run = run_of([])
    run["report"] |= {"samples": {"tpot_ms": [], "sync_ms": [2.0, 4.0]}, "syncs_per_token": 60}
    assert token_ms(run) == 180.0


def test_samples_of_all_repeats_are_pooled():
    assert pooled([run_of([9.0, 1.0, 2.0]), run_of([9.0, 3.0]), run_of([], status="failed")]).tpot_ms == [1.0, 2.0, 3.0]
    assert pooled([run_of([], status="timeout")]) is None


def test_ratios_are_taken_within_a_repeat():
    slow_first = [run_of([0, 100.0], 0), run_of([0, 10.0], 1), run_of([0, 7.0], 2)]
    half = [run_of([0, 50.0], 0), run_of([0, 5.0], 1), run_of([], 2, status="failed")]
    ratio = pairwise(half, slow_first, token_ms)
    assert (ratio.median, ratio.low, ratio.high, ratio.pairs) == (0.5, 0.5, 0.5, 2)
    assert pairwise(half, [], token_ms) is None


def test_the_interval_of_a_mean_ratio_narrows_with_the_pairs():
    assert Ratio.of([1.0, 1.1, 0.9]).interval is None
    low, high = Ratio.of([1.02, 0.98, 1.01, 0.99]).interval
    assert low < 1 < high and high - low == pytest.approx(2 * 3.182 * 0.01826 / 2, rel=0.01)
    assert np.ptp(Ratio.of([1.02, 0.98, 1.01, 0.99] * 4).interval) < high - low
    assert "95 %: 0.9" in str(Ratio.of([1.02, 0.98, 1.01, 0.99]))


def test_the_99th_percentile_of_a_few_samples_is_called_their_maximum():
    few, many = run_of([0.0] + [10.0] * 49 + [70.0]), run_of([0.0] + [10.0] * 200)
    rows = tpot.table(tpot_content([few])).rows + tpot.table(tpot_content([many])).rows
    assert [row[6].partition(" ")[2] for row in rows] == ["(max of 50)", "(n=200)"]


def test_token_ids_must_agree_as_far_as_both_go():
    same, = identities([run_of([], ids=[1, 2, 3]), run_of([], ids=[1, 2]), run_of([], ids=[1, 2, 3, 4])])  # fmt: skip
    assert (same.same, same.runs, same.common) == (True, 3, 3)
    different, = identities([run_of([], ids=[1, 2, 3]), run_of([], ids=[1, 5])])  # fmt: skip
    assert not different.same
    assert "DIFFERENT" in str(different)


def test_token_ids_of_other_ranks_or_wires_are_not_compared():
    other = run_of([], ids=[7])
    other["report"]["sync"] = {"mode": "strict", "wire": "f16"}
    relaxed = run_of([], ids=[8])
    relaxed["report"]["sync"] = {"mode": "relaxed", "wire": "f32"}
    found = identities([run_of([], ids=[1]), other, relaxed])
    assert [(identity.wire, identity.same, identity.runs) for identity in found] == [("f16", True, 1), ("f32", True, 1)]


def test_a_relaxed_run_with_nothing_late_is_compared_with_strict():
    relaxed = run_of([], ids=[8])
    relaxed["report"] |= {"sync": {"mode": "relaxed", "wire": "f32"}, "ledger": {"deferred": {}, "substituted": 0}}
    assert [identity.same for identity in identities([run_of([], ids=[1]), relaxed])] == [False]
    relaxed["report"]["ledger"]["deferred"] = {"1": 2}
    assert [identity.runs for identity in identities([run_of([], ids=[1]), relaxed])] == [1]


def test_failed_runs_are_in_the_table_with_their_reason():
    drawn = tpot.table(tpot_content([run_of([1.0, 2.0]), run_of([], 1, status="timeout")]))
    assert drawn.rows[0][3] == "2, 1 timeout"
    assert any("timeout" in note and "a reason" in note for note in drawn.notes)


def cells_of(modes, repeats=2) -> list[list[dict]]:
    return list(tpot.Plan(modes, (0.0, 5.0), (4, 8), repeats).groups())


def test_modes_alternate_and_repeats_are_the_outermost_loop():
    groups = cells_of(("strict", "strict-tuned"))
    assert [cell["mode"] for cell in groups[0]] == ["strict", "strict-tuned"]
    assert [(group[0]["repeat"], group[0]["ranks"], group[0]["loss"]) for group in groups[:5]] == [
        (0, 4, 0.0), (0, 4, 5.0), (0, 8, 0.0), (0, 8, 5.0), (1, 4, 0.0)]  # fmt: skip


def test_what_runs_alone_is_run_once_per_number_of_ranks_and_repeat():
    cells = [cell for group in cells_of(("strict", "one", "one-unpaced"), repeats=1) for cell in group]
    alone = [(cell["mode"], cell["ranks"], cell["loss"]) for cell in cells if cell["mode"] != "strict"]
    assert alone == [("one", 4, None), ("one-unpaced", 4, None), ("one", 8, None)]


def test_a_spent_budget_ends_with_what_there_is(tmp_path):
    results = Results("tpot", tmp_path / "r.json", 0)
    groups = [[{"cell": number, "repeat": 0}] for number in range(3)]
    expected = {0: 1.0, 1: 1.0, 2: 1000.0}
    measure(groups, lambda cell: run_of([]), str, lambda cell: expected[cell["cell"]], 1.0, results)
    content = json.loads((tmp_path / "r.json").read_text())
    assert len(content["runs"]) == 2
    assert not content["complete"]
    assert "truncated after 2 of 3" in content["why_incomplete"]


def test_ctrl_c_keeps_the_runs_so_far(tmp_path):
    results = Results("tpot", tmp_path / "r.json", 0)

    def run(cell: dict) -> dict:
        if cell["cell"]:
            raise KeyboardInterrupt
        return run_of([])

    measure([[{"cell": 0, "repeat": 0}, {"cell": 1, "repeat": 0}]], run, str, lambda cell: 1.0, 1.0, results)
    assert "interrupted after 1 of 2" in json.loads((tmp_path / "r.json").read_text())["why_incomplete"]


def test_results_carry_what_is_needed_to_judge_them(tmp_path):
    Results("tpot", tmp_path / "r.json", 3, ranks=[4]).finish()
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["seed"] == 3 and content["complete"] and content["settings"] == {"ranks": [4]}
    assert content["versions"]["python"] == sys.version.split()[0] and content["versions"]["torch"]
    assert len(content["load_average"]["start"]) == len(content["load_average"]["end"]) == 3
    assert content["machine"]["cores"] and content["command"] and content["date"]


def test_scenario_values_survive_the_trip_through_toml(tmp_path):
    values = {"hosts": 3, "pace_ms": 0.7, "quickack": True, "burst": {"good": 9.0, "bad": 2.0}, "host": {"pi2": {"loss": 0.5}}}
    values["event"] = [{"at_s": 1.0, "host": "pi2", "action": "kill"}]
    (tmp_path / "s.toml").write_text(toml(values))
    scenario = load_scenario(tmp_path / "s.toml")
    assert scenario.quickack and scenario.hosts["pi1"].burst.good == 9 and scenario.hosts["pi2"].loss == 0.5
    assert scenario.hosts["pi3"].pace_ms == 0.7 and scenario.events[0].action == "kill"


def test_a_run_that_takes_too_long_is_ended_and_says_so():
    began = time.monotonic()
    run = run_locally(1, ["bench.first_token", "--model", "missing"], timeout_s=0.2)
    assert (run["status"], run["report"]) == ("timeout", None)
    assert time.monotonic() - began < 25


def test_a_run_that_fails_brings_its_line():
    run = run_locally(1, ["bench.first_token", "--model", "missing"], timeout_s=40)
    assert run["status"] == "failed"
    assert "missing" in run["error"] and run["error"].startswith("halo-mpi: ")


def scaling_run(ranks: int, tpot_ms: float, compute_ms: float) -> dict:
    run = run_of([0.0, tpot_ms], ranks=ranks, case="wired")
    run["report"]["devices"] = [{"compute_ms": compute_ms}, {"compute_ms": compute_ms / 2}]
    return run


def test_scaling_says_why_more_devices_are_faster_or_not():
    one, faster, slower = scaling_run(1, 100.0, 98.0), scaling_run(4, 40.0, 25.0), scaling_run(4, 130.0, 90.0)
    settings = {"model": "tiny", "cases": {"wired": "a case"}}
    for many, verdict in ((faster, "4 devices beat 1"), (slower, "4 devices do not beat 1")):
        drawn = scaling.table({"settings": settings, "runs": [one, many], "complete": True, "why_incomplete": None})
        assert any(verdict in note for note in drawn.notes)
    row = scaling.table({"settings": settings, "runs": [one, faster], "complete": True, "why_incomplete": None}).rows[1]
    assert row[6:9] == ["25.0", "15.0", "7.50"], "slowest rank, rest, rest per sync"


def quality_run(mode: str, loss: float, logprobs: list[float], top1: list[int]) -> dict:
    run = run_of([0.0, 1.0], mode=mode, loss=loss, logprobs=logprobs, top1=top1)
    run["report"] |= {"perplexity": float(np.exp(-np.mean(logprobs))), "ledger": {"inexact_importance": 0.0}}
    return run


def test_an_exact_mode_that_differs_from_the_reference_is_reported():
    reference, equal = quality_run("strict", 0.0, [-1.0, -2.0], [3, 4]), quality_run("strict", 5.0, [-1.0, -2.0], [3, 4])
    different = quality_run("strict-tuned", 5.0, [-1.0, -2.5], [3, 5])
    assert quality.wrong({"runs": [reference, equal]}) == []
    assert len(quality.wrong({"runs": [reference, equal, different]})) == 1
    found = quality.compared(different, reference)
    assert (found["top1"], found["max_distance"]) == (0.5, 0.5)
    assert found["ratio"] == pytest.approx(np.exp(0.25))


def test_the_report_page_has_a_table_and_a_figure_per_result(tmp_path):
    runs = [run_of([9.0, 1.5, 2.5]), run_of([9.0, 5.0], loss=5.0)]
    (tmp_path / "a.json").write_text(json.dumps(tpot_content(runs)))
    (tmp_path / "b.json").write_text(json.dumps({"unknown": 1}))
    out = tmp_path / "page"
    done = CliRunner().invoke(report.main, [str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    page = (out / "report.md").read_text()
    assert "| 4 | 0 % | strict | 1 | 2 | 2.00 |" in page
    assert "![Time per output token](a.png)" in page and (out / "a.png").stat().st_size > 1000
    assert "b.json" in page and not (out / "b.png").exists()


def test_the_report_of_a_damaged_file_fails_in_one_line(tmp_path):
    (tmp_path / "a.json").write_text("{")
    done = CliRunner().invoke(report.main, [str(tmp_path / "a.json"), "--out", str(tmp_path)])
    assert done.exit_code == 1 and "a.json: cannot be read" in done.output


def test_figures_without_matplotlib_fail_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = CliRunner().invoke(tpot.main, ["--plot", "x.png"])
    assert done.exit_code == 1 and "pip install halo-mpi[bench]" in done.output


def test_a_random_shape_keeps_every_token_of_the_borrowed_tokenizer_in_range(tiny):
    tokenizer = TokenizerFiles.from_dict(meta_of(tiny)["tokenizer"])
    small, large = (RandomSource(SHAPES[name], tokenizer, "int4") for name in ("micro", "tinyllama"))
    assert small.config.vocabulary == 512 and large.config.vocabulary == 32000
    narrow = RandomSource(replace(SHAPES["micro"], vocabulary=100), tokenizer, "int4")
    assert narrow.config.vocabulary == 320, "as many rows as the tokenizer has tokens"
    gate = large.rows("layers.0.gate", 128, 256)
    assert isinstance(gate, Blocks) and gate.shape == (128, 2048)
    assert gate.dequantize().std() == pytest.approx(1 / np.sqrt(2048), rel=0.02)
    assert (gate.codes == large.rows("layers.0.gate", 128, 256).codes).all()
    assert (gate.codes != large.rows("layers.1.gate", 128, 256).codes).any()


def test_dropping_a_folder_takes_it_out_of_the_page_cache(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1 << 22))
    warm(tmp_path)
    assert resident(tmp_path) == 1.0
    drop(tmp_path)
    if resident(tmp_path) > 0.9:
        pytest.skip("this file system keeps its files in memory")
    assert resident(tmp_path) < 0.02
    warm(tmp_path)
    assert resident(tmp_path) == 1.0


@pytest.mark.mpi
def test_evaluate_saves_the_likeliest_token_of_each_scored_position(tiny, tmp_path):
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog.")
    saved = {}
    for ranks in (1, 2):
        path = tmp_path / f"{ranks}.npy"
        found = report_of(ranks, "evaluate", tmp_path, "--model", tiny, "--text", tmp_path / "text", "--top1", path)
        saved[ranks] = np.load(path)
        assert saved[ranks].dtype == np.int32 and len(saved[ranks]) == found["scored_tokens"]
    assert (saved[1] == saved[2]).all()
    assert 0 <= saved[1].min() and saved[1].max() < ModelStore(tiny).meta["config"]["vocabulary"]


@pytest.mark.lab
@pytest.mark.timeout(150)
@pytest.mark.slow
def test_tpot_measures_strict_and_allreduce_in_the_lab(can, tiny, tmp_path):
    can("kernel")
    out, png = tmp_path / "r.json", tmp_path / "r.png"
    options = ["--model", tiny, "--modes", "strict,allreduce,one", "--ranks", "2", "--losses", "0,5", "--repeats", "1"]
    command = [sys.executable, "-m", "bench.tpot", *options, "--seconds", "1", "--json", out, "--plot", png]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert content["complete"]
    assert [(run["mode"], run["loss"], run["status"]) for run in content["runs"]] == [
        ("strict", 0.0, "ok"), ("allreduce", 0.0, "ok"), ("one", None, "ok"), ("strict", 5.0, "ok"), ("allreduce", 5.0, "ok")]  # fmt: skip
    strict, _, one, lossy, _ = content["runs"]
    assert samples_of(strict).token_ms >= 4 * 0.7, "two layers, four syncs, paced"
    assert samples_of(one).token_ms >= 4 * 1.4, "one device does the work of two"
    assert sum(lane["dropped"] for lane in lossy["lab"]["links"]) > 0 == sum(lane["dropped"] for lane in strict["lab"]["links"])
    assert "the same first" in done.stdout
    assert png.stat().st_size > 1000
