"""A run that is lost, killed or asked to end in the middle of its text, under launch/halo-mpirun."""

import json
import signal
import time

import pytest

from bench.lab.processes import parent_of
from tests.launched import TEXT, Launched
from tests.mpi import EVEN, ROOT, mpi_tolerates

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(90)]


def test_a_killed_mpirun_is_started_again_and_the_text_is_the_same_to_the_byte(light, whole_light):
    run = Launched(light, *TEXT).until(20)
    code, out, err, _ = run.send(run.mpirun()).end()
    assert (code, out) == (0, whole_light), err
    assert "the job was lost" in err and "going on after" in err


def test_no_restart_means_none(light):
    run = Launched(light, *TEXT, options=("--no-restart", "-n", "2")).until(20)
    code, _, err, _ = run.send(run.mpirun()).end()
    assert code == 1 and "with --checkpoint FILE" in err and err.count("\n") == 1


def test_sigterm_ends_in_order_and_the_same_command_goes_on(light, whole_light, tmp_path):
    kept, report = tmp_path / "text.json", tmp_path / "report.json"
    options = (*TEXT, "--checkpoint", kept, "--json", report)
    run = Launched(light, *options).until(20)
    code, out, err, took = run.send(run.process.pid, signal.SIGTERM).end()
    assert code == 143 and took < 5, err
    assert whole_light.startswith(out.rstrip(b"\n")) and "Killed" not in err and "Traceback" not in err
    told = json.loads(report.read_text())
    assert told["finish_reason"] == "terminated" and told["text"].encode() + b"\n" == out
    assert len(json.loads(kept.read_text())["token_ids"]) == told["generated_tokens"] < 40
    code, out, err, _ = Launched(light, *options, program="halo_mpi.generate").end()
    assert (code, out) == (0, whole_light), err
    assert not kept.exists() and json.loads(report.read_text())["generated_tokens"] == 40


def test_sigterm_during_start_up_ends_promptly(light):
    run = Launched(light, *TEXT)
    time.sleep(0.5)  # after 1.0 s a quick computer has written some text
    code, out, err, took = run.send(run.process.pid, signal.SIGTERM).end()
    assert code == 143 and (not out or b"BAD TERMINATION" in out) and took < 7 and "Traceback" not in err, err


def test_a_killed_root_ends_the_job_and_is_not_started_again(light):
    run = Launched(light, *TEXT).until(20)
    code, _, err, took = run.send(run.rank(0)).end()
    assert code == 1 and took < 5, (took, err)
    assert "was killed" in err and "going on" not in err
    if mpi_tolerates():
        assert "rank 0 was killed" in err


@pytest.mark.slow
def test_where_all_read_at_every_token_a_lost_worker_means_another_start(deep, tmp_path):
    if not mpi_tolerates():
        pytest.skip("this MPI ends all ranks with one")
    report = tmp_path / "report.json"
    code, wanted, err, _ = Launched(deep, *TEXT, "--json", report, program="halo_mpi.generate").end()
    assert code == 0, err
    memory = max(device["weights_bytes"] for device in json.loads(report.read_text())["devices"]) * 3 // 4
    run = Launched(deep, *TEXT, "--memory", memory, "--json", report).until(20)
    code, out, err, _ = run.send(run.rank(1)).end()
    assert (code, out) == (0, wanted), err
    assert "rank 1 is gone, and nobody who is left can take its work over" in err and "a rank was missing; going on after" in err


