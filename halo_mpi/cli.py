"""The `halo-mpi` command: one subcommand per module, each also run as `python -m halo_mpi.NAME`."""

import importlib
import os
import sys
import traceback

import click
from click.shell_completion import get_completion_class

from halo_mpi.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, HaloError, describe
from halo_mpi.versions import version_option

LOCAL = ("convert", "inspect")  # one process
DISTRIBUTED = ("generate", "evaluate", "calibrate", "plan", "doctor")  # one process per rank, under mpirun
WITHOUT_MPI = {"plan": ("--devices", "--profile"), "doctor": ("--hostfile", "--examine")}  # options with which they are local
RANK = {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"}  # one of these is in the environment of what mpirun or srun started
COMPLETE = "_HALO_MPI_COMPLETE"  # click's own name for it


def is_local(name: str, arguments: list[str]) -> bool:
    """Whether a command needs no MPI: what one process does, planning for devices that are described, looking after the hosts of a file,
    and questions outside mpirun."""
    is_question = arguments in (["--help"], ["--version"]) and not RANK.intersection(os.environ)
    named = {argument.partition("=")[0] for argument in arguments}
    return name in LOCAL or is_question or not named.isdisjoint(WITHOUT_MPI.get(name, ()))


def run_command(command: click.Command, arguments: list[str] | None = None) -> None:
    """Run a command and exit: as one process, or on every rank that mpirun started."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if is_local(command.name, arguments):
        run_local(command, arguments)
    else:
        from halo_mpi.engine.launch import run_distributed

        run_distributed(command, arguments)


def run_local(command: click.Command, arguments: list[str] | None = None, program: str = "") -> None:
    """Run a command of one process and exit; a failure is one line on standard error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    program = program or f"halo-mpi {command.name}"
    verbose = "--verbose" in arguments
    code, message = EXIT_DONE, ""
    try:
        command.main(arguments, prog_name=program, standalone_mode=False)
    except click.exceptions.Abort:  # what click makes of Ctrl-C
        code, message = EXIT_INTERRUPTED, "interrupted"
    except click.ClickException as error:
        code, message = EXIT_USAGE, f"{' '.join(error.format_message().split())} Try `{program} --help`."
    except Exception as error:
        if verbose:
            traceback.print_exc()
        code = error.exit_code if isinstance(error, HaloError) else EXIT_FAILED
        message = describe(error, verbose)
    if message:
        click.echo(f"halo-mpi: {message}", err=True)
    sys.exit(code)


class Commands(click.Group):
    """The subcommands, each imported only when it is wanted."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted((*LOCAL, *DISTRIBUTED, *self.commands))

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in (*LOCAL, *DISTRIBUTED):
            return getattr(importlib.import_module(f"halo_mpi.{name}"), name)
        return super().get_command(context, name)

    def resolve_command(self, context: click.Context, arguments: list[str]) -> tuple:
        name = arguments[0]
        if not context.resilient_parsing and not name.startswith("-") and self.get_command(context, name) is None:
            raise click.UsageError(f"There is no command {name!r}, only {', '.join(self.list_commands(context))}.")
        return super().resolve_command(context, arguments)


EXAMPLES = """\b
Examples:
  halo-mpi convert models/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2-135m.halo
  halo-mpi generate --model models/smollm2-135m.halo --prompt "Once upon a time"
  launch/halo-mpirun -hostfile hostfiles/pis.txt python -m halo_mpi.generate --model models/smollm2-135m.halo --prompt "Hi"
  eval "$(halo-mpi completion bash)"

Exit codes: 0 done, 1 the run failed, 2 wrong use or bad input, 3 done, but devices were lost on the way, 130 after Ctrl-C, 143 ended by
SIGTERM. A failure is one line on standard error.
"""


@click.command("halo-mpi", cls=Commands, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@version_option
def commands() -> None:
    """LLaMA-family language models over MPI on a handful of small computers.

    Each COMMAND is also run as `python -m halo_mpi.COMMAND`, and tells its options with --help.
    """


@commands.command(epilog='\b\nExample, for ~/.bashrc:\n  eval "$(halo-mpi completion bash)"')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands, options and their values."""
    click.echo(get_completion_class(shell)(commands, {}, "halo-mpi", COMPLETE).source())


def main() -> None:
    """Entry point of the `halo-mpi` script: hands over to the subcommand's own module, so that only it is imported."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in (*LOCAL, *DISTRIBUTED) and COMPLETE not in os.environ:
        run_command(commands.get_command(click.Context(commands), arguments[0]), arguments[1:])
    else:
        run_local(commands, arguments or ["--help"], "halo-mpi")


if __name__ == "__main__":
    main()
