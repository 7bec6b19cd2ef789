"""A rank that ends or stops while a run starts: the others learn of it in time, and launch/halo-mpirun starts again."""

import pytest

from tests.launched import TEXT, Launched
from tests.mpi import ROOT, mpi_tolerates

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(180)]
SILENT_S = 6.0


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def tolerant():
    if not mpi_tolerates():
        pytest.skip("this MPI ends all ranks with one")


def bad_start(light, tmp_path, rank, moment, signal, *options, text=TEXT):
    bad = {"HALO_TEST_BAD": f"{rank} {moment} {signal} {tmp_path / 'once'}", "HALO_TEST_SILENT_S": str(SILENT_S)}
    return Launched(light, *text, program="tests.programs.bad_start", options=(*options, "-n", "3"), **bad).end(timeout=150)


@pytest.mark.parametrize("moment, signal", [
    ("agree", "SIGKILL"), slow("agree", "SIGSTOP"), slow("load", "SIGKILL"), slow("load", "SIGSTOP"),
    *(slow(moment, signal) for moment in ("hosts", "connect") for signal in ("SIGKILL", "SIGSTOP")),
])  # fmt: skip
def test_who_is_missing_at_the_start_is_named_and_the_run_starts_again(light, whole_light, tmp_path, moment, signal):
    code, out, err, _ = bad_start(light, tmp_path, 2, moment, signal)
    assert (code, out) == (0, whole_light), err
    if "MPI did not start in" not in err and "while MPI started" not in err:  # of which it is a part, where the root is slow
        why = "ended before the work began" if signal == "SIGKILL" else f"did not answer for {SILENT_S:.0f} s"
        assert "halo-mpi: rank 2 " in err and why in err and "a rank was missing; starting again" in err
        assert err.count("halo-mpi: ") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("moment, signal", [
    ("measure", "SIGKILL"), slow("measure", "SIGSTOP"), slow("echo", "SIGKILL"), slow("echo", "SIGSTOP"),
])  # fmt: skip
def test_the_same_while_devices_are_measured(light, tmp_path, moment, signal):
    text = ("--prompt", "The quick", "--max-tokens", "8", "--ignore-eos")
    code, out, err, _ = bad_start(light, tmp_path, 1, moment, signal, text=text)
    assert code == 0 and len(out) > 8, err
    assert "halo-mpi: rank 1 " in err and "starting again" in err and "Traceback" not in err


@pytest.mark.slow
def test_a_rank_that_ends_before_mpi_has_started_holds_nobody_up(light, whole_light, tmp_path):
    code, out, err, took = bad_start(light, tmp_path, 1, "import", "SIGKILL")
    assert (code, out) == (0, whole_light), err
    assert "while MPI started; starting again" in err or "MPI did not start in 30 s; starting again" in err


@pytest.mark.slow
def test_a_rank_that_stands_still_before_mpi_has_started_is_waited_for_only_so_long(light, whole_light, tmp_path):
    code, out, err, took = bad_start(light, tmp_path, 1, "import", "SIGSTOP")
    assert (code, out) == (0, whole_light), err
    assert "MPI did not start in 30 s; starting again" in err


def test_a_root_that_ends_at_the_start_ends_the_run(light, tmp_path):
    for moment in ("agree", "hosts"):
        (tmp_path / "once").unlink(missing_ok=True)
        code, out, err, took = bad_start(light, tmp_path, 0, moment, "SIGKILL")
        assert (code, out) == (1, b"") and took < 30, (took, err)
        assert "rank 0 ended" in err and "starting again" not in err


@pytest.mark.parametrize("command, is_one", [
    ("mpirun -n 3 python -m halo_mpi.generate --model m", True), ("mpirun halo-mpi evaluate --model m", True),
    ("mpirun python -m halo_mpi.plan --devices f", False), ("mpirun python generate.py", False),
])  # fmt: skip
def test_what_is_a_program_of_ours_is_told_by_the_command(monkeypatch, command, is_one):
    monkeypatch.syspath_prepend(ROOT / "launch")
    from mpirun_start import is_halo

    assert is_halo(command.split()) == is_one


def test_no_restart_holds_for_the_start_too(light, tmp_path):
    code, out, err, _ = bad_start(light, tmp_path, 2, "connect", "SIGKILL", "--no-restart")
    assert (code, out) == (1, b"") and err.count("\n") == 1 and "rank 2 on" in err, err


@pytest.mark.slow
def test_starts_that_always_fail_come_to_an_end(light, tmp_path):
    code, out, err, _ = bad_start(light, tmp_path / "nowhere", 2, "connect", "SIGKILL", text=TEXT)
    assert (code, out) == (1, b"") and "a rank was missing for the 4th time without a new token" in err, err
