"""The real program in the laboratory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab import SCENARIOS, event, run, scenario_file
from tests.mpi import EVEN, ROOT

pytestmark = [pytest.mark.lab, pytest.mark.timeout(150)]
TOKENS = 64  # of the texts without faults
FEWER_TOKENS = {"flapping": 64, "loss-10": 8, "two-bad-of-eight": 2}  # else 16: a loss costs 0.2 s and more
PACED = {"flapping": 10.0}  # ms per sync: so that the text takes as long as it is until the link goes down
HARMLESS = sorted(file.stem for file in SCENARIOS.glob("*.toml") if '"kill"' not in file.read_text())
FAST = "loss-10"  # the scenario that is tried at each run of the tests


def generated(scenario: Path, model: Path, folder: Path, tokens: int, prompt: str = "The dog",
              options: tuple[str, ...] = ()) -> tuple[dict, dict]:  # fmt: skip
    """The report of a text generated in a scenario, and the lab's record."""
    report = folder / "report.json"
    options = ["--prompt", prompt, "--max-tokens", tokens, "--ignore-eos", "--json", report, *options]
    done = run("run", scenario, "--", "python", "-m", "halo_mpi.generate", *EVEN, "--model", model, *options, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text()), json.loads(report.with_suffix(".lab.json").read_text())


@pytest.fixture(scope="module")
def clean_ids(can, small, tmp_path_factory):
    """The token ids without faults, on so many hosts."""
    known: dict[int, list[int]] = {}

    def ids(hosts: int) -> list[int]:
        if hosts not in known:
            can("kernel")
            folder = tmp_path_factory.mktemp(f"clean-{hosts}")
            known[hosts] = generated(SCENARIOS / f"clean-{hosts}.toml", small, folder, TOKENS)[0]["token_ids"]
        return known[hosts]

    return ids


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != FAST)) for name in HARMLESS])
def test_the_tokens_are_the_same_in_every_scenario_that_kills_nobody(can, small, clean_ids, tmp_path, name):
    can("relay" if name == "wifi" else "kernel")
    tokens, text = FEWER_TOKENS.get(name, 16), (SCENARIOS / f"{name}.toml").read_text()
    scenario = scenario_file(tmp_path, f"pace_ms = {PACED[name]}\n{text}" if name in PACED else text)
    report, record = generated(scenario, small, tmp_path, tokens)
    assert report["sync"]["mode"] == "strict" and report["token_ids"] == clean_ids(report["ranks"])[:tokens]
    assert all(device["heads"] and device["groups"] for device in report["devices"]), "each link matters"
    dropped = sum(link["dropped"] for link in record["links"])
    if name in ("loss-5", "loss-10", "two-bad-of-eight"):
        assert dropped > 0
    elif "loss" not in text:
        assert dropped == 0
    if name == "flapping":
        assert [entry["action"] for entry in record["events"]][:2] == ["link-down", "link-up"]
        assert max(link["cut"] for link in record["links"] if link["host"] == "pi3") > 0
    if name == "hot-pi":
        assert report["devices"][2]["paced"] == {"pace_ms": 0.7, "slowdown": 0.25, "row_share": 0.0}


@pytest.mark.slow
def test_the_scheduler_sees_losses_that_are_on_when_it_measures(can, small, tmp_path):
    can("kernel")
    scenario = scenario_file(tmp_path, 'hosts = 3\nloss_during = "measuring"\n[host.pi3]\nloss = 0.3\n')
    report, _ = generated(scenario, small, tmp_path, 2, options=("--placement", "auto"))
    late = [device["late_rate"] for device in report["scheduler"]["devices"]]
    assert late[2] > max(0.1, late[1])


@pytest.mark.slow
def test_the_real_program_gives_the_same_tokens_with_and_without_losses(can, tiny, tmp_path):
    """Strict: what the network does changes the time, not the text. Losses are on only between the marks."""
    can("kernel")
    reports = []
    for loss in (0.0, 0.05):
        scenario = tmp_path / f"loss-{loss}.toml"
        scenario.write_text(f"hosts = 3\nloss = {loss}\n")
        report = tmp_path / f"report-{loss}.json"
        command = [sys.executable, "-m", "halo_mpi.generate", *EVEN, "--model", str(tiny), "--prompt", "The dog"]
        options = ["--max-tokens", "12", "--ignore-eos", "--json", str(report)]
        run = [sys.executable, "-m", "bench.lab", "run", str(scenario), "--backend", "kernel", "--", *command, *options]
        finished = subprocess.run(run, capture_output=True, text=True, timeout=50, cwd=ROOT)
        assert finished.returncode == 0, finished.stderr
        reports.append((json.loads(report.read_text()), json.loads(report.with_suffix(".lab.json").read_text())))
    (clean, _), (lossy, record) = reports
    assert clean["token_ids"] == lossy["token_ids"] and len(clean["token_ids"]) == 12
    assert [device["host"] for device in lossy["devices"]] == ["pi1", "pi2", "pi3"]
    assert sum(link["dropped"] for link in record["links"]) > 0


@pytest.mark.slow
def test_a_paced_host_takes_as_long_per_sync_as_the_scenario_says(can, small, tmp_path):
    can("kernel")
    tokens, pace_ms = 20, {"pi1": 6.0, "pi2": 6.0, "pi3": 24.0, "pi4": 0.0}
    text = "hosts = 4\npace_ms = 6\n[host.pi3]\nslowdown = 0.25\n[host.pi4]\npace_ms = 0\n"
    report, _ = generated(scenario_file(tmp_path, text), small, tmp_path, tokens)
    assert 24 <= report["sync_ms"]["p50"] <= 28, "the slowest host's, and the way there and back"
    computed_tokens, requests = report["prompt_tokens"] + tokens - 1, 4 * tokens  # a prefill is one request per sync
    for device in report["devices"]:
        taken_ms = device["compute_ms"] * computed_tokens / requests
        assert pace_ms[device["host"]] <= taken_ms <= pace_ms[device["host"]] * 1.05 + 1, device


def test_an_event_at_prefill_happens_before_the_first_token(can, small, tmp_path):
    can("kernel")
    text = "hosts = 2\npace_ms = 20\n" + event("stop", 'at_phase = "prefill"', "for_s = 1.0")
    report, record = generated(scenario_file(tmp_path, text), small, tmp_path, 8)
    assert [(entry["host"], entry["action"]) for entry in record["events"]] == [("pi2", "stop"), ("pi2", "continue")]
    assert record["events"][0]["t_s"] < 0.5
    assert 1000 <= report["ttft_ms"] <= 1600 and report["tpot_ms"]["max"] < 400


@pytest.mark.slow
def test_without_fault_tolerance_a_dead_pi_ends_the_run_with_one_line_that_says_so(can, small, tmp_path):
    """Open MPI ends all ranks."""
    can("kernel")
    scenario = scenario_file(tmp_path, "pace_ms = 10\n" + (SCENARIOS / "dead-pi.toml").read_text())
    command = [
        "python",
        "-m",
        "halo_mpi.generate",
        *EVEN,
        "--model",
        small,
        "--prompt",
        "The dog",
        "--max-tokens",
        300,
        "--ignore-eos",
    ]
    done = run("run", scenario, "--no-ft", "--timeout", 30, "--record", tmp_path / "record.json", "--", *command)
    record = json.loads((tmp_path / "record.json").read_text())
    assert done.returncode not in (0, 124) and record["exit_code"] == done.returncode
    assert 20 < record["tokens"] < 300 and record["duration_s"] < 15
    said = [line for line in done.stderr.replace("\0", "").splitlines() if line.startswith("lab: ")]  # mpirun ends with a NUL
    assert said == [f"lab: the scenario killed the rank on pi3; the command ended with exit code {done.returncode}"]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_messages_go_twice_over_two_connections_unless_told_not_to(can, small, tmp_path):
    """Whether waiting becomes rarer by it is a matter of chance in so few tokens; `bench.tpot --modes repair,twice` measures it."""
    can("kernel")
    scenario = scenario_file(tmp_path, "hosts = 3\nloss = 0.05\npace_ms = 0.7\n")
    twice = generated(scenario, small, tmp_path, 16)[0]
    once, four = (generated(scenario, small, tmp_path, 16, options=("--copies", copies))[0] for copies in "14")
    assert twice["sync"]["copies"] == 2 and once["sync"]["copies"] == 1
    assert [device["copies"] for device in four["devices"]] == [1, 4, 4]
    assert twice["token_ids"] == once["token_ids"] == four["token_ids"]
    vectors = 15 * 4 * 2 * 2 * 128  # bytes: of 15 tokens, 4 syncs and 2 workers, 128 values in f16
    assert twice["devices"][0]["sent_bytes"] > once["devices"][0]["sent_bytes"] + 0.8 * vectors
    assert not any("sent twice" in event["what"] for event in twice["events"])
