"""A run that is lost, killed or asked to end in the middle of its text, under launch/halo-mpirun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mpi import EVEN, ROOT, mpi_is_open_mpi, mpi_tolerates

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(90)]
TEXT = (
    *EVEN,
    "--wire",
    "f32",
    "--prompt",
    "The quick",
    "--max-tokens",
    "40",
    "--ignore-eos",
    "--temperature",
    "1.0",
    "--seed",
    "5",
)


class Launched:
    """halo-mpirun with the slow program, and its processes."""

    def __init__(self, model, *arguments, options=("-n", "3"), program="tests.programs.slow", **environ):
        self.mark = f"HALO_TEST_MARK={os.getpid()}-{time.monotonic_ns()}"
        name, value = self.mark.split("=")
        command = [sys.executable, ROOT / "launch" / "halo-mpirun", *options, sys.executable, "-m", program, "--model", model]
        self.process = subprocess.Popen(
            list(map(str, [*command, *arguments])),
            env={**os.environ, "PYTHONPATH": str(ROOT), **environ, name: value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.out = b""

    def until(self, count):
        """Wait until so many bytes of the text are there."""
        while len(self.out) < count:
            data = os.read(self.process.stdout.fileno(), 1)
            assert data, self.process.stderr.read().decode()
            self.out += data
        return self

    def processes(self):
        """Pid and environment of everything that it started."""
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = Path("/proc", entry, "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if self.mark in environment and int(entry) != self.process.pid:
                yield int(entry), environment

    def rank(self, number):
        names = {f"OMPI_COMM_WORLD_RANK={number}", f"PMI_RANK={number}"}
        return next(pid for pid, environment in self.processes() if names & set(environment))

    def mpirun(self):
        return next(pid for pid, _ in self.processes() if parent(pid) == self.process.pid)

    def send(self, pid, number=signal.SIGKILL):
        os.kill(pid, number)
        return self

    def end(self, timeout=45):
        """(exit code, text, standard error, seconds that it took)"""
        begin = time.monotonic()
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            pytest.fail(f"hang: {self.process.communicate(timeout=20)}")
        took = time.monotonic() - begin
        left = [pid for pid, _ in self.processes()]
        assert not left, left
        return self.process.returncode, self.out + out, err.decode(), took


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def whole(tiny):
    """The text of an undisturbed run."""
    code, out, err, _ = Launched(tiny, *TEXT, program="halo_mpi.generate").end()
    assert code == 0, err
    return out


def test_a_killed_mpirun_is_started_again_and_the_text_is_the_same_to_the_byte(tiny, whole):
    run = Launched(tiny, *TEXT).until(20)
    code, out, err, _ = run.send(run.mpirun()).end()
    assert (code, out) == (0, whole), err
    assert "the job was lost" in err and "going on after" in err


def test_no_restart_means_none(tiny):
    run = Launched(tiny, *TEXT, options=("--no-restart", "-n", "2")).until(20)
    code, _, err, _ = run.send(run.mpirun()).end()
    assert code == 1 and "with --checkpoint FILE" in err and err.count("\n") == 1


def test_sigterm_ends_in_order_and_the_same_command_goes_on(tiny, whole, tmp_path):
    kept, report = tmp_path / "text.json", tmp_path / "report.json"
    options = (*TEXT, "--checkpoint", kept, "--json", report)
    run = Launched(tiny, *options).until(20)
    code, out, err, took = run.send(run.process.pid, signal.SIGTERM).end()
    assert code == 143 and took < 5, err
    assert whole.startswith(out.rstrip(b"\n")) and "Killed" not in err and "Traceback" not in err
    told = json.loads(report.read_text())
    assert told["finish_reason"] == "terminated" and told["text"].encode() + b"\n" == out
    assert len(json.loads(kept.read_text())["token_ids"]) == told["generated_tokens"] < 40
    code, out, err, _ = Launched(tiny, *options, program="halo_mpi.generate").end()
    assert (code, out) == (0, whole), err
    assert not kept.exists() and json.loads(report.read_text())["generated_tokens"] == 40


def test_sigterm_during_start_up_ends_promptly(tiny):
    run = Launched(tiny, *TEXT)
    time.sleep(1.0)
    code, out, err, took = run.send(run.process.pid, signal.SIGTERM).end()
    assert code == 143 and (not out or b"BAD TERMINATION" in out) and took < 7 and "Traceback" not in err, err


def test_a_killed_root_ends_the_job_and_is_not_started_again(tiny):
    run = Launched(tiny, *TEXT).until(20)
    code, _, err, took = run.send(run.rank(0)).end()
    assert code == 1 and took < 5, (took, err)
    assert "was killed" in err and "going on" not in err
    if mpi_tolerates():
        assert "rank 0 was killed" in err


def test_a_batch_that_is_lost_repeats_and_misses_nothing(tiny, tmp_path):
    lines = [{"id": number, "prompt": f"The quick {number}", "temperature": 1.0} for number in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = (*EVEN, "--prompts", tmp_path / "in.jsonl", "--max-tokens", 20, "--ignore-eos", "--seed", 3, "--out")
    run = Launched(tiny, *options, tmp_path / "out.jsonl", options=("-n", "2"))
    while not (tmp_path / "out.jsonl").exists() or not (tmp_path / "out.jsonl").read_text():
        time.sleep(0.02)
    time.sleep(0.3)
    code, _, err, _ = run.send(run.mpirun()).end()
    assert code == 0 and "going on after" in err, err
    code, _, err, _ = Launched(tiny, *options, tmp_path / "whole.jsonl", options=("-n", "2"), program="halo_mpi.generate").end()
    essence = [[(r["id"], r["token_ids"], r["finish_reason"]) for r in map(json.loads, path.read_text().splitlines())]
               for path in (tmp_path / "out.jsonl", tmp_path / "whole.jsonl")]  # fmt: skip
    assert essence[0] == essence[1] and len(essence[0]) == 3


# --- on several hosts, which here are names that an agent knows


@pytest.fixture
def hosts(tmp_path):
    """A hostfile of this computer and two others, and an agent that reaches them until their names are in the file `dead`."""
    if not mpi_is_open_mpi():
        pytest.skip("uses the launch agent of Open MPI")
    agent, dead, hostfile = tmp_path / "agent", tmp_path / "dead", tmp_path / "hosts"
    agent.write_text(f'#!/bin/sh\ngrep -qx "$1" {dead} && exit 255\nshift\nexec /bin/sh -c "$*"\n')
    agent.chmod(0o755)
    dead.write_text("")
    hostfile.write_text("localhost slots=1\nboard-a slots=1\nboard-b slots=1\n")
    return ("-hostfile", hostfile, "--prtemca", "plm_ssh_agent", agent, "--mca", "coll", "^han"), dead


def test_a_host_that_goes_down_is_left_out_and_the_text_goes_on(tiny, whole, hosts):
    options, dead = hosts
    run = Launched(tiny, *TEXT, options=options).until(20)
    dead.write_text("board-a\n")
    code, out, err, _ = run.send(parent(run.rank(1))).end()
    assert (code, out) == (3, whole), err
    assert "do not answer: board-a;" in err and "on 2 ranks" in err


def test_a_daemon_that_is_killed_on_a_host_that_answers_costs_nothing(tiny, whole, hosts):
    run = Launched(tiny, *TEXT, options=hosts[0]).until(20)
    code, out, err, _ = run.send(parent(run.rank(2))).end()
    assert (code, out) == (0, whole), err
    assert "left out" not in err and "on 3 ranks" in err


def test_restarts_without_a_new_token_come_to_an_end(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    from mpirun_again import Restarts
    from mpirun_hosts import LaunchError
    from mpirun_start import End

    kept = tmp_path / "text.json"
    kept.write_text('{"id": null, "token_ids": [1]}')
    restarts, end = Restarts([], "", kept, False, True, True), End(0, None, True, 0.0)
    for _ in range(3):
        assert "going on after 1 tokens" in restarts.after(end, "", lambda: False)
    with pytest.raises(LaunchError, match="4th time without a new token"):
        restarts.after(end, "", lambda: False)
    kept.write_text('{"id": null, "token_ids": [1, 2]}')
    assert "after 2 tokens" in restarts.after(end, "", lambda: False)


def test_mpichs_banner_is_no_part_of_the_text(monkeypatch, capfd):
    monkeypatch.syspath_prepend(ROOT / "launch")
    from mpirun_start import Output

    told = "text = of a model\n" + "\n" + "=" * 83 + "\n=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES\n=   PID 1\n"
    process = subprocess.Popen(["printf", "%s", told], stdout=subprocess.PIPE, bufsize=0)
    output = Output()
    output.follow(process.stdout)
    process.wait()
    output.drain()
    assert output.passed == len("text = of a model\n") and capfd.readouterr().out == told


def test_the_first_host_is_needed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    from mpirun_again import Restarts
    from mpirun_hosts import Host, LaunchError
    from mpirun_start import End

    kept = tmp_path / "text.json"
    kept.write_text('{"id": null, "token_ids": [1]}')
    restarts = Restarts([Host("board-z", 1, "board-z"), Host("localhost", 1, "localhost")], "false", kept, True, True, True)
    with pytest.raises(LaunchError, match="board-z, the host of rank 0, does not answer"):
        restarts.after(End(0, None, True, 0.0), "", lambda: False)
