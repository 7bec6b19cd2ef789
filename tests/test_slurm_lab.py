"""The job scripts under a real Slurm: a job that runs into its time limit, or is asked to end before it, loses nothing and makes nothing twice."""

import json
import re

import pytest

from bench.lab.lab import Lab
from bench.lab.scenario import Host, Scenario
from tests.lab import leftovers
from tests.mpi import halo, succeed
from tests.slurm_lab import SlurmLab, missing_tools

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(900)]
PLACED = ("--placement", "even", "--wire", "f32", "--ignore-eos")


@pytest.fixture
def slurm(can, tmp_path):
    """Two nodes, 2 ms between any two packets' ends, so that a token takes its time."""
    can("auto", delay_ms=2.0)
    if reason := missing_tools():
        pytest.skip(reason)
    with Lab(Scenario("test", {host: Host(delay_ms=2.0) for host in ("pi1", "pi2")})) as lab:
        with SlurmLab(lab, tmp_path / "slurm") as started:
            yield started
        marks = lab.marks
    assert leftovers(marks) == []


def prompts(folder, count: int):
    file = folder / "in.jsonl"
    file.write_text("".join(json.dumps({"id": number, "prompt": f"The quick {number}"}) + "\n" for number in range(count)))
    return file


def texts(*files) -> dict:
    """By id; each at most once."""
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    found = {line["id"]: line["text"] for line in lines}
    assert len(found) == len(lines), "made twice"
    return found


def undisturbed(light, file, folder, tokens: int) -> dict:
    out = folder / "whole.jsonl"
    succeed(halo(2, "generate", "--model", light, "--prompts", file, "--out", out, "--max-tokens", tokens, *PLACED, timeout=300))
    return texts(out)


def test_a_job_that_is_cut_off_and_then_runs_out_of_time_goes_on_where_it_was(slurm, light, tmp_path):
    file, out, log = prompts(tmp_path, 60), tmp_path / "out.jsonl", tmp_path / "job.log"
    job = ("--nodes=2", "--output", log, "launch/slurm/generate.sbatch", light, file, out, "--max-tokens", 120, *PLACED)
    cut_off = slurm.submit("--time=1", "--export=ALL,BEFORE_END=-600", *job)  # it does not mind its limit
    assert slurm.end_of(cut_off, 200) == "TIMEOUT"
    first = texts(out)
    assert 0 < len(first) < 60, "it was done before its time was over"
    print(f"{len(first)} of 60 texts are there")
    told = slurm.submit("--time=2", "--export=ALL,BEFORE_END=80", *job)
    assert slurm.end_of(told, 500) == "COMPLETED", log.read_text()
    print(f"{len(texts(out))} of 60 texts are there; the jobs' output:\n{log.read_text()}")
    assert "out of time; queued again" in log.read_text() and re.search(r"Restarts=[1-9]", slurm.run("scontrol", "-o", "show", "job", told))
    assert texts(out) == undisturbed(light, file, tmp_path, 120) and texts(out).items() >= first.items()
    assert not out.with_name("out.jsonl.checkpoint").exists()


def test_tasks_of_an_array_share_the_prompts(slurm, light, tmp_path):
    file, out, log = prompts(tmp_path, 7), tmp_path / "out.jsonl", tmp_path / "job-%a.log"
    options = ("--array=3-5", "--nodes=1", "--output", log)
    job = slurm.submit(*options, "launch/slurm/generate.sbatch", light, file, out, "--max-tokens", 8, *PLACED)
    for task in (3, 4, 5):
        assert slurm.end_of(f"{job}_{task}", 100) == "COMPLETED", (tmp_path / f"job-{task}.log").read_text()
    parts = [tmp_path / f"out-{task}-of-3.jsonl" for task in (1, 2, 3)]
    assert [len(texts(part)) for part in parts] == [3, 2, 2]
    assert texts(*parts).keys() == set(range(7))


def test_an_evaluation_and_a_job_that_fails(slurm, light, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 4)
    words = ("--nodes=2", "--output", tmp_path / "job.log", "launch/slurm/evaluate.sbatch", light)
    job = slurm.submit(*words, tmp_path / "text.txt", tmp_path / "report.json", "--context", 64)
    assert slurm.end_of(job, 100) == "COMPLETED", (tmp_path / "job.log").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["perplexity"] > 1
    job = slurm.submit(*words, tmp_path / "missing.txt", tmp_path / "report.json")
    assert slurm.end_of(job, 100) == "FAILED" and "missing.txt" in (tmp_path / "job.log").read_text()
