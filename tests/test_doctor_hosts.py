"""doctor without mpirun, for the hosts of a hostfile: those that are down, refuse, or run something else are found and explained."""

import json
import os
import subprocess
import sys

import pytest

from halo_mpi.health.hosts import DEFAULT_SSH
from tests.mpi import ROOT, mpi_is_open_mpi

pytestmark = pytest.mark.timeout(60)

SSH = """#!/bin/sh
host=$1
shift
case $host in
dead) echo "ssh: connect to host dead port 22: No route to host" >&2; exit 255;;
unknown) echo "ssh: Could not resolve hostname unknown: Name or service not known" >&2; exit 255;;
locked) echo "root@locked: Permission denied (publickey,password)." >&2; exit 255;;
hung) exec sleep 30;;
bare) echo "/bin/sh: 1: cd: can't cd to /srv/halo" >&2; exit 2;;
old) exec sh -c "$(echo "$*" | sed s/halo_mpi.doctor/tests.programs.old_doctor/)";;
*) exec sh -c "$*";;
esac
"""


@pytest.fixture
def doctor(tmp_path):
    """Runs doctor for a hostfile of these lines, with an ssh that reaches boards that are this computer."""
    ssh, hostfile = tmp_path / "ssh", tmp_path / "hosts.txt"
    ssh.write_text(SSH)
    ssh.chmod(0o755)

    def run(*lines, code, arguments=(), **environ):
        hostfile.write_text("\n".join(lines))
        command = [sys.executable, "-m", "halo_mpi.doctor", "--hostfile", hostfile, "--ssh", ssh, "--json", *arguments]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
        done = subprocess.run([*map(str, command)], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=50)
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)["findings"] if done.stdout else done.stderr

    return run


def of(findings, check, host=""):
    (found,) = [finding for finding in findings if (finding["check"], finding["host"]) == (check, host)]
    return found


def line(host, slots=1):
    return f"{host} slots={slots}" if mpi_is_open_mpi() else f"{host}:{slots}"


def test_hosts_that_answer_examine_themselves(doctor, tiny):
    findings = doctor(line("localhost"), line("board-a", 2), code=0, arguments=["--model", tiny])
    assert of(findings, "hosts")["says"] == "2 of 2 answer" and "2 hosts, 3 ranks" in of(findings, "hostfile")["says"]
    assert of(findings, "model")["level"] == of(findings, "shards")["level"] == of(findings, "version")["level"] == "ok"
    assert "of 2 workers may be lost" in of(findings, "memory")["says"]
    assert of(findings, "clock", "localhost")["level"] and of(findings, "clock", "board-a")["level"]


def test_a_host_that_is_down_refuses_or_hangs_is_told_with_what_to_do(doctor):
    names = ("localhost", "dead", "unknown", "locked", "hung", "bare", "board-a")
    findings = doctor(*map(line, names), code=1, arguments=["--patience", "3"])
    told = {name: of(findings, "hosts", name) for name in names[1:6]}
    assert {each["level"] for each in told.values()} == {"error"}
    assert "Permission denied" in told["locked"]["says"] and "ssh-copy-id locked" in told["locked"]["do"]
    assert told["hung"]["says"] == "did not answer in 3 s" and "power" in told["hung"]["do"]
    assert "can't cd to" in told["bare"]["says"] and "quickstart.sh" in told["bare"]["do"]
    assert "No route to host" in told["dead"]["says"] and "# before its line" in told["dead"]["do"]
    assert told["unknown"]["says"] == "no computer of this name is known here" and "/etc/hosts" in told["unknown"]["do"]
    assert of(findings, "clock", "board-a"), "the others are looked at all the same"


def test_a_host_with_another_version_is_told(doctor):
    version = of(doctor(line("localhost"), line("old"), code=1), "version", "old")
    assert version["level"] == "error" and "halo_mpi 0.0.9" in version["says"] and "on localhost" in version["says"]


def test_a_hostfile_in_the_other_dialect_is_told(doctor):
    if not mpi_is_open_mpi():
        pytest.skip("is about Open MPI's dialect")
    hostfile = of(doctor("localhost slots=1", "pi2:2", code=1), "hostfile")
    assert "line 2" in hostfile["says"] and hostfile["do"] == "with Open MPI write 'pi2 slots=2'"


def test_wrong_use_is_one_line_and_code_2(doctor):
    assert "--hostfile is for a start without mpirun" in doctor(line("localhost"), code=2, OMPI_COMM_WORLD_RANK="0")
    assert "no program 'no-such-ssh'" in doctor(line("localhost"), line("b"), code=2, arguments=["--ssh", "no-such-ssh"])


def test_ssh_asks_for_no_password_and_does_not_wait_long():
    assert "BatchMode=yes" in DEFAULT_SSH and "ConnectTimeout=3" in DEFAULT_SSH
