"""Job scripts where there is no batch system: clean shell, the right command on the right hosts, and sweeps that become jobs."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.jobs import main
from tests.mpi import ROOT

LAUNCHER = """#!/bin/sh
printf '%s\\n' "$@" >"$SAID"
while [ "$1" != -hostfile ]; do shift; done
cat "$2" >"$SAID.hosts"
[ -z "$WRITES" ] || echo token >>"$WRITES"
[ -z "$SLEEP_S" ] || { trap 'kill $!; exit 143' TERM; sleep "$SLEEP_S" & wait; }
exit "${CODE:-0}"
"""
SCONTROL = """#!/bin/sh
case "$*" in
*hostnames*) printf 'a1\\na2\\n' ;;
*show*) echo "JobId=7 EndTime=${ENDS:-Unknown} Deadline=N/A" ;;
*) echo "$@" >"$SAID.requeued" ;;
esac
"""
TOOLS = {"scontrol": SCONTROL}


@pytest.fixture
def submit(tmp_path):
    """Runs a job script in a folder that has the launch scripts, with a launcher and an scontrol that only take notes."""
    launch, tools = tmp_path / "launch", tmp_path / "bin"
    shutil.copytree(ROOT / "launch", launch, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    tools.mkdir()
    for file, text in {launch / "halo-mpirun": LAUNCHER, **{tools / name: text for name, text in TOOLS.items()}}.items():
        file.write_text(text)
        file.chmod(0o755)
    (tmp_path / "nodes").write_text("b1\nb1\nb2\nb2\n")

    def run(script: str | Path, *arguments, **variables) -> tuple[int, list[str], str]:
        given = {"SAID": tmp_path / "said", "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": tmp_path, "SLURM_JOB_NODELIST": "a[1-2]",
                 "SLURM_JOB_ID": "7", "PBS_O_WORKDIR": tmp_path, "PBS_NODEFILE": tmp_path / "nodes", **variables}  # fmt: skip
        done = subprocess.run(["bash", str(ROOT / script), *map(str, arguments)], env={**os.environ, **{k: str(v) for k, v in given.items()}},
                              capture_output=True, text=True, timeout=20)  # fmt: skip
        said = tmp_path / "said"
        return done.returncode, said.read_text().splitlines() if said.exists() else [], done.stderr

    return run


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"id": number, "prompt": "x"}) + "\n" for number in range(5)))
    return file


def hosts_said(tmp_path) -> str:
    return (tmp_path / "said.hosts").read_text()


def test_a_slurm_job_runs_on_the_hosts_that_it_has(submit, prompts, tmp_path):
    code, said, err = submit("launch/slurm/generate.sbatch", "m.halo", prompts, "out.jsonl", "--seed", 1, SLURM_NTASKS_PER_NODE=2)
    assert code == 0, err
    assert hosts_said(tmp_path) == "a1 slots=2\na2 slots=2\n"
    assert " ".join(said[said.index("python") :]) == (
        f"python -m halo_mpi.generate --model m.halo --prompts {prompts} --out out.jsonl --resume --checkpoint out.jsonl.checkpoint --seed 1"
    )
    assert "--no-restart" in said


def test_a_pbs_job_runs_on_the_hosts_that_it_has(submit, prompts, tmp_path):
    code, said, err = submit("launch/pbs/generate.pbs", MODEL="m.halo", PROMPTS=prompts, RESULTS="out.jsonl", OPTIONS="--seed 1")
    assert code == 0, err
    assert hosts_said(tmp_path) == "b1 slots=2\nb2 slots=2\n" and said[-2:] == ["--seed", "1"]
    code, said, err = submit("launch/pbs/evaluate.pbs", MODEL="m.halo", TEXT="t", REPORT="r.json")
    assert code == 0 and "halo_mpi.evaluate" in said, err


def test_tasks_of_an_array_share_all_prompts(submit, prompts, tmp_path):
    seen = []
    for task in (1, 2, 3):
        code, said, err = submit("launch/pbs/generate.pbs", MODEL="m", PROMPTS=prompts, RESULTS=tmp_path / "out.jsonl", TASKS=3, PBS_ARRAY_INDEX=task)
        assert code == 0, err
        assert said[said.index("--out") + 1] == str(tmp_path / f"out-{task}-of-3.jsonl")
        seen += Path(said[said.index("--prompts") + 1]).read_text().splitlines()
    assert sorted(seen) == sorted(prompts.read_text().splitlines())
    code, _, err = submit("launch/pbs/generate.pbs", MODEL="m", PROMPTS=prompts, RESULTS=tmp_path / "out.jsonl", TASKS=9, PBS_ARRAY_INDEX=9)
    assert code == 0 and "more tasks than prompts" in err


def test_a_slurm_job_out_of_time_is_queued_again(submit, prompts, tmp_path):
    end = {"SLEEP_S": 15, "WORK_S": 0.5, "WRITES": tmp_path / "out.jsonl.checkpoint"}
    code, _, err = submit("launch/slurm/generate.sbatch", "m", prompts, "out.jsonl", **end)
    assert code == 143 and "queued again" in err
    assert (tmp_path / "said.requeued").read_text() == "requeue 7\n"


def test_a_slurm_job_minds_its_limit_and_a_task_requeues_itself_alone(submit, prompts, tmp_path):
    task = {"SLURM_JOB_ID": 15, "SLURM_ARRAY_JOB_ID": 15, "SLURM_ARRAY_TASK_ID": 3, "SLURM_ARRAY_TASK_MIN": 1, "SLURM_ARRAY_TASK_COUNT": 3}
    ends = (datetime.now() + timedelta(seconds=61.5)).isoformat(timespec="seconds")
    written = tmp_path / "out-3-of-3.jsonl"
    code, _, err = submit("launch/slurm/generate.sbatch", "m", prompts, tmp_path / "out.jsonl", ENDS=ends, SLEEP_S=15, WRITES=written, **task)
    assert code == 143 and (tmp_path / "said.requeued").read_text() == "requeue 15_3\n", err


def test_a_job_that_never_has_time_for_a_token_is_not_queued_for_ever(submit, prompts, tmp_path):
    code, _, err = submit("launch/slurm/generate.sbatch", "m", prompts, "out.jsonl", SLEEP_S=15, WORK_S=0.5)
    assert code == 1 and "not one token" in err and not (tmp_path / "said.requeued").exists()


def test_a_pbs_job_ends_before_its_time(submit, prompts, tmp_path):
    end = {"SLEEP_S": 15, "WORK_S": 0.5, "WRITES": tmp_path / "out.jsonl"}
    code, _, err = submit("launch/pbs/generate.pbs", MODEL="m", PROMPTS=prompts, RESULTS="out.jsonl", **end)
    assert code == 143 and "it goes on" in err


@pytest.mark.parametrize("code", [1, 2, 3])
def test_the_exit_code_is_the_programs(submit, prompts, tmp_path, code):
    assert submit("launch/slurm/generate.sbatch", "m", prompts, "out.jsonl", CODE=code)[0] == code
    assert not (tmp_path / "said.requeued").exists()


def test_what_is_missing_is_told(submit):
    code, said, err = submit("launch/slurm/generate.sbatch", "m.halo")
    assert code == 2 and not said and "use: sbatch" in err
    code, said, err = submit("launch/pbs/generate.pbs", PROMPTS="in")
    assert code != 0 and not said and "MODEL=" in err


def write(tmp_path, text: str):
    (tmp_path / "sweep.toml").write_text(text)
    return CliRunner().invoke(main, ["write", str(tmp_path / "sweep.toml"), str(tmp_path / "jobs")])


SWEEP = 'system = "{}"\nmodels = ["m/a.halo", "b.halo"]\nnodes = [1, 4]\nranks_per_node = [1, 2]\n[modes]\nstrict = ["--sync", "strict"]\n'


@pytest.mark.parametrize("system, nodes", [("slurm", "#SBATCH --nodes=4"), ("pbs", "#PBS -l select=4:ncpus=2:mpiprocs=2")])
def test_a_sweep_becomes_jobs_and_their_reports_a_table(submit, tmp_path, system, nodes):
    made = write(tmp_path, SWEEP.format(system))
    assert made.exit_code == 0, made.output
    jobs = sorted(path.stem for path in (tmp_path / "jobs").glob("*.job"))
    assert len(jobs) == 8 and jobs[0] == "a-strict-1x1"
    script = tmp_path / "jobs" / "a-strict-4x2.job"
    assert nodes in script.read_text()
    assert (tmp_path / "jobs" / "submit.sh").read_text().count(f"\n{'sbatch' if system == 'slurm' else 'qsub'} ") == 8
    code, said, err = submit(script)
    assert code == 0 and said[said.index("--model") + 1] == "m/a.halo" and said[-2:] == ["--sync", "strict"], err
    for name, ms in (("a-strict-1x1", 40.0), ("a-strict-4x1", 12.5)):
        report = {"ranks": int(name[-3]), "tpot_ms": {"p50": ms, "p95": ms}}
        (tmp_path / "jobs" / f"{name}.json").write_text(json.dumps(report))
    told = CliRunner().invoke(main, ["table", str(tmp_path / "jobs")]).output
    assert "3.20" in told and "80%" in told and "No report yet, or it failed: b-strict-4x2" in told


@pytest.mark.parametrize("text, part", [
    (SWEEP.format("lsf"), "system must be one of slurm, pbs"), ("nodes = [", "sweep.toml"), (SWEEP.format("slurm") + "[more]\n", "unknown: more"),
    (SWEEP.format("slurm").replace("[1, 4]", "[0]"), "nodes must be"), ('system = "pbs"\n', "missing"),
])  # fmt: skip
def test_a_wrong_sweep_is_told(tmp_path, text, part):
    refused = write(tmp_path, text)
    assert refused.exit_code == 2 and part in refused.output, refused.output
    assert not (tmp_path / "jobs").exists()


def test_the_sweep_that_comes_with_it_is_right(tmp_path):
    made = CliRunner().invoke(main, ["write", str(ROOT / "bench" / "sweeps" / "scaling.toml"), str(tmp_path)])
    assert made.exit_code == 0, made.output
    words = shlex.split((tmp_path / "smollm2-135m-relaxed-8x1.job").read_text().splitlines()[-1])
    help_text = subprocess.run([sys.executable, "-m", "halo_mpi.generate", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(word in help_text for word in words if word.startswith("--"))
