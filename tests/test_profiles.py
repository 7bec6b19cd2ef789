"""Boards that are simulated from published figures, and `plan --profile`."""

import json
import subprocess
import sys
import time

import pytest

from halo_mpi.model.kernels.choice import sizes_of
from halo_mpi.model.shapes import SHAPES
from halo_mpi.model.sizes import shape_bytes
from halo_mpi.schedule.advice import advise
from halo_mpi.schedule.profiles import PROFILES, simulated
from halo_mpi.schedule.sweep import parts_of, sweep
from halo_mpi.schedule.work import Work
from tests.mpi import ROOT

SEVEN = sizes_of(SHAPES["llama-2-7b"], "int4")


def plan(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "halo_mpi.plan", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("name", PROFILES)
def test_every_figure_has_a_source_and_products_are_no_faster_than_memory(name):
    profile = PROFILES[name]
    assert {"memory_gbps", "speed_gbps", "memory_gib", "round_trip_ms", "mbit"} <= set(profile.figures)
    assert all(figure.value > 0 and len(figure.source) > 20 for figure in profile.figures.values())
    assert profile.board.speed_gbps.value < profile.board.memory_gbps.value


def test_one_board_takes_as_long_as_reading_its_weights():
    work, cluster = Work.of(SEVEN, 512), simulated(PROFILES["pi5"], 1, SEVEN, 512)
    weights = 32 * (shape_bytes(SEVEN.attention(list(range(32)))) + shape_bytes(SEVEN.ffn(list(range(86)))))
    read = weights + SEVEN.table().nbytes + SEVEN.cache_bytes([list(range(32))] * 32, 512) // 2
    assert advise(cluster, work, False).shares.cost.tpot_ms == pytest.approx(read / 8.55e6, rel=0.01)


@pytest.mark.parametrize("name", PROFILES)
def test_the_parts_add_up(name):
    cluster = simulated(PROFILES[name], 6, SEVEN, 512, loss=0.02)
    cost = advise(cluster, Work.of(SEVEN, 512), False).shares.cost
    parts = parts_of(cluster, cost)
    assert parts.compute_ms + parts.wire_ms + parts.wait_ms + parts.head_ms == pytest.approx(cost.tpot_ms)


def test_a_shared_channel_costs_more_with_each_board_than_a_wire():
    wire, air = (simulated(PROFILES[name], 8, SEVEN, 512) for name in ("pi4", "pi4-wifi"))
    assert air.further_ms > wire.further_ms + 4 * 0.17 and air.devices[1].link_ms > wire.devices[1].link_ms
    assert simulated(PROFILES["pi4"], 8, SEVEN, 512, mbit=100).further_ms > wire.further_ms


def test_a_sweep_tells_what_is_gained_and_what_is_lost():
    one, eight, lossy = (*sweep(PROFILES["pi5"], [1], [0.0], SEVEN, 512), *sweep(PROFILES["pi5"], [8], [0.0, 0.05], SEVEN, 512))
    assert one.efficiency == 1 and one.working == 1 and not one.parts.wire_ms
    assert eight.tpot_ms < 0.5 * one.tpot_ms and eight.efficiency == pytest.approx(one.tpot_ms / (8 * eight.tpot_ms))
    assert lossy.tpot_ms > eight.tpot_ms and lossy.parts.wait_ms > 0 == eight.parts.wait_ms
    assert eight.split_tpot_ms < eight.tpot_ms


def test_hundreds_of_boards_take_seconds_at_most():
    sizes, began = sizes_of(SHAPES["llama-2-70b"], "int4"), time.monotonic()
    four, many = sweep(PROFILES["pi4"], [4, 256], [0.02], sizes, 4096)
    assert time.monotonic() - began < 5
    assert "28672 MiB on 4 devices" in four.why_not and four.tpot_ms is None
    assert many.working <= 256 and many.why_not is None


def test_the_table_says_that_it_is_simulated_and_from_what():
    done = plan("--shape", "llama-2-13b", "--profile", "pi5", "--sweep", "1,8", "--loss", "0,0.02")
    said = " ".join(done.stdout.split())
    assert done.returncode == 0 and said.startswith("SIMULATED, not measured: Llama-2-13B shape in int4")
    assert "does not fit" in said and "1 boards: no shares were found" in said and "speed_gbps 8.55: one Pi 5" in said


def test_simulated_boards_are_a_file_of_devices(tmp_path):
    first = plan("--shape", "tinyllama", "--profile", "pi4", "--count", "3", "--loss", "0.02", "--json")
    (tmp_path / "devices.json").write_text(first.stdout)
    again = json.loads(plan("--shape", "tinyllama", "--devices", str(tmp_path / "devices.json"), "--json").stdout)
    told = json.loads(first.stdout)
    assert told["simulated"]["profile"] == "pi4" and told["devices"][1]["late_rate"] > 0
    assert again == {name: value for name, value in told.items() if name != "simulated"}


def test_a_sweep_as_json_has_its_points_and_figures():
    told = json.loads(plan("--shape", "tinyllama", "--profile", "pi5-wifi", "--sweep", "2,4", "--json").stdout)
    assert [point["count"] for point in told["points"]] == [2, 4]
    assert told["simulated"]["figures"]["frame_ms"]["value"] == 0.17


@pytest.mark.parametrize("options, part", [
    (("--profile", "pi4"), "--profile needs either --count N or --sweep"),
    (("--profile", "pi4", "--count", "2", "--sweep", "2,4"), "--profile needs either"),
    (("--profile", "pi4", "--count", "2", "--loss", "0,0.1"), "several values of --loss are for --sweep"),
    (("--profile", "pi4", "--count", "2", "--devices", "F"), "either --devices FILE or --profile NAME"),
    (("--devices", "F", "--mbit", "100"), "--mbit and --loss are for --profile"),
    (("--profile", "pi4", "--sweep", "2", "--loss", "0.5"), "0.5 is not in the range 0<=x<=0.2"),
    (("--profile", "pi4", "--sweep", "2,x"), "'x' is not a valid integer"),
    (("--profile", "pi4", "--count", "1", "--memory", "1G"), "no shares were found that the devices' memory holds"),
])  # fmt: skip
def test_wrong_options_of_a_simulation_are_one_line_and_code_2(options, part):
    done = plan("--shape", "llama-2-7b", *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and part in done.stderr, done.stderr


def test_boards_that_would_not_help_stay_idle():
    """But for even shares, which are kept where others are less than a tenth faster."""
    times = [point.tpot_ms for point in sweep(PROFILES["pi4"], [8, 16, 64, 128, 256], [0.02], SEVEN, 2048)]
    assert all(later < 1.02 * earlier for earlier, later in zip(times, times[1:]))
