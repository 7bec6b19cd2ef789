"""Tables of scaling and of predictions against measurements."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from click.testing import CliRunner

from bench import published, report, scaling, validation
from bench.shapes import weak_config
from bench.splits import fitted, planned, split
from halo_mpi.model.shapes import SHAPES
from halo_mpi.schedule.cost import Device
from halo_mpi.schedule.profiles import PROFILES
from tests.mpi import ROOT
from tests.test_bench import run_of, scaling_run

SMOLLM2 = SHAPES["smollm2-135m"]


def scaled(ranks: int, tpot_ms: float, compute_ms: float, what: str = "run", **fields) -> dict:
    return {**scaling_run(ranks, tpot_ms, compute_ms), "what": what, **fields}


def scheduler(tpot_ms: float = 50.0, **changes) -> dict:
    """As a report has it, of four devices."""
    devices = [asdict(Device("pi", 2.8, 2.8, link_ms=0.2 * rank)) for rank in range(4)]
    option = {"tpot_ms": tpot_ms, "heads": [3, 2, 2, 2], "groups": [3, 3, 3, 3]}
    return {"model": SMOLLM2.name, "devices": devices, "sync_ms": 0.4, "further_ms": 0.05, "head_ms": 1.0, "kb_ms": None, "chosen": "even",
            "options": {"even": option}, **changes}  # fmt: skip


def content_of(runs: list[dict], **settings) -> dict:
    told = {"model": "tiny", "cases": {"wired": "a case"}, **settings}
    return {"benchmark": "scaling", "settings": told, "runs": runs, "complete": True, "why_incomplete": None}


def test_the_fit_finds_what_a_sync_costs_with_each_rank():
    syncs = 2  # per token, as run_of has them
    runs = [scaled(n, 100 / n + 5 + syncs * (0.5 + 0.1 * (n - 2)) * (n > 1), 100 / n) for n in (1, 2, 4, 8)]
    line = fitted([split([run]) for run in runs])
    assert (line.first_ms, line.further_ms, line.off_ms) == pytest.approx((0.5, 0.1, 0.0), abs=1e-9)
    assert fitted([split([run]) for run in runs[:2]]) is None and fitted([split([run]) for run in runs[1:]]) is None


def test_the_schedulers_own_line_is_the_median_of_what_it_measured():
    runs = [{"report": {"scheduler": scheduler(sync_ms=sync_ms)}} for sync_ms in (0.3, 0.4, 9.0)]
    line = planned([*runs, {"report": None}])
    assert line.first_ms == pytest.approx(0.4 + 0.6) and line.further_ms == 0.05 and planned([]) is None


def test_a_prediction_stands_beside_each_measured_point(tmp_path):
    plan = scaled(4, 41.0, 25.0, "plan")
    plan["report"]["scheduler"] = scheduler(tpot_ms=38.0)
    content = content_of([scaled(1, 100.0, 98.0), scaled(4, 40.0, 25.0), plan])
    first, second = scaling.table(content).rows
    assert first[-2:] == ["-", "-"] and second[-4:] == ["2.50 (1 pair)", "62%", "38.0", "1.05"]
    scaling.plot(content, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_weak_scaling_is_efficient_if_a_token_takes_no_longer():
    drawn = scaling.table(content_of([scaled(1, 100.0, 98.0), scaled(4, 125.0, 98.0)], weak=True))
    assert drawn.title.startswith("Weak scaling") and drawn.rows[1][-3] == "80%"
    assert any("4 devices with 4 times the work take 125 ms, 1 takes 100: +0 ms of computing, +25 ms" in note for note in drawn.notes)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_each_ranks_part_of_a_weak_model_stays(ranks):
    config, one = weak_config(ranks), weak_config(1)
    assert (config.layers, config.hidden) == (one.layers, one.hidden) and config.groups % ranks == 0
    assert config.parameters - config.vocabulary * config.hidden == ranks * (one.parameters - one.vocabulary * one.hidden)


def validated(scene: str, placement: str, tpot_ms: float) -> dict:
    run = {**run_of([0.0, tpot_ms]), "scene": scene, "placement": placement, "layers": 30}
    run["report"]["devices"] = [{"groups": 90}] * 4
    if placement == "auto":
        run["report"]["scheduler"] = scheduler(tpot_ms=90.0)
    return run


def test_a_described_scene_is_the_clean_one_with_its_faults():
    clean = validation.clean_devices([{"scene": "clean-4", "report": {"scheduler": scheduler()}}])
    hot, lossy, wifi = (validation.as_described(clean, scene)["devices"] for scene in ("hot-pi", "loss-2", "wifi"))
    assert hot[2]["attention_ms"] == pytest.approx(11.2) and hot[1]["attention_ms"] == 2.8
    assert lossy[1]["loss"] == 0.02 and "loss" not in lossy[0]
    assert wifi[1]["link_ms"] == pytest.approx(0.2 + 4) and wifi[0]["mbit"] == 50


def test_measured_times_stand_beside_both_predictions(tmp_path):
    runs = [validated(scene, placement, 99.0) for scene in ("clean-4", "hot-pi") for placement in ("even", "auto")]
    settings = {"config": SMOLLM2.to_dict(), "dtype": "int4", "scenes": ["clean-4", "hot-pi"], "pace_ms": 0.7}
    content = content_of(runs, **settings) | {"benchmark": "validation"}
    clean, _, hot, _ = validation.table(content).rows
    assert clean[2] == "3 3 3 3" and clean[6:8] == ["90.0", "1.10"] and float(clean[8]) < float(hot[8])
    validation.plot(content, tmp_path / "validation.png")
    assert (tmp_path / "validation.png").stat().st_size > 1000


def test_simulated_boards_are_about_as_fast_as_published_ones():
    """Of another program, whose network costs more with eight boards."""
    ratios = {(row["profile"], row["boards"]): row["simulated_ms"] / row["published_ms"] for row in published.rows()}
    assert all(0.9 < ratio < 1.4 for (_, boards), ratio in ratios.items() if boards < 8)
    assert set(PROFILES) > {profile for profile, _ in ratios}


def test_published_times_are_a_result_with_a_place_on_the_page(tmp_path):
    assert CliRunner().invoke(published.main, ["--json", str(tmp_path / "published.json")], standalone_mode=False).exit_code == 0
    content = json.loads((tmp_path / "published.json").read_text())
    assert content["complete"] and report.kind_of(content).title == "Published and simulated"


@pytest.mark.slow
@pytest.mark.lab
@pytest.mark.timeout(150)
@pytest.mark.parametrize("program, options, runs", [
    ("validation", ("--scenes", "clean-4,hot-pi"), 4),
    ("scaling", ("--cases", "wired", "--ranks", "1,2"), 3),
])  # fmt: skip
def test_predictions_are_measured_in_the_lab(can, smollm2, tmp_path, program, options, runs):
    can("kernel")
    out, png = tmp_path / "r.json", tmp_path / "r.png"
    command = [sys.executable, "-m", f"bench.{program}", *options, "--model", smollm2("int4"), "--repeats", "1", "--seconds", "1"]
    done = subprocess.run(list(map(str, [*command, "--json", out, "--plot", png])), cwd=ROOT, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert content["complete"] and [run["status"] for run in content["runs"]] == ["ok"] * runs
    told = {"validation": validation.table, "scaling": scaling.table}[program](content).rows[-1]
    assert float(told[-1]) > 0 and png.stat().st_size > 1000
