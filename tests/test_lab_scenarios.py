"""Scenario files, and what the laboratory says where it cannot work."""

import subprocess
import sys

import pytest

from bench.lab.lab import Lab
from bench.lab.run import marks_progress
from bench.lab.scenario import Burst, Event, Host, load_scenario
from bench.lab.system import LabError
from tests.lab import SCENARIOS, leftovers
from tests.mpi import ROOT

pytestmark = [pytest.mark.lab, pytest.mark.timeout(60)]


@pytest.mark.parametrize("file", sorted(SCENARIOS.glob("*.toml")), ids=lambda file: file.stem)
def test_scenarios_of_the_repository_are_valid(file):
    assert load_scenario(file).hosts


def test_the_number_of_hosts_can_be_overridden():
    assert list(load_scenario(SCENARIOS / "loss-5.toml", hosts=8).hosts.values()) == [Host(loss=0.05)] * 8


def test_a_scenario_file_means_what_it_says(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text(
        "hosts = 3\nloss = 0.05\npace_ms = 0.7\n[host.pi3]\nslowdown = 0.25\n[host.pi3.burst]\ngood = 90\nbad = 10\n"
        '[[event]]\nat_s = 1.0\nhost = "pi2"\naction = "link-down"\nfor_s = 0.5\nevery_s = 2.0\ntimes = 2\n'
        '[[event]]\nat_phase = "prefill"\nhost = "pi2"\naction = "loss"\nvalue = 0.3\n'
    )
    scenario = load_scenario(file)
    plain = Host(loss=0.05, pace_ms=0.7)
    assert scenario.hosts == {"pi1": plain, "pi2": plain, "pi3": Host(pace_ms=0.7, slowdown=0.25, burst=Burst(90, 10))}
    assert scenario.events == (
        Event("pi2", "link-down", after_s=1.0),
        Event("pi2", "link-up", after_s=1.5),
        Event("pi2", "link-down", after_s=3.0),
        Event("pi2", "link-up", after_s=3.5),
        Event("pi2", "loss", 0.3, ("phase", "prefill")),
    )


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "hosts is missing"),
        ("hosts = 0", "hosts must be between"),
        ("hosts = true", "hosts must be a whole number"),
        ("hosts = 2\nlos = 0.1", "los: unknown key"),
        ("hosts = 2\nloss = 5", "loss must be at least 0 and below 1"),
        ("hosts = 2\nloss = '5 %'", "loss must be a number"),
        ("hosts = 2\njitter_ms = 1", "jitter_ms must be between 0 and delay_ms"),
        ("hosts = 2\n[burst]\ngood = 9", "burst.bad is missing"),
        ("hosts = 2\n[burst]\ngood = 9\nbad = 2\npace_ms = 1", "burst.pace_ms: unknown key; keys of the whole scenario"),
        ("hosts = 2\nloss = 0.1\n[burst]\ngood = 9\nbad = 2", "exclude each other"),
        ("hosts = 2\n[host.pi3]\nloss = 0.1", "host.pi3 must be one of pi1..pi2"),
        ("hosts = 2\n[host.pi2]\nslowdown = 4", "host.pi2.slowdown must be a speed"),
        ("hosts = 2\nloss_during = 'never'", "loss_during must be"),
        ("hosts = 2\n[[event]]\nat_s = 1\nhost = 'pi2'", "event 1: action is missing"),
        ("hosts = 2\n[[event]]\nhost = 'pi2'\naction = 'kill'", "event 1: give one of at_s"),
        ("hosts = 2\n[[event]]\nat_s = 1\nhost = 'pi2'\naction = 'loss'", "event 1: value must be given with loss"),
        ("hosts = 2\n[[event]]\nat_s = 1\nhost = 'pi2'\naction = 'kill'\nfor_s = 1", "event 1: for_s must be absent with kill"),
        ("hosts 2", "no valid TOML"),
    ],
)
def test_a_wrong_scenario_is_one_line_with_file_and_key(tmp_path, text, complaint):
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(LabError) as caught:
        load_scenario(file)
    assert str(caught.value).startswith(f"{file}: ") and complaint in str(caught.value) and "\n" not in str(caught.value)


def test_commands_of_halo_mpi_are_known_to_mark_their_progress():
    assert marks_progress(["python", "-m", "halo_mpi.generate"]) and marks_progress(["/x/bin/halo-mpi", "generate"])
    assert not marks_progress(["python", "program.py"])


# Where it cannot work


def test_without_root_there_is_a_reason_in_one_line():
    drop_rights = "import os; from bench.lab.__main__ import guarded; os.geteuid() or os.seteuid(65534); guarded()"
    command = [sys.executable, "-c", drop_rights, "up", str(SCENARIOS / "clean-4.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lab: the lab makes network namespaces: run it as root (sudo)\n"


def test_without_a_compiler_bursts_have_a_reason_and_losses_still_work(can, monkeypatch, tmp_path):
    can("kernel")
    monkeypatch.setattr("bench.lab.relay_links.COMPILERS", ("no-such-compiler",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failing = Lab(load_scenario(SCENARIOS / "wifi.toml"))
    with pytest.raises(LabError, match="needs a C compiler; install gcc .*bursts"):
        failing.__enter__()
    assert leftovers(failing.marks) == []
    with Lab(load_scenario(SCENARIOS / "loss-5.toml")) as lab:
        assert lab.links.name == "nft"


def test_events_that_break_more_than_a_link(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text(
        "hosts = 3\n"
        '[[event]]\nat_token = 4\nafter_s = 0.05\nhost = "pi2"\naction = "reboot"\nvalue = 6\n'
        '[[event]]\nat_s = 2.0\naction = "terminate"\n[[event]]\nat_phase = "prefill"\nhost = "pi3"\naction = "nan"\n'
    )
    assert load_scenario(file).events == (
        Event("pi2", "reboot", 6, ("token", 4), 0.05),
        Event("pi2", "boot", None, ("token", 4), 6.05),
        Event("pi1", "terminate", after_s=2.0),
        Event("pi3", "nan", trigger=("phase", "prefill")),
    )


@pytest.mark.parametrize("lines, said", [
    ('at_s = 1.0\nhost = "pi1"\naction = "reboot"\nvalue = 3', "event 1: host must be another one than pi1"),
    ('at_s = 1.0\nhost = "pi2"\naction = "reboot"', "event 1: value must be given with reboot"),
    ('at_s = 1.0\nafter_s = 1.0\nhost = "pi2"\naction = "oom"', "event 1: after_s must be absent with at_s"),
])  # fmt: skip
def test_events_that_cannot_be(tmp_path, lines, said):
    file = tmp_path / "s.toml"
    file.write_text(f"hosts = 3\n[[event]]\n{lines}\n")
    with pytest.raises(LabError, match=said):
        load_scenario(file)
