"""The text goes from rank 0 through halo-mpirun token by token, whole, and apart from what mpirun says."""

import os
import signal
import subprocess
import sys
import time

import pytest

from halo_mpi.engine.shown import Shown
from tests.launched import TEXT, Launched
from tests.mpi import ROOT

pytestmark = pytest.mark.timeout(60)
MESSAGE = "-" * 74 + "\nprterun noticed that process rank 1 exited on signal 9 (Killed).\n" + "-" * 74 + "\n"
PIPE = "import os, sys; pipe = os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK); os.set_blocking(pipe, True)\n"


@pytest.fixture
def passed(tmp_path, monkeypatch):
    """Lets a program, which finds the pipe's name in sys.argv, write as if mpirun had started it; the bytes to be told to the next start
    and the seconds from its end on."""
    monkeypatch.syspath_prepend(ROOT / "launch")
    from mpirun_output import SHOWN, TEXT_SHOWN, Output

    output, starts = Output(), iter(range(9))

    def run(program):
        pipe = tmp_path / f"text-{next(starts)}"
        output.open(pipe)
        process = subprocess.Popen([sys.executable, "-c", PIPE + program, pipe], stdout=subprocess.PIPE, bufsize=0)
        output.follow(process.stdout)
        process.wait()
        began = time.monotonic()
        output.drain()
        return int(output.shown[TEXT_SHOWN]), int(output.shown[SHOWN]), time.monotonic() - began

    return run


def test_nothing_is_lost_when_the_writer_ends_at_once(passed, capfd):
    assert passed("sys.stdout.write('b' * 9); sys.stdout.flush(); os.write(pipe, b'a' * 60000)")[:2] == (60000, 9)
    assert sorted(capfd.readouterr().out) == ["a"] * 60000 + ["b"] * 9


def test_a_killed_writers_bytes_are_shown_and_counted_over_all_starts(passed, capfd):
    assert passed("os.write(pipe, b'1234'); os.kill(os.getpid(), 9)")[:2] == (4, 0)
    text, other, took = passed("os.write(pipe, b'56')")
    assert (text, other) == (6, 0) and took < 0.5
    assert capfd.readouterr().out == "123456"


def test_a_program_that_knows_no_pipe_is_passed_on_as_it_is(passed, capfd):
    text, other, took = passed(f"os.close(pipe); sys.stdout.write('a\\n' + {MESSAGE!r})")
    assert (text, other) == (0, 2 + len(MESSAGE)) and took < 0.5 and capfd.readouterr().out == "a\n" + MESSAGE


def test_who_outlives_the_program_holds_up_nobody(passed, capfd):
    text, _, took = passed(
        "os.write(pipe, b'a'); os.fork() or (os.set_inheritable(pipe, True), os.execvp('sleep', ['sleep', '3']))"
    )
    assert text == 1 and took < 2 and capfd.readouterr().out == "a"


def test_messages_of_mpirun_are_kept_out_of_the_text(passed, capfd):
    assert passed(f"os.write(pipe, b'ab'); __import__('time').sleep(0.2); sys.stdout.write('c' + {MESSAGE!r})")[:2] == (2, 1)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("abc", MESSAGE)


def test_mpichs_banner_is_not_counted(passed, capfd):
    told = "text = of a model\n" + "\n" + "=" * 83 + "\n=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES\n=   PID 1\n"
    assert passed(f"os.close(pipe); sys.stdout.write({told!r})")[:2] == (0, len("text = of a model\n"))
    assert capfd.readouterr().out == told


def test_without_a_reader_the_text_goes_to_standard_output(tmp_path, monkeypatch, capfd):
    os.mkfifo(tmp_path / "nobody")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HALO_MPI_SHOWN", "2")
    monkeypatch.setenv("HALO_MPI_TEXT_SHOWN", "3")
    for name in ("nobody", "file", "missing"):
        monkeypatch.setenv("HALO_MPI_TEXT", str(tmp_path / name))
        Shown().show("abcd")
    monkeypatch.delenv("HALO_MPI_TEXT")
    Shown().show("abcd")
    assert capfd.readouterr().out == "cd" * 4
    reader = os.open(tmp_path / "nobody", os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setenv("HALO_MPI_TEXT", str(tmp_path / "nobody"))
    Shown().show("abcd")
    assert os.read(reader, 9) == b"d" and capfd.readouterr().out == ""
    os.close(reader)


@pytest.mark.mpi
def test_tokens_are_shown_one_by_one(tiny, whole):
    run, times = Launched(tiny, *TEXT, options=("-n", "2")), []
    while data := os.read(run.process.stdout.fileno(), 4096):
        times.append(time.monotonic())
        run.out += data
    code, out, err, _ = run.end()
    assert (code, out) == (0, whole), err
    assert len(times) > 25 and times[-2] - times[0] > 25 * 0.05, "of 40 tokens that take 50 ms or more each"


@pytest.mark.mpi
@pytest.mark.parametrize("how", ["closed", "killed"])
def test_a_run_that_nobody_reads_ends(tiny, how):
    run = Launched(tiny, *TEXT, "--max-tokens", 300, options=("-n", "2")).until(5)
    if how == "killed":
        run.process.kill()
        run.process.wait()
    else:
        run.process.stdout.close()
    until = time.monotonic() + 10
    while list(run.processes()) and time.monotonic() < until:
        time.sleep(0.1)
    left = list(run.processes())
    for pid, _ in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert run.process.wait(5) == (1 if how == "closed" else -signal.SIGKILL)
    assert how == "killed" or b"standard output was closed before the end" in run.process.stderr.read()
