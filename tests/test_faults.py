"""Faults in the real program, in the laboratory: the rows of bench/faults.py one by one (slow), and a few random schedules."""

import pytest

from bench.fault_runs import DONE, FAILED, LOST, TERMINATED, Setting, complaints, expected_codes, text_of
from bench.fault_schedules import run_schedule, schedule, undisturbed_run
from bench.faults import FAULTS, MOMENTS, Cases, cells

TINY_PACE_MS = 20.0  # four syncs: a token takes 80 ms, as SmolLM2's does
SEEDS = (1, 21)  # a kill; a rank that stands still


def entry(t_s: float, action: str, host: str = "pi3") -> dict:
    return {"t_s": t_s, "host": host, "action": action}


@pytest.mark.parametrize("log, codes", [
    ([], {DONE}),
    ([entry(1, "kill")], {LOST}),
    ([entry(9.5, "kill")], {DONE, LOST}),
    ([entry(1, "link-down"), entry(3, "link-up")], {DONE}),
    ([entry(1, "link-down"), entry(9, "link-up")], {DONE, LOST}),
    ([entry(1, "black-hole")], {LOST}),
    ([entry(1, "stop"), entry(1.2, "continue")], {DONE}),
    ([entry(1, "kill"), entry(2, "kill-daemon", "pi2")], {DONE, LOST}),
    ([entry(1, "stop"), entry(3, "continue"), entry(2, "nan", "pi4")], {LOST}),
    ([entry(1, "kill") | {"failed": "there is no rank"}], {DONE}),
    ([entry(1, "kill", "pi1")], {DONE, FAILED, LOST}),
    ([entry(1, "kill"), entry(2, "terminate", "pi1")], {TERMINATED}),
])  # fmt: skip
def test_the_right_exit_code_follows_from_what_was_done(log, codes):
    assert expected_codes(log, 10.0) == codes


def ended(code: int, text: str, ids=None, said=None, orphans=()) -> dict:
    report = ids and {"token_ids": ids, "generated_tokens": len(ids)}
    return {"exit_code": code, "text": text, "report": report, "said": said, "error": None, "lab": {"orphans": list(orphans)}}


RIGHT = ended(0, "a b c\n", [1, 2, 3])


@pytest.mark.parametrize("run, codes, wrong", [
    (RIGHT, {DONE}, []),
    (RIGHT, {LOST}, ["exit code 0 instead of 3"]),
    (ended(3, "a b d\n", [1, 2, 4]), {LOST}, ["text: differs from token 3 on"]),
    (ended(3, "a b a b c\n", [1, 2, 3]), {LOST}, ["text: same ids, shown otherwise"]),
    (ended(0, "a b"), {DONE}, ["text: beginning"]),
    (ended(1, "a b", said="halo-mpi: rank 0 is gone"), {FAILED}, []),
    (ended(1, "a b"), {FAILED}, ["it failed without a word"]),
    (ended(143, "a x"), {TERMINATED}, ["text: differs"]),
    (ended(0, "a b c\n", [1, 2, 3], orphans=["python"]), {DONE}, ["1 processes left"]),
    (ended(124, "") | {"error": "not done"}, {DONE}, ["not done"]),
])  # fmt: skip
def test_what_is_wrong_about_an_end_is_told(run, codes, wrong):
    assert complaints(run, RIGHT, codes) == wrong


def test_a_run_without_a_report_is_judged_by_what_it_wrote():
    texts = ("a b c", "a ", "", "x")
    assert [text_of(ended(1, text), RIGHT) for text in texts] == ["same", "beginning", "none", "differs"]


def test_a_schedule_follows_from_its_seed():
    assert schedule(7, 5.0) == schedule(7, 5.0) != schedule(8, 5.0)
    events = [event for seed in range(200) for event in schedule(seed, 5.0)]
    assert len({event["action"] for event in events}) == 11 and all(event.get("at_s", 0) <= 4.5 for event in events)


@pytest.fixture(scope="module")
def undisturbed(can, small):
    can("kernel")
    setting = Setting(small, 32, TINY_PACE_MS)
    return setting, undisturbed_run(setting)


@pytest.mark.lab
@pytest.mark.parametrize("seed", [SEEDS[0], pytest.param(SEEDS[1], marks=pytest.mark.slow)])
def test_random_faults_change_no_text_hang_nothing_and_leave_nobody(undisturbed, seed):
    setting, run = undisturbed
    found = run_schedule(setting, seed, run)
    assert found["status"] == "ok", (found["error"], found["lab"] and found["lab"]["events"], found["said"])


@pytest.fixture(scope="module")
def cases(can, small):
    can("kernel")
    return Cases(Setting(small, 100, TINY_PACE_MS))


@pytest.mark.slow
@pytest.mark.lab
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cell", cells(tuple(FAULTS), MOMENTS), ids=lambda cell: f"{cell['fault']}-{cell['when']}")
def test_each_fault_ends_as_it_should(cases, cell):
    found = cases.run(cell)
    assert found["status"] == "ok", (found["error"], found["said"])
