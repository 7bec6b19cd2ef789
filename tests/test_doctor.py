"""doctor under mpirun: what is wrong on any rank's host is found and explained, and nobody hangs for a silent one."""

import json
import re
import shutil
import time

import pytest

from tests.lab import PROGRAMS, run as lab_run, scenario_file
from tests.mpi import finish, halo, start, succeed
from tests.boards import pi

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(60)]
DOCTOR_WITH = PROGRAMS / "doctor_with.py"


def without(model, shard, folder):
    """A copy of the model in which a shard is missing."""
    copy = shutil.copytree(model, folder)
    (copy / f"shard-{shard:02d}.h5").unlink()
    return copy


def told(finished, code):
    assert finished.code == code, f"exit code {finished.code}\n{finished.out}\n{finished.err}"
    return json.loads(next(line for line in finished.out.splitlines() if line.startswith("{")))


def levels(report):
    """By check and host; ok where nothing is said of a host by itself."""
    return {(finding["check"], finding["host"]): finding["level"] for finding in report["findings"]}


def finding(report, check, host):
    (found,) = [each for each in report["findings"] if (each["check"], each["host"]) == (check, host)]
    return found


@pytest.fixture
def doctor_with(tmp_path):
    """Runs doctor on some hosts with these settings, by host; the report."""

    def run_it(settings, *arguments, code, ranks=3):
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(settings))
        return told(finish(start(ranks, DOCTOR_WITH, file, "--json", *arguments), 50), code)

    return run_it


def test_ranks_with_nothing_wrong_have_no_errors(tiny):
    report = told(halo(3, "doctor", "--model", tiny, "--json"), 0)
    assert report["errors"] == 0 and "error" not in levels(report).values()
    checks = {"mpi", "version", "libraries", "model", "shards", "memory", "clock", "swap", "sockets"}
    assert checks <= {check for check, _ in levels(report)}
    assert [link["rank"] for link in report["links"]] == [1, 2]
    assert all(0 < link["rtt_p50_ms"] < 50 and link["mbit_there"] > 10 and link["connections"] == 0 for link in report["links"])


def test_a_computer_alone_gets_a_line_for_each_finding(tiny):
    out = succeed(halo(1, "doctor", "--model", tiny)).out
    lines = re.sub(r"\x1b\[\d*m", "", out).splitlines()  # mpirun gives ranks a terminal
    assert [line.split()[1] for line in lines if line.startswith("ok ")][:4] == ["mpi", "version", "libraries", "model"]
    assert not any("Mbit/s" in line for line in lines)


def test_what_differs_between_hosts_is_found_and_explained(doctor_with, tiny, tmp_path):
    hot = pi(tmp_path / "hot", throttled=0x40001, degrees=84.0)
    settings = {
        "pi1": {"arguments": ["--model", str(tiny)]},
        "pi2": {"arguments": ["--model", str(without(tiny, 1, tmp_path / "lacking"))]},
        "pi3": {"arguments": ["--model", str(tiny), "--sysfs", str(hot)]},
    }
    report = doctor_with(settings, code=0)
    shards, cooling, power = (finding(report, *where) for where in (("shards", "pi2"), ("cooling", "pi3"), ("power", "pi3")))
    assert shards["level"] == "warning" and "shard-01.h5" in shards["says"] and "copy" in shards["do"]
    assert (
        cooling["level"] == "warning"
        and "throttled at times since it started, 84 °C" in cooling["says"]
        and "fan" in cooling["do"]
    )
    assert power["level"] == "warning" and "under-voltage now" in power["says"] and "power supply" in power["do"]
    assert levels(report)["hosts", ""] == levels(report)["version", ""] == levels(report)["model", ""] == "ok"


def test_another_version_and_an_absent_model_are_errors(doctor_with, tiny, tmp_path):
    settings = {
        "pi1": {"arguments": ["--model", str(tiny)]},
        "pi2": {"arguments": ["--model", str(tiny)], "version": "0.0.9"},
        "pi3": {"arguments": ["--model", str(tmp_path / "nowhere.halo")]},
    }
    report = doctor_with(settings, code=1)
    version, model = finding(report, "version", "pi2"), finding(report, "model", "pi3")
    assert version["level"] == "error" and "halo_mpi 0.0.9" in version["says"] and "pi1" in version["says"] and version["do"]
    assert model["level"] == "error" and "nowhere.halo does not exist" in model["says"] and model["do"]
    assert report["errors"] == 2 and len(report["links"]) == 2


def test_silent_ranks_are_named_and_hold_nobody_up(doctor_with):
    begin, silent = time.monotonic(), {"silent": True}
    report = doctor_with({"pi2": silent, "pi3": silent}, "--patience", "2", code=1, ranks=4)
    assert time.monotonic() - begin < 20
    for rank in (1, 2):
        assert finding(report, "hosts", f"rank {rank}")["says"] == f"rank {rank} did not answer for 2 s"
    assert [link["host"] for link in report["links"]] == ["pi4"], "the others are looked at all the same"


def test_wrong_use_is_one_line_and_code_2():
    finished = halo(2, "doctor", "--context", "none")
    assert finished.code == 2 and len(finished.complaints) == 1 and "--context" in finished.complaints[0]


@pytest.mark.lab
def test_loss_on_one_link_is_found_there_and_nowhere_else(can, tmp_path):
    can("kernel")
    scenario = scenario_file(tmp_path, "hosts = 3\n[host.pi3]\nloss = 0.05\n")
    done = lab_run("run", "--no-marks", scenario, "--", "python", "-m", "halo_mpi.doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    good, bad = report["links"]
    assert (good["host"], bad["host"]) == ("pi2", "pi3") and good["connections"] == bad["connections"] == 4
    assert good["lost"] <= 2 and 0.015 < bad["loss_there"] + bad["loss_back"] < 0.25
    links = finding(report, "links", "pi3")
    assert links["level"] == "warning" and "packets lost" in links["says"] and "cable" in links["do"]
