"""generate --checkpoint: a text that stopped goes on as it would have, and a checkpoint never does harm."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from halo_mpi.engine.checkpoint import Checkpoint, read_checkpoint
from halo_mpi.engine.prompts import Prompt
from halo_mpi.engine.sampling import Sampler, Sampling
from halo_mpi.errors import InputError
from tests.mpi import EVEN, finish, halo, start, start_command, succeed

PROMPT = "The quick brown fox"
SAMPLING = Sampling(temperature=1.0, seed=9, stop=("never",))


def warn(message):
    raise AssertionError(message)


def written(path: Path, tokens=(4, 5, 6), text=Prompt(None, [1, 2], SAMPLING), model="m") -> Sampler:
    """A checkpoint of a text that has these tokens; its sampler."""
    sampler, checkpoint = Sampler(text.sampling), Checkpoint(path, model, 9, warn)
    checkpoint.begin(text, sampler.random_state, [], 0.0, 0.0)
    for token in tokens:
        sampler.pick(np.zeros(50, np.float32), [])
        checkpoint.token(token, sampler.random_state, 1.5, 0.25)
    return sampler


def test_what_is_written_is_read_again(tmp_path):
    sampler = written(tmp_path / "c")
    saved = read_checkpoint(tmp_path / "c")
    assert (saved.token_ids, saved.ttft_ms, saved.spent_s, saved.seed) == ([4, 5, 6], 1.5, 0.25, 9)
    assert saved.belongs(tmp_path / "c", "m", [Prompt(None, [1, 2], SAMPLING)], set())
    again = Sampler(SAMPLING)
    again.random_state = saved.random
    logits = np.zeros(50, np.float32)
    assert [again.pick(logits, []) for _ in range(20)] == [sampler.pick(logits, []) for _ in range(20)]
    assert os.listdir(tmp_path) == ["c"]
    assert read_checkpoint(tmp_path / "none") is None


def test_the_outlook_tells_what_is_to_come_of_all_texts_and_how_fast_it_comes(tmp_path):
    texts = [Prompt(number, [1], Sampling(max_tokens=10)) for number in (1, 2)]
    checkpoint = Checkpoint(tmp_path / "c", "m", 0, warn, to_come=20)

    def outlook():
        return read_checkpoint(tmp_path / "c").outlook

    checkpoint.begin(texts[0], Sampler(SAMPLING).random_state, [7, 8], 1.0, 9.0)  # which another start wrote
    assert outlook() == {"to_come": 18, "token_s": None, "first_at": None}
    began = time.time()
    for spent_s in (14.0, 14.5, 15.0):  # the first includes the prompt
        checkpoint.token(1, Sampler(SAMPLING).random_state, 1.0, spent_s)
    assert (outlook()["to_come"], outlook()["token_s"]) == (15, 0.5) and began <= (
        first_at := outlook()["first_at"]
    ) <= time.time()
    checkpoint.begin(texts[1], Sampler(SAMPLING).random_state, [], 0.0, 0.0)
    assert outlook() == {"to_come": 10, "token_s": 0.5, "first_at": first_at}


def test_every_damage_is_told_with_the_file(tmp_path):
    written(tmp_path / "c")
    content = (tmp_path / "c").read_bytes()
    flipped = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(len(content) - 1)]
    for damaged in (b"", b"notes\n", b"[]", content[:-20], *flipped):
        (tmp_path / "c").write_bytes(damaged)
        with pytest.raises(InputError, match="remove it"):
            read_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    "model, text, part",
    [
        ("other", Prompt(None, [1, 2], SAMPLING), "another model"),
        ("m", Prompt(None, [1, 3], SAMPLING), "another prompt"),
        ("m", Prompt("id", [1, 2], SAMPLING), "another prompt"),
        ("m", Prompt(None, [1, 2], Sampling(temperature=0.5, seed=9, stop=("never",))), "--temperature 1.0, not 0.5"),
    ],
)
def test_a_foreign_checkpoint_is_told(tmp_path, model, text, part):
    written(tmp_path / "c")
    with pytest.raises(InputError, match=part):
        read_checkpoint(tmp_path / "c").belongs(tmp_path / "c", model, [text], set())


def test_a_disk_that_fails_is_told_once_and_the_text_goes_on(tmp_path):
    told = []
    checkpoint = Checkpoint(tmp_path / "no folder" / "c", "m", 0, told.append)
    text = Prompt(None, [1], SAMPLING)
    sampler = Sampler(SAMPLING)
    checkpoint.begin(text, sampler.random_state, [], 0.0, 0.0)
    checkpoint.token(1, sampler.random_state, 0.0, 0.0)
    checkpoint.begin(text, sampler.random_state, [], 0.0, 0.0)
    checkpoint.remove()
    assert len(told) == 1 and "cannot be written: No such file or directory; the run goes on without it" in told[0]


# --- the program


def options(tiny, *more):
    return ("--model", tiny, "--prompt", PROMPT, "--max-tokens", 30, "--ignore-eos", "--wire", "f32", *more)


def cut(kept: Path, tiny, *more) -> None:
    """Leave a checkpoint as of a run that was killed in the middle of its text."""
    command = [sys.executable, "-m", "tests.programs.cut_off", *EVEN, *map(str, options(tiny, *more)), "--checkpoint", kept]
    assert finish(start_command(command), 60).code == 9
    assert len(json.loads(kept.read_text())["token_ids"]) == 12


@pytest.mark.mpi
@pytest.mark.parametrize("how", [pytest.param("greedy", marks=pytest.mark.slow), "sampled", pytest.param("sampled without a seed", marks=pytest.mark.slow)])
def test_a_text_goes_on_as_it_would_have(tiny, tmp_path, how):
    kept = tmp_path / "c.json"
    more = {"greedy": (), "sampled": ("--temperature", 1.2, "--seed", 7), "sampled without a seed": ("--temperature", 1.2)}[how]
    cut(kept, tiny, *more)
    seed = json.loads(kept.read_text())["seed"]
    resumed = succeed(halo(2, "generate", *options(tiny, *more), "--checkpoint", kept, "--json", tmp_path / "r.json"))
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["seed"] == seed and report["generated_tokens"] == 30 and not kept.exists()
    assert any("after 12 tokens" in event["what"] for event in report["events"])
    whole = succeed(halo(1, "generate", *options(tiny, *more[:2], "--seed", seed)))
    assert resumed.out == whole.out


@pytest.mark.mpi
def test_a_foreign_or_damaged_checkpoint_ends_the_run_in_one_line_and_stays(tiny, tmp_path):
    kept = tmp_path / "c.json"
    cut(kept, tiny)
    content = kept.read_bytes()
    refused = halo(2, "generate", *options(tiny, "--top-k", 3), "--checkpoint", kept)
    assert refused.code == 2 and len(refused.complaints) == 1 and str(kept) in refused.complaints[0], refused.err
    assert "--top-k 0, not 3" in refused.complaints[0] and kept.read_bytes() == content
    kept.write_bytes(content[:100])
    refused = halo(1, "generate", *options(tiny), "--checkpoint", kept)
    assert refused.code == 2 and f"{kept} is damaged" in refused.complaints[0]


@pytest.mark.mpi
def test_bytes_that_were_shown_are_not_shown_again(tiny, tmp_path, monkeypatch):
    whole = succeed(halo(1, "generate", *options(tiny))).out.encode()
    monkeypatch.setenv("HALO_MPI_SHOWN", "17")
    process = start(1, "-m", "halo_mpi.generate", *EVEN, *options(tiny))
    assert process.communicate(timeout=60)[0] == whole[17:]


@pytest.mark.mpi
def test_a_checkpoint_that_cannot_be_written_does_not_lose_the_text(tiny, tmp_path):
    kept = tmp_path / "missing" / "c.json"
    finished = succeed(halo(1, "generate", *options(tiny), "--checkpoint", kept, "--json", tmp_path / "r.json"))
    assert finished.err.count("goes on without it") == 1 and not finished.complaints and finished.out.strip()
    assert any("cannot be written" in event["what"] for event in json.loads((tmp_path / "r.json").read_text())["events"])
