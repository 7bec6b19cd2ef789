"""What a user of `generate` sees: text, results, seeds, reports, and how a run is interrupted."""

import hashlib
import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from tests.mpi import EVEN, finish, halo, report_of, start, start_command, succeed

pytestmark = pytest.mark.mpi
PROMPT = "The quick brown fox"


def test_the_text_goes_to_standard_output_alone(light):
    finished = succeed(halo(3, "generate", "--model", light, "--prompt", PROMPT, "--max-tokens", 12))
    assert finished.out.endswith("\n") and finished.out.strip()
    assert "generated on 3 ranks" in finished.err
    assert "ranks" not in finished.out


def test_without_mpirun_it_runs_on_one_rank(light, tmp_path):
    command = [sys.executable, "-m", "halo_mpi.generate", *EVEN, "--model", light, "--prompt", PROMPT, "--max-tokens", 5]
    assert "on 1 ranks" in succeed(finish(start_command(command), 60)).err


def test_a_seed_gives_the_same_text_again(light, tmp_path):
    options = (
        "--model",
        light,
        "--prompt",
        PROMPT,
        "--max-tokens",
        20,
        "--temperature",
        1.0,
        "--top-k",
        50,
        "--top-p",
        0.95,
        "--ignore-eos",
    )
    first, again, other = (report_of(2, "generate", tmp_path, *options, "--seed", seed) for seed in (5, 5, 6))
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]
    assert len(first["token_ids"]) == 20 and first["seed"] == 5


def test_the_report_has_the_fields_of_the_contract(light, tmp_path):
    report = report_of(3, "generate", tmp_path, "--model", light, "--prompt", PROMPT, "--max-tokens", 10, "--ignore-eos")
    assert report["schema"] == 1 and report["ranks"] == 3 and report["generated_tokens"] == 10
    assert report["token_ids_sha256"] == hashlib.sha256(np.array(report["token_ids"], "<i4").tobytes()).hexdigest()
    assert set(report["tpot_ms"]) == {"mean", "p50", "p95", "p99", "max"} and set(report["sync_ms"]) == {"p50", "p99", "max"}
    ledger = report["ledger"]
    steps, syncs, workers = 10 - 1, 2 * 2, 2
    assert ledger["partial_sums"] == steps * syncs * workers
    assert (
        ledger["partial_sums"] == ledger["on_time"] + sum(ledger["deferred"].values()) + ledger["substituted"] + ledger["waited"]
    )
    devices = report["devices"]
    assert [device["rank"] for device in devices] == [0, 1, 2]
    assert sum(device["heads"] for device in devices) == 2 * 4 and sum(device["groups"] for device in devices) == 2 * 3
    assert all(device["sent_bytes"] > 0 and device["received_bytes"] > 0 and device["rss_bytes"] > 0 for device in devices)
    assert devices[0]["sent_bytes"] == devices[1]["received_bytes"] + devices[2]["received_bytes"]


def test_a_stop_text_ends_the_text_before_it(light, tmp_path):
    whole = report_of(1, "generate", tmp_path, "--model", light, "--prompt", PROMPT, "--max-tokens", 30)["text"]
    stop = whole[5:8]
    cut = report_of(1, "generate", tmp_path, "--model", light, "--prompt", PROMPT, "--max-tokens", 30, "--stop", stop)["text"]
    assert cut == whole[: whole.index(stop)]


def write_prompts(path, count, **options):
    lines = [{"id": f"p{number}", "prompt": f"{PROMPT} {number}", **options} for number in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_resume_skips_what_is_there_and_loses_and_repeats_nothing(light, tmp_path):
    prompts, whole, part = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    write_prompts(prompts, 4, temperature=0.9, seed=3)
    options = ("--model", light, "--prompts", prompts, "--max-tokens", 8)
    succeed(halo(2, "generate", *options, "--out", whole))
    lines = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(lines[0] + lines[1] + lines[2][:30])  # cut off in the middle of a line, as a kill does
    refused = halo(1, "generate", *options, "--out", part)
    assert refused.code == 2 and "--resume" in refused.complaints[0]
    succeed(halo(2, "generate", *options, "--out", part, "--resume"))
    essence = [[(r["id"], r["text"], r["token_ids"], r["finish_reason"]) for r in map(json.loads, path.read_text().splitlines())]
               for path in (whole, part)]  # fmt: skip
    assert essence[0] == essence[1] and len(essence[0]) == 4
    assert report_of(1, "generate", tmp_path, *options, "--out", part, "--resume")["generated_tokens"] == 0


def test_a_prompt_may_have_sampling_options_of_its_own(light, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        '{"id": 1, "prompt": "The dog", "max_tokens": 3, "ignore_eos": true}\n\n'
        '{"id": 2, "prompt": "The dog", "max_tokens": 5, "ignore_eos": true}\n'
    )
    succeed(halo(1, "generate", "--model", light, "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"))
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(result["token_ids"]) for result in results] == [3, 5]
    assert set(results[0]) == {"id", "text", "token_ids", "finish_reason", "ttft_ms", "tpot_ms"}


def environment_marks(mark: str) -> list[int]:
    """Processes whose environment holds `mark`."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark.encode() in open(f"/proc/{entry}/environ", "rb").read():
                found.append(int(entry))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.parametrize("phase", ["start-up", "generating"])
def test_ctrl_c_ends_all_ranks_within_two_seconds(light, phase, monkeypatch):
    mark = f"HALO_TEST_MARK={os.getpid()}-{phase}"
    monkeypatch.setenv(*mark.split("="))
    options = ("--model", light, "--prompt", PROMPT, "--max-tokens", 100, "--ignore-eos", "--json", "/dev/null")
    process = start(3, "-m", "tests.programs.endless" if phase == "generating" else "halo_mpi.generate", *options)
    if phase == "generating":
        while b"stepping" not in process.stdout.readline():
            assert process.poll() is None
    else:
        time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    while environment_marks(mark) and time.monotonic() - begin < 10:
        time.sleep(0.05)
    took = time.monotonic() - begin
    finished = finish(process, 10)
    assert took < 2, f"{took:.1f} s, {finished.err}"
    assert finished.code != 0
    assert "Traceback" not in finished.err
