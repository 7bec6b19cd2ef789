"""What all commands have in common: help, versions, completion, and silence in a pipe."""

import os
import pty
import re
import shlex
import subprocess
import sys
from collections import defaultdict

import click
import pytest

from halo_mpi import __version__
from halo_mpi.cli import DISTRIBUTED, LOCAL, commands, is_local
from tests.mpi import ROOT, run, succeed
from tests.tiny_models import write_tiny_hf

COMMANDS = sorted((*LOCAL, *DISTRIBUTED))
ESCAPE = "\x1b["


def command_named(name: str) -> click.Command:
    return commands.get_command(click.Context(commands), name)


def help_of(name: str) -> str:
    command = command_named(name)
    return command.get_help(click.Context(command, info_name=f"halo-mpi {name}"))


def python(*arguments, **environment) -> subprocess.CompletedProcess:
    """Run Python in a pipe, with the repository to import from."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_examples_whose_options_exist(name):
    examples = [shlex.split(line) for line in command_named(name).epilog.splitlines() if line.startswith("  ")]
    assert examples
    for words in examples:
        start = next(i for i, word in enumerate(words) if word in (f"halo_mpi.{name}", name))
        command_named(name).make_context(name, words[start + 1 :])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_what_an_option_takes_and_its_default_in_brackets(name):
    options = help_of(name).partition("Options:")[2].partition("Examples:")[0]
    assert not re.search(r"PATH\b|INTEGER|FLOAT|RANGE|Default:", options.replace("-x PATH", ""))


def test_an_option_of_several_commands_takes_the_same_in_all():
    takes, context = defaultdict(dict), click.Context(commands)
    for name in COMMANDS:
        for parameter in command_named(name).params:
            if isinstance(parameter, click.Option) and not parameter.is_flag:
                for option in parameter.opts:
                    takes[option][name] = parameter.make_metavar(context)
    assert {option: by_name for option, by_name in takes.items() if len(set(by_name.values())) > 1} == {}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_verbose_and_version(name):
    options = {option for parameter in command_named(name).params for option in parameter.opts}
    assert {"--verbose", "--version"} <= options


def test_the_version_is_told_without_starting_mpi_or_loading_torch():
    program = """
import sys
from halo_mpi.cli import run_command
from halo_mpi.generate import generate
try:
    run_command(generate, ["--version"])
finally:
    from mpi4py import MPI
    assert not MPI.Is_initialized() and "torch" not in sys.modules
"""
    told = python("-c", program)
    assert told.returncode == 0, told.stderr
    first, second = told.stdout.splitlines()
    assert first.startswith(f"halo_mpi {__version__}")
    for name in ("Python 3", "MPI", "torch 2", "numba 0"):
        assert name in second


@pytest.mark.mpi
def test_of_several_ranks_one_tells_the_version():
    told = succeed(run(2, "-m", "halo_mpi.generate", "--version"))
    assert told.out.count(f"halo_mpi {__version__}") == 1


def test_questions_are_answered_without_mpi_unless_a_rank_is_asked(monkeypatch):
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
    assert is_local("generate", ["--help"]) and is_local("generate", ["--version"])
    assert not is_local("generate", ["--model", "m.halo", "--prompt", "--help"])
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert not is_local("generate", ["--help"])


def test_an_unknown_command_is_named_in_one_line():
    told = python("-m", "halo_mpi.cli", "generat")
    assert told.returncode == 2
    assert len(told.stderr.splitlines()) == 1 and "generat" in told.stderr


@pytest.mark.parametrize("words, expected", [("halo-mpi gen", {"generate"}), ("halo-mpi generate --sy", {"--sync"}),
                                             ("halo-mpi generate --sync ", {"strict", "relaxed"})])  # fmt: skip
def test_the_shell_completes_commands_options_and_values(words, expected):
    position = str(len(words.split(" ")) - 1)
    told = python("-m", "halo_mpi.cli", _HALO_MPI_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=position)
    assert {line.partition(",")[2] for line in told.stdout.splitlines()} == expected


def test_bash_takes_the_completion():
    script = f'eval "$({sys.executable} -m halo_mpi.cli completion bash)" && complete -p halo-mpi'
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert told.returncode == 0 and "_halo_mpi_completion" in told.stdout, told.stderr


def test_a_pipe_gets_neither_bars_nor_colours(tiny, tmp_path):
    write_tiny_hf(tmp_path / "source")
    told = [
        python("-m", "halo_mpi.convert", tmp_path / "source", tmp_path / "out.halo", TERM="xterm-256color"),
        python("-m", "halo_mpi.inspect", tiny, "--verify", TERM="xterm-256color"),
    ]
    for one in told:
        assert one.returncode == 0, one.stderr
        assert ESCAPE not in one.stdout + one.stderr and "\r" not in one.stdout + one.stderr
        assert len(one.stderr.splitlines()) <= 2, one.stderr


def test_no_bar_in_a_pipe_even_where_colours_are_forced(tiny):
    told = python("-m", "halo_mpi.inspect", tiny, "--verify", FORCE_COLOR="1", TERM="xterm-256color")
    assert told.stderr.splitlines() == ["all checksums of 4 files match"]


@pytest.mark.parametrize("environment, coloured", [({}, True), ({"NO_COLOR": "1"}, False)], ids=["colours", "NO_COLOR"])
def test_a_terminal_gets_a_bar(tiny, environment, coloured):
    ours, theirs = pty.openpty()
    quiet = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen([sys.executable, "-m", "halo_mpi.inspect", str(tiny), "--verify"], stdout=subprocess.DEVNULL, stderr=theirs,
                               env={**quiet, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment})  # fmt: skip
    os.close(theirs)
    seen = b""
    try:
        while data := os.read(ours, 1 << 16):
            seen += data
    except OSError:  # closed at the other end
        pass
    os.close(ours)
    assert process.wait(30) == 0
    assert "verifying" in seen.decode() and "match" in seen.decode()
    assert bool(re.search(r"\x1b\[[\d;]*3\d[;m]", seen.decode())) == coloured