def test_a_batch_that_is_lost_repeats_and_misses_nothing(light, tmp_path):
    lines = [{"id": number, "prompt": f"The quick {number}", "temperature": 1.0} for number in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = (*EVEN, "--prompts", tmp_path / "in.jsonl", "--max-tokens", 20, "--ignore-eos", "--seed", 3, "--out")
    run = Launched(light, *options, tmp_path / "out.jsonl", options=("-n", "2"))
    while not (tmp_path / "out.jsonl").exists() or not (tmp_path / "out.jsonl").read_text():
        time.sleep(0.02)
    time.sleep(0.3)
    code, _, err, _ = run.send(run.mpirun()).end()
    assert code == 0 and "going on after" in err, err
    code, _, err, _ = Launched(light, *options, tmp_path / "whole.jsonl", options=("-n", "2"), program="halo_mpi.generate").end()
    essence = [[(r["id"], r["token_ids"], r["finish_reason"]) for r in map(json.loads, path.read_text().splitlines())]
               for path in (tmp_path / "out.jsonl", tmp_path / "whole.jsonl")]  # fmt: skip
    assert essence[0] == essence[1] and len(essence[0]) == 3


# --- on several hosts


def test_a_host_that_goes_down_is_left_out_and_the_text_goes_on(tiny, whole, hosts):
    options, dead = hosts
    run = Launched(tiny, *TEXT, options=options).until(20)
    dead.write_text("board-a\n")
    code, out, err, _ = run.send(parent_of(run.rank(1))).end()
    assert (code, out) == (3, whole), err
    assert "do not answer: board-a;" in err and "on 2 ranks" in err


def test_a_daemon_that_is_killed_on_a_host_that_answers_costs_nothing(light, whole_light, hosts):
    run = Launched(light, *TEXT, options=hosts[0]).until(20)
    code, out, err, _ = run.send(parent_of(run.rank(2))).end()
    assert (code, out) == (0, whole_light), err
    assert "left out" not in err and "on 3 ranks" in err


def test_restarts_without_a_new_token_come_to_an_end(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    from mpirun_again import Restarts
    from mpirun_hosts import LaunchError
    from mpirun_places import Places
    from mpirun_start import End

    kept = tmp_path / "text.json"
    kept.write_text('{"id": null, "token_ids": [1]}')
    restarts, end = Restarts(Places([]), "", kept, False, True, True), End(0, None, True, 0.0)
    for _ in range(3):
        assert "going on after 1 tokens" in restarts.after(end, lambda: False)
    with pytest.raises(LaunchError, match="4th time without a new token"):
        restarts.after(end, lambda: False)
    kept.write_text('{"id": null, "token_ids": [1, 2]}')
    assert "after 2 tokens" in restarts.after(end, lambda: False)


def test_the_first_host_is_needed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    from mpirun_again import Restarts
    from mpirun_hosts import Host, LaunchError
    from mpirun_places import Places
    from mpirun_start import End

    kept = tmp_path / "text.json"
    kept.write_text('{"id": null, "token_ids": [1]}')
    places = Places([Host("board-z", 1, "board-z"), Host("localhost", 1, "localhost")])
    restarts = Restarts(places, "false", kept, True, True, True)
    with pytest.raises(LaunchError, match="board-z, the host of rank 0, does not answer"):
        restarts.after(End(0, None, True, 0.0), lambda: False)


@pytest.fixture
def restarts(tmp_path, monkeypatch):
    """What is to be done after the end of a start, by what is known of it; on this computer alone."""
    monkeypatch.syspath_prepend(ROOT / "launch")
    from mpirun_again import Restarts
    from mpirun_places import Places
    from mpirun_start import End

    known = Restarts(Places([]), "", tmp_path / "none.json", False, True, True)
    return known, lambda *end, **more: known.after(End(*end, **more), lambda: False)


def test_a_start_that_fails_for_want_of_a_rank_is_tried_three_times_more_with_more_patience(restarts):
    from mpirun_hosts import LaunchError

    known, after = restarts
    patience = []
    for _ in range(3):
        patience.append(known.most_s)
        assert after(137, None, False, 0.0, stage="mpi", hung="MPI did not start") == "MPI did not start; starting again"
    assert patience == [30, 60, 120] and known.most_s == 120
    with pytest.raises(LaunchError, match="4th time"):
        after(1, 1, False, 0.0, stage="lost")


def test_what_was_shown_is_not_shown_again_by_a_start_that_has_no_text_to_go_on_with(restarts):
    _, after = restarts
    assert after(1, 1, False, 0.0, stage="lost", shown=True) is None
    assert "starting again" in after(0, None, True, 0.0, stage="ranks")


def test_without_restarts_the_program_has_the_last_word(restarts):
    from mpirun_hosts import LaunchError

    known, after = restarts
    known.allowed = False
    assert after(1, 1, False, 0.0, stage="lost") is None
    with pytest.raises(LaunchError, match="MPI did not start in 30 s"):
        after(137, None, False, 0.0, stage="mpi", hung="MPI did not start in 30 s")


def test_an_mpirun_that_fails_itself_is_not_started_again(restarts):
    assert restarts[1](1, None, False, 0.0) is None
