"""generate --lookup in the real program: the same bytes as without, whatever ends the text."""

import json
import shutil
import sys

import pytest

from tests.launched import Launched
from tests.mpi import EVEN, finish, halo, mpi_tolerates, report_of, start_command, succeed

pytestmark = pytest.mark.mpi
PROMPT = "one two three four one two three four one two"
GREEDY = ("--prompt", PROMPT, "--max-tokens", 40, "--ignore-eos", "--wire", "f32")
WAYS = {
    "greedy": (),
    "sampled": ("--temperature", 0.8, "--top-k", 20, "--top-p", 0.9, "--repetition-penalty", 1.05, "--seed", 3),
    "one token": ("--max-tokens", 1),
    "two tokens": ("--max-tokens", 2),
}


MORE = ((1, "greedy"), (1, "sampled"), (1, "one token"), (3, "greedy"))


@pytest.mark.parametrize("ranks, way", [(1, "two tokens"), (3, "sampled"), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)])
def test_the_text_is_the_same_byte_for_byte(light, ranks, way):
    options = ("--model", light, *GREEDY, *WAYS[way])
    plain, guessed = (succeed(halo(ranks, "generate", *options, "--lookup", most)) for most in (0, 6))
    assert guessed.out == plain.out and ("tokens per pass" in guessed.err) == (way != "one token")


def test_the_report_tells_what_the_guesses_were_worth(light, tmp_path):
    plain, guessed = (report_of(3, "generate", tmp_path, "--model", light, *GREEDY, "--lookup", most) for most in (0, 6))
    lookup = guessed["lookup"]
    assert plain["lookup"] is None and guessed["token_ids"] == plain["token_ids"]
    assert 0 < lookup["accepted"] <= lookup["proposed"] and lookup["passes"] < 39
    assert lookup["tokens_per_pass"] == pytest.approx(1 + lookup["accepted"] / lookup["passes"], abs=1e-3)
    assert guessed["ledger"]["partial_sums"] == lookup["passes"] * 2 * 2 * 2  # layers, syncs of each, workers


def test_a_stop_text_cuts_where_it_would_have(light, tmp_path):
    whole = report_of(1, "generate", tmp_path, "--model", light, *GREEDY)["text"]
    for at in (9, 30):
        options = ("--model", light, *GREEDY, "--stop", whole[at : at + 3])
        plain, guessed = (report_of(1, "generate", tmp_path, *options, "--lookup", most) for most in (0, 8))
        assert guessed["text"] == plain["text"] and guessed["token_ids"] == plain["token_ids"]


@pytest.mark.parametrize("options", [(), ("--sync", "relaxed"), ("--kernel", "reference")], ids=["strict", "relaxed", "reference"])
def test_unless_told_only_strict_runs_with_compiled_kernels_guess(light, tmp_path, options):
    lookup = report_of(2, "generate", tmp_path, "--model", light, *GREEDY, *options)["lookup"]
    assert lookup is None if options else 0 < lookup["accepted"] < 40


def test_relaxed_refuses(light):
    refused = halo(2, "generate", "--model", light, *GREEDY, "--sync", "relaxed", "--lookup", 4)
    assert refused.code == 2 and len(refused.complaints) == 1 and "--sync strict only" in refused.complaints[0]


@pytest.mark.parametrize("how", [pytest.param("greedy", marks=pytest.mark.slow), "sampled"])
def test_a_text_that_was_cut_off_goes_on_as_it_would_have(tiny, tmp_path, how):
    kept, options = tmp_path / "c.json", ("--model", tiny, *GREEDY, *WAYS[how], "--lookup", 5)
    command = [sys.executable, "-m", "tests.programs.cut_off", *EVEN, *options, "--checkpoint", kept]
    assert finish(start_command(command), 60).code == 9
    assert 12 <= len(json.loads(kept.read_text())["token_ids"]) < 40
    resumed = succeed(halo(2, "generate", *options, "--checkpoint", kept))
    assert resumed.out == succeed(halo(1, "generate", *options[:-2])).out


@pytest.mark.skipif(
    shutil.which("mpirun") is not None and not mpi_tolerates(), reason="the end of a process ends the job with this MPI"
)
def test_a_worker_that_is_killed_among_guesses_changes_no_text(tiny):
    options = (*EVEN, *GREEDY)
    code, whole, err, _ = Launched(tiny, *options, program="halo_mpi.generate").end()
    assert code == 0, err
    launched = Launched(tiny, *options, "--lookup", 5).until(len(whole) // 4)
    code, out, err, _ = launched.send(launched.rank(2)).end()
    assert (code, out) == (3, whole), err
    assert "the work of rank 2" in err and "taken over" in err and "tokens per pass" in err
