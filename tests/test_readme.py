"""The documents keep their word: their commands run as they stand, their options exist, and what they show is what comes out.

Commands of fenced blocks have a row in CLASS; one that has none fails `test_every_command_has_a_class`. Commands within sentences are
measurements of minutes to hours, or have placeholders: those are parsed, not run. `python -m pytest tests/test_readme.py -m slow` runs
the long ones.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest
import yaml

from halo_mpi import __version__
from halo_mpi.cli import DISTRIBUTED, LOCAL
from tests.documents import DOCUMENTS, Block, blocks, is_command, read, spans, words_of
from tests.mpi import ROOT, Finished, finish, mpi_is_open_mpi, start_command, succeed

QUICK, LONG, NOT_HERE = "quick", "long", "not here"
GENERATE = 'python -m halo_mpi.generate --model models/smollm2-135m.halo --prompt'
CLASS = {  # command: (class, on what it runs here, or why it does not)
    "bash launch/quickstart.sh": (LONG, "a fresh copy of the repository"),
    "bash launch/test.sh": (NOT_HERE, "it runs this test; .ci/run is this command"),
    "export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu": (QUICK, ""),
    "source .venv/bin/activate": (QUICK, ""),
    f'mpirun -x PATH -hostfile hostfiles/pis.txt {GENERATE} "Once upon a time"': (QUICK, "a tiny model, the boards are this computer"),
    f'python -m bench.lab run bench/scenarios/loss-2.toml -- {GENERATE} "Hi" --json report.json': (LONG, "a tiny model"),
    "halo-mpi plan --shape tinyllama --devices devices.json": (QUICK, "the devices that the document names"),
    f"launch/halo-mpirun -hostfile hostfiles/pis.txt {GENERATE} \"Why is the sky blue?\"".replace("--prompt", "--chat --prompt"):
        (QUICK, "a tiny model, the boards are this computer"),
    "launch/halo-mpirun -hostfile hostfiles/pis.txt python -m halo_mpi.plan --model models/smollm2-135m.halo":
        (QUICK, "a tiny model, the boards are this computer"),
    "halo-mpi convert Model.gguf models/model.halo --dtype int4 --shards 8": (NOT_HERE, "the file is the reader's own"),
    "bash launch/setup-pis.sh hostfiles/pis.txt models/smollm2-135m.halo": (NOT_HERE, "needs boards; tests/test_pis_lab.py makes some"),
    "bash launch/setup-pis.sh hostfiles/pis.txt models/model.halo --spread": (NOT_HERE, "needs boards; tests/test_pis_lab.py makes some"),
    "launch/halo-mpirun -hostfile hostfiles/pis.txt python -m halo_mpi.doctor --model models/smollm2-135m.halo":
        (QUICK, "a tiny model, the boards are this computer"),
    "halo-mpi doctor --model models/smollm2-135m.halo": (QUICK, "a tiny model"),
    "halo-mpi doctor --hostfile hostfiles/pis.txt --model models/smollm2-135m.halo":
        (NOT_HERE, "needs boards; tests/test_doctor_hosts.py has some"),
    "halo-mpi plan --shape llama-2-7b --profile pi5 --count 4": (QUICK, ""),
    "halo-mpi plan --shape llama-2-70b --profile pi4 --sweep 8,16,64,256 --loss 0,0.02": (QUICK, ""),
    **dict.fromkeys([
        "sbatch --nodes=4 launch/slurm/generate.sbatch models/smollm2-135m.halo prompts.jsonl results.jsonl --max-tokens 200",
        "sbatch --nodes=2 --array=1-8 launch/slurm/generate.sbatch models/smollm2-135m.halo prompts.jsonl results.jsonl",
        "sbatch --nodes=4 launch/slurm/evaluate.sbatch models/smollm2-135m.halo text.txt report.json",
        "bash sweep/submit.sh"], (NOT_HERE, "needs Slurm; tests/test_slurm_lab.py starts one")),
    "qsub -v MODEL=models/smollm2-135m.halo,PROMPTS=prompts.jsonl,RESULTS=results.jsonl,WORK_S=3420 launch/pbs/generate.pbs":
        (NOT_HERE, "needs PBS; tests/test_batch.py runs the script without"),
    "python -m bench.jobs write bench/sweeps/scaling.toml sweep": (QUICK, ""),
    "python -m bench.jobs table sweep": (QUICK, "of the line before"),
    "git clone ADDRESS-OF-THIS-REPOSITORY halo_mpi": (NOT_HERE, "a placeholder"),
    "cd halo_mpi": (NOT_HERE, "the folder of the line before"),
    **dict.fromkeys(["sudo apt-get update && sudo apt-get install -y git python3-venv rsync", "getconf LONG_BIT", "timedatectl",
                     "sudo systemctl disable --now dphys-swapfile"], (NOT_HERE, "changes or asks the system of a board")),
}  # fmt: skip
OTHERS = {  # options of other programs
    "--allow-run-as-root", "--map-by", "--mca", "--now", "--requeue", "--show", "--signal", "--with-ft",
}  # fmt: skip

ALL = [block for document in DOCUMENTS for block in blocks(document)]


def of_class(wanted: str) -> list:
    """The commands of a class, each with its block."""
    chosen = [(block, command) for block in ALL for command in block.commands if CLASS.get(command, ("",))[0] == wanted]
    return [pytest.param(block, command, id=f"{block.document}:{block.line} {command[:40]}") for block, command in chosen]


@cache
def command_of(module: str) -> click.Command | None:
    """What `python -m module` runs, if it is made with click."""
    loaded = importlib.import_module(f"{module}.__main__" if hasattr(importlib.import_module(module), "__path__") else module)
    return getattr(loaded, "main", None) or getattr(loaded, module.rpartition(".")[2], None)


@cache
def options_of(module: str) -> frozenset[str]:
    """All options of `python -m module`, those of its subcommands included."""
    command = command_of(module)
    every = [command, *getattr(command, "commands", {}).values()]
    named = (parameter for one in every for parameter in getattr(one, "params", ()) if isinstance(parameter, click.Option))
    return frozenset(option for parameter in named for option in (*parameter.opts, *parameter.secondary_opts)) | {"--help"}


@cache
def launcher_options() -> frozenset[str]:
    told = ""
    for program in ("halo-mpirun", "pis.py"):
        told += subprocess.run([sys.executable, ROOT / "launch" / program, "--help"], capture_output=True, text=True, timeout=30).stdout
    return frozenset(re.findall(r"^  (--[a-z-]+)", told, re.M))


def programs_in(command: str) -> dict[str, list[str]]:
    """The project's own programs in a command, as modules, each with the words after it."""
    words, starts = words_of(command), {}
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        if before == "-m" and re.fullmatch(r"(halo_mpi|bench)\.[a-z_.]+", word):
            starts[place] = word
        elif word in (*LOCAL, *DISTRIBUTED) and before.endswith("halo-mpi"):
            starts[place] = f"halo_mpi.{word}"
    ends = [*list(starts)[1:], len(words)]
    return {module: words[place + 1 : end] for (place, module), end in zip(starts.items(), ends)}


