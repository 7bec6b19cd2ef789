"""Work that moves in the real program: over real MPI, with lost packets, and when a device changes."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests import lab as laboratory
from tests.lab import PROGRAMS, scenario_file
from tests.mpi import run, succeed

pytestmark = pytest.mark.timeout(200)
mpi, lab = pytest.mark.mpi, pytest.mark.lab
IDS = np.random.default_rng(7).integers(3, 300, 48).tolist()


def job(folder: Path, model: Path, name: str) -> tuple[Path, Path]:
    """A file for tests/programs, and the one that it will write."""
    content = {"model": str(model), "ids": IDS, "out": str(folder / f"{name}.npz")}
    (folder / f"{name}.json").write_text(json.dumps([content] if name == "still" else content))
    return folder / f"{name}.json", folder / f"{name}.npz"


@pytest.fixture(scope="module")
def still(deep, tmp_path_factory) -> np.ndarray:
    """The logits of one rank."""
    file, out = job(tmp_path_factory.mktemp("still"), deep, "still")
    succeed(run(1, PROGRAMS / "logits.py", file))
    return np.load(out)["steps"]


def is_the_same(out: Path, still: np.ndarray) -> bool:
    found = np.load(out)
    assert found["moves"] >= 4, "too little moved"
    return np.abs(found["steps"] - still).max() < 1e-3 * np.abs(still).max()


@mpi
@pytest.mark.parametrize("ranks", [pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 3, 4)])
def test_parts_that_move_at_random_compute_the_same(deep, still, tmp_path, ranks):
    file, out = job(tmp_path, deep, "moves")
    succeed(run(ranks, PROGRAMS / "moves.py", file))
    assert is_the_same(out, still)


@lab
def test_parts_that_move_at_random_compute_the_same_where_packets_are_lost(deep, still, can, tmp_path):
    can("kernel")
    file, out = job(tmp_path, deep, "moves")
    scenario = scenario_file(tmp_path, "hosts = 4\nloss = 0.05\n")
    done = laboratory.run("run", scenario, "--marks", "--", "python", "-m", "tests.programs.moves", file, timeout=150)
    assert done.returncode == 0, done.stderr
    assert is_the_same(out, still)


@lab
def test_a_device_that_becomes_hot_gives_work_away(smollm2, can, tmp_path):
    can("kernel")
    events = '[[event]]\nhost = "pi3"\naction = "slowdown"\nvalue = 0.2\nat_token = 8\n'
    scenario, report = scenario_file(tmp_path, f"hosts = 3\npace_ms = 2.0\n{events}"), tmp_path / "report.json"
    command = ["python", "-m", "halo_mpi.generate", "--model", smollm2("int4"), "--prompt", "The", "--max-tokens", "50",
               "--ignore-eos", "--samples", "--json", report]  # fmt: skip
    done = laboratory.run("run", scenario, "--", *command, timeout=150)
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    moves = [event for event in result["events"] if event["what"].startswith("mov")]
    assert [event["what"].split()[0] for event in moves[:2]] == ["moving", "moved:"]
    began, ended = moves[0]["token"], moves[1]["token"]
    assert 8 < began < ended < 45 and result["placement"] == "moved"
    groups, tpot_ms = [device["groups"] for device in result["devices"]], result["samples"]["tpot_ms"]
    assert groups[2] < 0.5 * min(groups[:2])
    assert np.median(tpot_ms[ended + 1 :]) < 0.7 * np.median(tpot_ms[9:began])
