"""launch/halo-mpirun under a real mpirun: exit codes, what it passes on, and what is left after Ctrl-C."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mpi import mpi_is_open_mpi
from tests.test_halo_mpirun import HALO_MPIRUN, launch

# A program that ends as halo_mpi's do: rank 0 leaves its exit code in the file, and every rank exits with 0.
LEAVE_CODE = (
    "import os, sys; from mpi4py import MPI\n"
    "if MPI.COMM_WORLD.rank == 0: open(os.environ['HALO_MPI_EXIT_FILE'], 'w').write(sys.argv[1])"
)

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.timeout(60),
    pytest.mark.skipif(
        not Path(sys.prefix, "bin", "mpirun").exists() and shutil.which("mpirun") is None, reason="there is no mpirun"
    ),
]


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_exit_code_of_rank_0_is_passed_on_without_a_banner(code):
    told = launch("-n", 2, "python", "-c", LEAVE_CODE, code)
    assert told.returncode == code and told.stdout == "" and "non-zero" not in told.stderr


def test_exit_code_of_another_program_is_mpiruns():
    assert launch("-n", 2, "sh", "-c", "exit 7").returncode == 7
    assert launch("-n", 2, "true").returncode == 0


def test_more_ranks_than_cores_meet_in_one_world():
    program = "from mpi4py import MPI; MPI.COMM_WORLD.rank or print(MPI.COMM_WORLD.size)"
    assert launch("-n", 4, "python", "-c", program).stdout == "4\n"


def test_environment_reaches_the_ranks(tmp_path):
    program = "import os; print(os.getcwd(), os.environ['HALO_MPI_X'], os.environ['PYTHONPATH'], os.environ['OMP_NUM_THREADS'])"
    told = launch("-n", 1, "python", "-c", program, cwd=tmp_path, HALO_MPI_X="a b", PYTHONPATH="/p", OMP_NUM_THREADS="2")
    assert told.stdout == f"{tmp_path} a b /p 2\n"


def test_output_streams_while_the_program_runs():
    program = "import time; print('first', flush=True); time.sleep(20)"
    with start(program, ranks=1) as run:
        assert run.stdout.readline() == "first\n"


def test_ranks_that_never_end_do_not_hold_up_a_finished_run():
    program = (
        "import os, time; from mpi4py import MPI\n"
        "if MPI.COMM_WORLD.rank == 0: open(os.environ['HALO_MPI_EXIT_FILE'], 'w').write('3')\n"
        "time.sleep(50)"
    )
    began = time.monotonic()
    assert launch("-n", 2, "python", "-c", program).returncode == 3
    assert time.monotonic() - began < 15


def test_a_killed_run_leaves_nothing_that_a_later_one_could_stumble_over(tmp_path):
    """Open MPI 5.0.11 cannot start where a killed mpirun of the same process id has left its session's folder."""
    if not mpi_is_open_mpi():
        pytest.skip("only Open MPI has such a folder")
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(50)"
    with start(program, ranks=1, TMPDIR=str(tmp_path)) as run:
        assert run.stdout.readline() == "1\n"
        assert list(tmp_path.glob("halo-mpirun-*/ompi.*"))
    assert not list(tmp_path.glob("halo-mpirun-*")) and not list(tmp_path.glob("ompi.*"))


@contextlib.contextmanager
def start(program, ranks=2, *options, **environ):
    """A running halo-mpirun with its standard output to read; it is interrupted if it has not ended by then."""
    command = [sys.executable, HALO_MPIRUN, *options, "-n", str(ranks), "python", "-c", program]
    run = subprocess.Popen(command, env={**os.environ, **environ}, stdout=subprocess.PIPE, text=True)
    try:
        yield run
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(timeout=20)
        run.stdout.close()


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("deaf", [False, True], ids=["willing", "deaf"])
def test_interrupt_ends_everything_within_two_seconds(number, code, deaf):
    ignore = "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)];" if deaf else ""
    program = f"import os, signal, time; from mpi4py import MPI; {ignore} os.write(1, b'%d\\n' % os.getpid()); time.sleep(50)"
    with start(program) as run:
        ranks = [int(run.stdout.readline()) for _ in range(2)]
        began = time.monotonic()
        run.send_signal(number)
        assert run.wait(timeout=20) == code
        assert time.monotonic() - began < 2.0
        time.sleep(0.1)
        assert not any(is_alive(pid) for pid in ranks)


@pytest.mark.parametrize("again, code", [(False, 143), (True, 130)], ids=["once", "twice"])
def test_sigterm_waits_for_the_program_but_not_for_ever(again, code):
    program = "import signal, time; signal.signal(signal.SIGUSR1, lambda *_: print('asked', flush=True)); print(1, flush=True)\n"
    program += "while True: time.sleep(1)"
    with start(program, 1, "--grace", "1000" if again else "1") as run:
        assert run.stdout.readline() == "1\n"
        began = time.monotonic()
        run.send_signal(signal.SIGTERM)
        assert run.stdout.readline() == "asked\n"
        if again:
            run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=20) == code
        assert time.monotonic() - began < 4


def test_the_program_knows_that_nobody_sees_colours():
    """Open MPI gives rank 0 a terminal of its own, though what it prints goes into a pipe here."""
    told = launch("-n", 1, "python", "-c", "import os; print(os.environ['TERM'], os.environ['COLUMNS'])", TERM="xterm", COLUMNS="97")
    assert told.stdout.split() == ["dumb", "97"], told.stderr
