"""Every failure is one clear line, the right exit code and the end of all ranks."""

import json
import shutil
import sys

import numpy as np
import pytest

from tests.conftest import converted
from tests.mpi import EVEN, ROOT, Finished, finish, halo, mpirun_options, run, start_command
from tests.tiny_models import write_tiny_hf

pytestmark = pytest.mark.mpi
PROMPT = ("--prompt", "The quick brown fox")


def fails(finished: Finished, code: int, *parts: str) -> None:
    """The run ended with this exit code and exactly one line of ours, which has these parts; no traceback."""
    assert finished.code == code, finished.err
    assert len(finished.complaints) == 1, finished.err
    assert "Traceback" not in finished.err
    for part in parts:
        assert part in finished.complaints[0]


WRONG_USE = {
    "no model": (["--model", "nowhere.halo", *PROMPT], "nowhere.halo does not exist"),
    "not a model": (["--model", "tests", *PROMPT], "model.h5"),
    "unknown option": (["--model", "M", *PROMPT, "--speed", "9"], "--speed"),
    "not a number": (["--model", "M", *PROMPT, "--max-tokens", "many"], "--max-tokens"),
    "temperature": (["--model", "M", *PROMPT, "--temperature", "-1"], "--temperature -1.0: must be 0 or more"),
    "top-p": (["--model", "M", *PROMPT, "--top-p", "0"], "--top-p"),
    "wire": (["--model", "M", *PROMPT, "--wire", "f64"], "--wire"),
    "two prompts": (["--model", "M", *PROMPT, "--prompt-file", "README.md"], "exactly one"),
    "no prompt": (["--model", "M"], "exactly one"),
    "empty prompt": (["--model", "M", "--prompt", ""], "the prompt is empty"),
    "prompt too long": (["--model", "M", "--prompt", "fox " * 600], "context is 512"),
    "text too long": (["--model", "M", *PROMPT, "--max-tokens", "1000"], "--max-tokens"),
    "missing prompt file": (["--model", "M", "--prompt-file", "nowhere.txt"], "nowhere.txt"),
    "placement": (["--model", "M", *PROMPT, "--placement", "nowhere.json"], "nowhere.json"),
    "memory size": (["--model", "M", *PROMPT, "--memory", "much"], "'much' is not a size"),
    "memory": (["--model", "M", *PROMPT, "--memory", "10K"], "rank 0 on"),
}


@pytest.mark.parametrize("case", WRONG_USE)
def test_wrong_use_on_one_rank(light, case):
    options, part = WRONG_USE[case]
    command = [sys.executable, "-m", "halo_mpi.generate", *(str(light) if option == "M" else option for option in options)]
    fails(finish(start_command(command), 60), 2, part)


MORE = [pytest.param(case, marks=pytest.mark.slow) for case in ("no model", "temperature", "empty prompt")]


@pytest.mark.parametrize("case", ["unknown option", "memory", *MORE])
def test_wrong_use_is_told_once_by_three_ranks(light, case):
    options, part = WRONG_USE[case]
    fails(halo(3, "generate", *(light if option == "M" else option for option in options)), 2, part)


