"""Whole runs under mpirun; they leave nothing behind, whichever way they end."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bench.lab.lab import is_owned
from bench.lab.system import NETNS
from tests.lab import BACKENDS, SCENARIOS, lab_of, lab_owned_by, leftovers, machine_state, program, run, start

pytestmark = [pytest.mark.lab, pytest.mark.timeout(60)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mpirun_starts_a_rank_per_host_and_its_traffic_crosses_the_links(can, tmp_path, backend):
    can(backend)
    before, record = machine_state(), tmp_path / "record.json"
    options = ["--hosts", 3, "--backend", backend, "--record", record]
    done = run("run", SCENARIOS / "clean-4.toml", *options, *program("lab_hosts.py"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hosts"] == ["pi1", "pi2", "pi3"]
    assert leftovers(lab_of(done.stdout)) == [] and machine_state() == before
    links = {(link["host"], link["direction"]): link for link in json.loads(record.read_text())["links"]}
    for host in ("pi2", "pi3"):  # 20 broadcasts of 50 kB came in
        assert 1_000_000 < links[host, "down"]["bytes"] < 2_500_000
        assert links[host, "up"]["packets"] > 20


def test_the_daemons_speak_over_the_links_too(can, tmp_path):
    can("kernel")
    record = tmp_path / "record.json"
    done = run("run", SCENARIOS / "clean-4.toml", "--hosts", 2, "--record", record, "--", "hostname")
    assert (done.returncode, sorted(done.stdout.split())) == (0, ["pi1", "pi2"])
    assert all(link["packets"] > 10 for link in json.loads(record.read_text())["links"]), "no rank spoke MPI"


@pytest.mark.parametrize("way", ("own", "mpirun"))
def test_the_exit_code_is_the_commands_own(can, way):
    can("kernel")
    before = machine_state()
    done = run("run", SCENARIOS / "clean-4.toml", "--hosts", 2, *program("lab_hosts.py", 3, way))
    assert done.returncode == 3, done.stderr
    assert leftovers(lab_of(done.stdout)) == [] and machine_state() == before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
def test_an_interrupted_run_leaves_nothing(can, number, backend):
    can(backend)
    before = machine_state()
    process = start("run", SCENARIOS / "loss-5.toml", "--marks", "--backend", backend, *program("lab_marks.py", 100_000, 1))
    folder = json.loads(process.stdout.readline())["lab"]
    time.sleep(0.3)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert leftovers(folder) == [] and machine_state() == before


@pytest.mark.parametrize("words", (["up"], ["run"], ["run", "--backend", "relay"]), ids=" ".join)
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_lab_that_is_interrupted_while_it_is_made_leaves_nothing(can, words, number):
    can("relay" if "relay" in words else "kernel")
    before = machine_state()
    process = start(*words, SCENARIOS / "clean-4.toml", *(["--", "hostname"] if "run" in words else []))
    folder = lab_owned_by(process)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert leftovers(folder) == [] and machine_state() == before


def test_impatient_ctrl_c_on_a_terminal_leaves_nothing(can):
    """A terminal sends SIGINT to the whole foreground group, and people press it more than once."""
    can("kernel")
    before = machine_state()
    words = ("run", SCENARIOS / "clean-4.toml", "--marks", *program("lab_marks.py", 100_000, 1))
    process = start(*words, start_new_session=True)
    folder = json.loads(process.stdout.readline())["lab"]
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    assert leftovers(folder) == [] and machine_state() == before


def test_a_command_that_cannot_be_started_leaves_nothing(can):
    can("kernel")
    before = machine_state()
    process = start("run", SCENARIOS / "clean-4.toml", "--hosts", 2, "--", "no-such-program")
    folder = lab_owned_by(process)
    error = process.communicate(timeout=20)[1]
    assert process.returncode != 0 and "no-such-program" in error
    assert leftovers(folder) == [] and machine_state() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_down_removes_what_a_killed_lab_left(can, backend):
    can(backend)
    before = machine_state()
    words = ("run", SCENARIOS / "clean-4.toml", "--marks", "--backend", backend, *program("lab_marks.py", 100_000, 1))
    process = start(*words)
    folder = json.loads(process.stdout.readline())["lab"]
    name = Path(folder).parent.name
    assert is_owned(name), "down without a name spares it"
    process.kill()
    process.wait()
    assert not is_owned(name) and leftovers(folder)
    assert run("down", name).returncode == 0
    assert leftovers(folder) == [] and machine_state() == before


def test_down_removes_a_lab_that_was_killed_while_it_was_made(can):
    can("kernel")
    process = start("run", SCENARIOS / "clean-8.toml", "--", "hostname")
    folder = lab_owned_by(process)
    time.sleep(0.05)
    process.kill()
    process.communicate()
    assert leftovers(folder)
    assert run("down", Path(folder).parent.name).returncode == 0
    assert leftovers(folder) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_that_takes_too_long_is_ended(can, backend):
    can(backend)
    before = machine_state()
    words = ("run", SCENARIOS / "clean-4.toml", "--timeout", 1.5, "--marks", "--backend", backend)
    done = run(*words, *program("lab_marks.py", 100_000, 1))
    assert done.returncode == 124 and "not done after 1.5 s" in done.stderr
    assert leftovers(lab_of(done.stdout)) == [] and machine_state() == before


def test_two_labs_run_side_by_side(can):
    can("kernel")
    both = [start("run", SCENARIOS / "clean-4.toml", "--marks", *program("lab_marks.py", 50, 10)) for _ in range(2)]
    outputs = [process.communicate(timeout=40)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len({lab_of(output) for output in outputs}) == 2
    assert [leftovers(lab_of(output)) for output in outputs] == [[], []]


@pytest.mark.parametrize("backend", BACKENDS)
def test_up_leaves_a_network_until_down(can, backend):
    can(backend)
    shown = run("up", SCENARIOS / "clean-4.toml", "--backend", backend)
    name = shown.stdout.partition(":")[0]
    agent = re.search(r"/\S+/agent", shown.stdout)[0]
    try:
        assert subprocess.run([agent, "pi2", "hostname"], capture_output=True, text=True).stdout == "pi2\n"
    finally:
        done = run("down", name)
    assert done.returncode == 0 and leftovers(f"{Path(agent).parent}/marks") == []


def test_a_kept_lab_stays_until_down(can):
    can("kernel")
    done = run("run", SCENARIOS / "clean-4.toml", "--hosts", 2, "--keep", *program("lab_hosts.py"))
    folder = lab_of(done.stdout)
    name = Path(folder).parent.name
    assert done.returncode == 0 and not is_owned(name)
    assert f"python -m bench.lab down {name}" in done.stderr
    assert [path.name for path in sorted(NETNS.glob(f"{name}-*"))] == [f"{name}-pi1", f"{name}-pi2", f"{name}-switch"]
    assert not [left for left in leftovers(folder) if left.startswith("process")]
    assert run("down", name).returncode == 0
    assert leftovers(folder) == []


def test_the_record_lies_beside_the_report_of_the_command(can, tmp_path):
    can("kernel")
    report = tmp_path / "report.json"
    done = run("run", SCENARIOS / "clean-4.toml", "--hosts", 2, "--", "python", "-c", "", "--json", report)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "report.lab.json").read_text())
    assert written["scenario"]["name"] == "clean-4" and written["backend"] in ("nft", "relay") and written["exit_code"] == 0