def unknown_options(command: str) -> set[str]:
    given = {(module, word.partition("=")[0]) for module, words in programs_in(command).items() for word in words}
    return {word for module, word in given if re.match(r"--[a-z]", word) and word not in options_of(module)}


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory) -> Path:
    """The repository with a tiny model in place of the demo model, and this computer in place of the boards."""
    folder = tmp_path_factory.mktemp("repository")
    for entry in ROOT.iterdir():
        if entry.name not in ("models", "hostfiles", ".venv", ".git"):
            (folder / entry.name).symlink_to(entry)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "models").mkdir()
    (folder / "models" / "smollm2-135m.halo").symlink_to(tiny)
    shutil.copytree(ROOT / "hostfiles", folder / "hostfiles")
    (folder / "hostfiles" / "pis.txt").write_text(f"localhost slots={min(4, len(os.sched_getaffinity(0)))}\n")
    (folder / "devices.json").write_text(devices_named_in("docs/placement.md"))
    return folder


def devices_named_in(document: str) -> str:
    return next(span for span in spans(document) if span.startswith('{"devices": ['))


def run_in(folder: Path, command: str, timeout: float) -> Finished:
    """Run a command as a user would type it into a shell in this folder; Open MPI is told that root may, since tests often are root."""
    root_may = [f"{kind}_ALLOW_RUN_AS_ROOT{confirmed}=1" for kind in ("OMPI", "PRTE") for confirmed in ("", "_CONFIRM")]
    settings = [*root_may, f"PATH={sys.prefix}/bin{os.pathsep}{os.environ['PATH']}", f"PYTHONPATH={folder}"]
    return succeed(finish(start_command(["env", *settings, "bash", "-c", command], cwd=folder), timeout))