def test_a_prompt_file_that_is_not_utf_8_is_named_with_the_place(light, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("Grüße".encode("latin-1"))
    fails(
        halo(2, "generate", "--model", light, "--prompt-file", tmp_path / "latin1.txt"), 2, "latin1.txt is not UTF-8", "offset 2"
    )


@pytest.mark.parametrize(
    "line, part",
    [
        ("{", "line 2: not JSON"),
        ('{"id": 1}', "line 2: expected an object"),
        ('{"id": 0, "prompt": "x"}', "line 2: the id 0 is used twice"),
        ('{"id": 1, "prompt": "x", "temprature": 1}', "line 2: unknown option 'temprature'"),
        ('{"id": 1, "prompt": "x", "temperature": "hot"}', "line 2: temperature must be of type float"),
        ('{"id": 1, "prompt": "x", "top_p": 7}', "line 2: --top-p 7: must be above 0"),
        ('{"id": 1, "prompt": ""}', "line 2: the prompt with id 1 is empty"),
    ],
)
def test_a_wrong_line_of_prompts_is_named(light, tmp_path, line, part):
    from halo_mpi.engine.prompts import read_prompts
    from halo_mpi.engine.sampling import Sampling
    from halo_mpi.errors import InputError
    from halo_mpi.model.tokenizer import Tokenizer, TokenizerFiles
    from halo_mpi.store.reader import ModelStore

    (tmp_path / "in.jsonl").write_text(f'{{"id": 0, "prompt": "x"}}\n{line}\n')
    tokenizer = Tokenizer(TokenizerFiles.from_dict(ModelStore(light).meta["tokenizer"]))
    with pytest.raises(InputError) as failure:
        read_prompts(tmp_path / "in.jsonl", tokenizer, Sampling(), chat=False)
    assert part in str(failure.value)


def several(*programs: list) -> Finished:
    """One job of one rank for each command line."""
    command = ["mpirun", *mpirun_options()]
    for number, program in enumerate(programs):
        command += ([":"] if number else []) + ["-n", "1", sys.executable, *program]
    return finish(start_command(command), 60)


def test_model_folders_that_differ_between_ranks_are_told(light, tmp_path):
    write_tiny_hf(tmp_path / "source", seed=1)
    other = converted(tmp_path / "source", tmp_path / "other.halo", "f32")
    fails(
        several(*(["-m", "halo_mpi.generate", "--model", model, *PROMPT] for model in (light, other))),
        2,
        "model in",
        "differs",
        "rank 1",
    )


def test_a_model_that_only_one_rank_lacks_is_told_with_the_rank(light):
    fails(
        several(*(["-m", "halo_mpi.generate", "--model", model, *PROMPT] for model in (light, "gone.halo"))),
        2,
        "rank 1 on",
        "gone.halo",
    )


def test_ranks_of_different_versions_do_not_work_together(light):
    options = ["--model", light, *PROMPT]
    finished = several(["-m", "halo_mpi.generate", *options], ["-m", "tests.programs.other_version", *options])
    fails(finished, 2, "halo_mpi version differs", "0.0.9", "rank 1")


def test_a_damaged_record_is_told_with_file_layer_and_group(light, tmp_path):
    from halo_mpi.store.reader import RecordFile

    model = tmp_path / "damaged.halo"
    shutil.copytree(light, model)
    shard = model / "shard-01.h5"
    offset = int(RecordFile(shard).tables["ffn"].offsets[1, 0])
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(b"\x01\x02\x03")
    fails(halo(2, "generate", "--model", model, *PROMPT), 2, "shard-01.h5 is damaged at layer 1, ffn 1")


def test_a_truncated_shard_is_told(light, tmp_path):
    model = tmp_path / "truncated.halo"
    shutil.copytree(light, model)
    content = (model / "shard-02.h5").read_bytes()
    (model / "shard-02.h5").write_bytes(content[: len(content) // 3])
    fails(halo(1, "generate", "--model", model, *PROMPT), 2, "shard-02.h5")


def test_a_shard_that_nobody_has_is_told(light, tmp_path):
    model = tmp_path / "partial.halo"
    shutil.copytree(light, model)
    (model / "shard-01.h5").unlink()
    fails(halo(2, "generate", "--model", model, *PROMPT), 2, "no host has the shard with")


def test_ranks_with_different_shards_share_the_work_by_what_they_have(light, tmp_path):
    """Each of three hosts holds one shard of three: nothing is missing, nobody reads what it lacks."""
    models = []
    for rank in range(3):
        model = tmp_path / f"rank{rank}.halo"
        shutil.copytree(
            light, model, ignore=shutil.ignore_patterns(*(f"shard-0{shard}.h5" for shard in range(3) if shard != rank))
        )
        models.append(model)
    finished = several(*(["-m", "halo_mpi.generate", "--model", model, *PROMPT, "--max-tokens", "8"] for model in models))
    assert finished.code == 0, finished.err
    assert finished.out == halo(1, "generate", "--model", light, *PROMPT, "--max-tokens", "8").out


@pytest.mark.parametrize("rank", [2, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (0, 1))])
def test_an_unexpected_exception_on_any_rank_ends_the_job_and_names_the_rank(light, rank):
    finished = run(3, "-m", "tests.programs.broken_rank", *EVEN, "--model", light, "--kernel", "reference", *PROMPT, "--seed", rank)
    assert finished.code != 0
    assert (
        len(finished.complaints) == 1
        and f"rank {rank} on" in finished.complaints[0]
        and "ZeroDivisionError" in finished.complaints[0]
    )
    assert "Traceback" not in finished.err


def test_the_report_of_a_failed_run_is_not_written(light, tmp_path):
    halo(1, "generate", "--model", light, *PROMPT, "--max-tokens", 1000, "--json", tmp_path / "report.json")
    assert not (tmp_path / "report.json").exists()


def test_a_report_that_cannot_be_written_is_told(light, tmp_path):
    fails(halo(1, "generate", "--model", light, *PROMPT, "--json", tmp_path / "missing" / "report.json"), 1, "report.json")


def test_the_placement_file_is_checked(light, tmp_path):
    for content, part in (
        (json.dumps({"heads": [4, 0]}), "form"),
        (json.dumps({"heads": [3, 2], "groups": [3, 0]}), "add up to the model's 4"),
    ):
        (tmp_path / "placement.json").write_text(content)
        fails(halo(2, "generate", "--model", light, *PROMPT, "--placement", tmp_path / "placement.json"), 2, part)


def test_halo_mpirun_returns_the_exit_code_and_adds_nothing(light):
    command = [ROOT / "launch" / "halo-mpirun", "-n", 3, sys.executable, "-m", "halo_mpi.generate", "--model", light]
    finished = finish(start_command([*command, "--prompt", ""]), 60)
    fails(finished, 2, "the prompt is empty")
    assert len(finished.err.strip().splitlines()) == 1
    finished = finish(start_command([*command, *PROMPT, "--max-tokens", 3]), 60)
    assert finished.code == 0, finished.err


def test_the_halo_mpi_script_reaches_the_distributed_commands(light):
    command = [sys.executable, "-m", "halo_mpi.cli", "generate", "--model", light, *PROMPT, "--max-tokens", 3]
    finished = finish(start_command(command), 60)
    assert finished.code == 0 and finished.out.strip(), finished.err


def test_a_value_too_large_for_f16_is_told(light):
    from halo_mpi.errors import HaloError
    from halo_mpi.wire.messages import Kind, Message

    with pytest.raises(HaloError, match="layer 4 .ffn..*--wire f32"):
        Message(1, 8).write(1, Kind.FFN, 4, 0, np.full((1, 8), 1e6, np.float32), "f16")


def test_verbose_shows_where_it_failed(light):
    finished = halo(2, "generate", "--model", "nowhere.halo", *PROMPT, "--verbose")
    assert finished.code == 2 and "Traceback" in finished.err and len(finished.complaints) == 1


@pytest.mark.parametrize("content", ["notes without an end of line", "notes\n", '{"id": 1}\n'])
def test_resume_never_touches_a_file_that_holds_no_results(light, tmp_path, content):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "x"}\n')
    (tmp_path / "notes").write_text(content)
    options = ("--model", light, "--prompts", tmp_path / "in.jsonl", "--resume")
    fails(halo(1, "generate", *options, "--out", tmp_path / "notes"), 2, "notes")
    assert (tmp_path / "notes").read_text() == content


def test_results_never_go_into_the_file_of_the_prompts(light, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "x"}')
    options = ("--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "in.jsonl", "--resume")
    fails(halo(1, "generate", "--model", light, *options), 2, "is the file of the prompts")
    assert (tmp_path / "in.jsonl").read_text() == '{"id": 1, "prompt": "x"}'
