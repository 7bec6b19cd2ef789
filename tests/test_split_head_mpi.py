"""The head over several ranks under the real mpirun."""

import json

import numpy as np
import pytest

from halo_mpi.model.kernels.choice import _lacking
from tests.launched import Launched
from tests.mpi import EVEN, ROOT, halo, mpi_tolerates, report_of, run, succeed
from tests.test_kernels_engine import stored  # noqa: F401

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(300), pytest.mark.skipif(_lacking() is not None, reason=str(_lacking()))]
TEXT = ("--prompt", "The quick", "--max-tokens", "20", "--ignore-eos", "--load-first")


def rows_of(report: dict) -> list[int]:
    return [device["head_rows"] for device in report["devices"]]


@pytest.mark.slow
def test_the_text_is_that_of_the_root_alone(stored, tmp_path):  # noqa: F811
    options = ("--model", stored("int4"), *TEXT)
    alone = report_of(4, "generate", tmp_path, *options, "--wire", "f32", "--head", "root")
    assert rows_of(alone) == [320, 0, 0, 0]
    for ranks in (1, 2, 3, 4):
        split = report_of(ranks, "generate", tmp_path, *options, "--wire", "f32", "--head", "split")
        assert split["token_ids"] == alone["token_ids"]
        assert sum(rows_of(split)) == 320 and min(rows_of(split)) >= 64
    held = [sum(device["weights_bytes"] for device in report["devices"][1:]) for report in (alone, split)]
    assert held[1] > held[0]


@pytest.mark.slow
def test_the_text_is_that_of_the_root_alone_in_f16_too(stored, tmp_path):  # noqa: F811
    ids = [
        report_of(3, "generate", tmp_path, "--model", stored("int4"), *TEXT, "--head", head)["token_ids"]
        for head in ("root", "split")
    ]
    assert ids[0] == ids[1]


@pytest.mark.slow
def test_rows_that_a_workers_memory_does_not_hold_stay_on_the_root(stored, tmp_path):  # noqa: F811
    needs = report_of(3, "generate", tmp_path, "--model", stored("int8"), *TEXT)["devices"]
    most = max(device["weights_bytes"] for device in needs[1:])
    options = ("--model", stored("int8"), *TEXT, "--head", "split")
    for memory, split in ((most, False), (10 * most + 2**22, True)):  # the smaller one is less than the root needs, too
        report = report_of(3, "generate", tmp_path, *options, "--memory", f"{memory // 1024}K")
        assert (max(rows_of(report)[1:]) > 0) == split and sum(rows_of(report)) == 320


@pytest.mark.slow
def test_perplexity_hardly_depends_on_it(stored, tmp_path):  # noqa: F811
    options = ("--model", stored("int4"), "--text", ROOT / "README.md", "--tokens", "200", "--context", "100")
    found = {}
    for head in ("root", "split"):
        path = tmp_path / f"{head}.npy"
        succeed(halo(3, "evaluate", *options, "--head", head, "--logprobs", path))
        found[head] = np.load(path)
    assert np.abs(found["root"] - found["split"]).max() < 5e-3 and not np.array_equal(found["root"], found["split"])


def test_a_worker_killed_while_it_scores_does_not_change_the_text(stored, tmp_path):  # noqa: F811
    if not mpi_tolerates():
        pytest.skip("with this MPI the end of a process ends the job")
    options = ("--model", stored("int4"), *TEXT, "--wire", "f32", "--head", "split")
    undisturbed = report_of(3, "generate", tmp_path, *options)
    report = tmp_path / "killed.json"
    model, *rest = options[1:]
    launched = Launched(model, *EVEN, *rest, "--json", report, program="tests.programs.ends_scoring")
    code, _, err, _ = launched.end(90)
    found = json.loads(report.read_text())
    assert code == 3 and "rank 2" in err, err
    assert found["token_ids"][:5] == undisturbed["token_ids"][:5] and len(found["token_ids"]) == 20
    assert found["devices"][2]["state"] == "lost" and found["devices"][2]["head_rows"] == 96


@pytest.mark.slow
def test_rows_that_the_scheduler_gives_are_scored(stored, tmp_path):  # noqa: F811
    report = tmp_path / "given.json"
    options = ("--model", stored("int4"), *TEXT, "--wire", "f32", "--json", report)
    succeed(run(3, "-m", "tests.programs.given_rows", *options, "--head", "auto"))
    found = json.loads(report.read_text())
    assert rows_of(found) == [160, 32, 128] == found["scheduler"]["head"]["rows"]
    succeed(run(3, "-m", "tests.programs.given_rows", *options))
    assert rows_of(json.loads(report.read_text())) == [320, 0, 0]