def test_every_command_has_a_class():
    commands = {command: f"{block.document}:{block.line}" for block in ALL for command in block.commands}
    assert {command: place for command, place in commands.items() if command not in CLASS} == {}, "give it a row in CLASS"
    assert set(CLASS) - set(commands) == set(), "no document has it any more: take it out of CLASS"


@pytest.mark.mpi
@pytest.mark.parametrize("block, command", of_class(QUICK))
def test_a_quick_command_runs_as_it_stands(block: Block, command: str, place):
    if command.startswith("source") and not (place / ".venv" / "bin" / "activate").exists():
        pytest.skip("Python does not run in a virtual environment here")
    if "mpirun" in command and not mpi_is_open_mpi():
        pytest.skip("the hostfile is in Open MPI's dialect")
    told = run_in(place, command, timeout=60)
    if block.output and block.commands == (command,) and block.shown[0].startswith("$ "):
        lines = [line.strip() for line in told.out.splitlines()]
        assert lines == [line.strip() for line in block.output], "the document shows something else"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_of_commands_exist(document):
    named = {command for block in blocks(document) for command in block.commands} | set(filter(is_command, spans(document)))
    named |= {f"halo-mpi {span}" for span in spans(document) if span.split()[0] in (*LOCAL, *DISTRIBUTED)}
    assert {command: unknown for command in named if (unknown := unknown_options(command))} == {}


@pytest.mark.parametrize("block, command", of_class(LONG))
def test_the_values_that_a_long_command_gives_are_taken(block: Block, command: str):
    for module, words in programs_in(command).items():
        command_of(module).make_context(module, words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_named_alone_exist(document):
    ours = set().union(launcher_options(), *(options_of(f"halo_mpi.{name}") for name in (*LOCAL, *DISTRIBUTED)), options_of("bench.lab"))
    alone = {option for span in spans(document) if not is_command(span) for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    modules = {module for span in spans(document) if "-m " in span or "halo-mpi " in span for module in programs_in(span)}
    assert alone - ours.union(OTHERS, *map(options_of, modules)) == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_modules_named_exist(document):
    for span in spans(document):
        for module in re.findall(r"-m ((?:halo_mpi|bench)\.[a-z_.]*[a-z_])", span):
            assert importlib.util.find_spec(module), module
        for path in re.findall(r"(?<![\w./])(?:bench|docs|halo_mpi|hostfiles|launch|tests)/[\w./-]*[\w-]", span):
            assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^):]+)\)", read(document)):
        assert ((ROOT / document).parent / link.partition("#")[0]).exists(), link


def test_ci_runs_the_command_of_the_readme():
    assert "bash launch/test.sh" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_citation_is_of_this_version_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["version"] == __version__
    assert {"title", "message", "authors", "license"} <= set(citation)
    assert any("2601.11676" in json.dumps(reference) for reference in citation["references"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("block, command", of_class(LONG))
def test_a_long_command_runs_as_it_stands(block: Block, command: str, place, tmp_path):
    if "bench.lab" in command and os.geteuid():
        pytest.skip("the lab needs root")
    folder = fresh_copy(tmp_path) if "quickstart" in command else place
    told = run_in(folder, command, timeout=1100)
    assert told.out.strip(), "no text"


def fresh_copy(folder: Path) -> Path:
    """What git knows of this repository, as a clone would have it."""
    known = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in filter(None, known.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder
