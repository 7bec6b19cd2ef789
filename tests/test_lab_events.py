"""A running program and its laboratory: marks, events, and the record of both."""

import json
import subprocess
from pathlib import Path
from statistics import median

import pytest

from bench.lab.director import Director
from bench.lab.lab import Lab
from bench.lab.scenario import Event, Host, Scenario
from tests.lab import event, lab_of, leftovers, machine_state, program, run, scenario_file

pytestmark = [pytest.mark.lab, pytest.mark.timeout(60)]


def marked_run(folder: Path, text: str, tokens: int, ms: float, *options) -> tuple[dict, dict, subprocess.CompletedProcess]:
    """The program's own last line, the lab's record, and the end of a run of lab_marks.py in a scenario."""
    record = folder / "record.json"
    file = scenario_file(folder, text)
    done = run("run", file, "--marks", "--record", record, *options, *program("lab_marks.py", tokens, ms))
    assert leftovers(lab_of(done.stdout)) == []
    return json.loads(done.stdout.splitlines()[-1]), json.loads(record.read_text()), done


def test_losses_last_from_the_begin_to_the_end_of_generation(can, tmp_path):
    can("kernel")
    program_said, record, done = marked_run(tmp_path, "hosts = 2\nloss = 0.05\n", 100, 0)
    assert done.returncode == 0 and record["tokens"] == 100
    assert 0 < record["generation_s"]["begin"] < record["generation_s"]["end"] < record["duration_s"]
    judged = {link["direction"]: link for link in record["links"] if link["host"] == "pi2"}
    for link in judged.values():  # at least 100 packets each of warm-up and of generation
        assert 100 <= link["judged"] <= link["packets"] + link["dropped"] - 100
        assert link["measured_loss"] < 0.2 and link["offered_loss"] == 0.05
    assert sum(link["dropped"] for link in judged.values())
    assert max(program_said["token_ms"]) > 150, "a lost packet costs the kernel's retransmission time"


@pytest.mark.parametrize("action, backend", [("link-down", "kernel"), ("link-down", "relay"), ("black-hole", "kernel"),
                                             ("black-hole", "relay"), ("stop", "kernel")])  # fmt: skip
def test_an_outage_by_token_stalls_the_run_until_it_ends(can, tmp_path, action, backend):
    can(backend)
    text = "hosts = 2\n" + event(action, "at_token = 10", "for_s = 0.5")
    program_said, record, done = marked_run(tmp_path, text, 60, 5, "--backend", backend)
    assert done.returncode == 0, done.stderr
    assert 400 < max(program_said["token_ms"]) < 4000 and median(program_said["token_ms"]) < 100
    opposite = {"link-down": "link-up", "black-hole": "heal", "stop": "continue"}[action]
    assert [e["action"] for e in record["events"]] == [action, opposite]
    assert 0.45 < record["events"][1]["t_s"] - record["events"][0]["t_s"] < 1.0


def test_slowdown_and_loss_change_by_time_and_phase(can, tmp_path):
    can("kernel")
    text = "hosts = 2\n" + event("slowdown", "at_s = 0.2", "value = 0.25\nfor_s = 0.2")
    text += event("loss", 'at_phase = "prefill"', "value = 0.000001")
    program_said, record, done = marked_run(tmp_path, text, 100, 6)
    assert done.returncode == 0, done.stderr
    seen = [answers[0] for answers in program_said["slowdowns"]]
    assert seen[0] == 1.0 == seen[-1] and 0.25 in seen
    assert [(e["action"], e.get("value")) for e in record["events"]] == [
        ("loss", 0.000001),
        ("slowdown", 0.25),
        ("slowdown", None),
    ]
    assert any(link["judged"] for link in record["links"])


def test_what_is_broken_at_the_end_of_generation_is_mended(can):
    can("kernel")
    events = (Event("pi2", "link-down"), Event("pi2", "link-up", after_s=60), Event("pi1", "black-hole", after_s=60))
    with Lab(Scenario("test", {"pi1": Host(), "pi2": Host()}, events)) as lab:
        director = Director(lab)
        director.begin(0.0)
        director.act(0.0)
        assert lab.conditions.unplugged == {"pi2"}
        director.end(1.0)
        assert not lab.conditions.unplugged and not lab.conditions.black_holes
        assert [entry["action"] for entry in director.log] == ["link-down", "link-up"]


def test_a_killed_rank_is_recorded(can, tmp_path):
    can("kernel")
    before = machine_state()
    file, record = scenario_file(tmp_path, "hosts = 3\n" + event("kill", "at_s = 0.3")), tmp_path / "record.json"
    done = run("run", file, "--no-ft", "--marks", "--record", record, *program("lab_marks.py", 1000, 5))
    written = json.loads(record.read_text())
    assert done.returncode != 0 and written["exit_code"] == done.returncode
    assert [(e["host"], e["action"]) for e in written["events"]] == [("pi2", "kill")]
    assert 0.3 <= written["events"][0]["t_s"] < 1.0 and written["tokens"] < 1000
    assert leftovers(lab_of(done.stdout)) == [] and machine_state() == before
