"""The `halo-mpi` command: one subcommand per module, each also run as `python -m halo_mpi.NAME`."""

import importlib
import sys
import traceback

import click

from halo_mpi import __version__
from halo_mpi.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, HaloError, describe

LOCAL = ("convert", "inspect")  # one process
DISTRIBUTED = ("generate", "evaluate", "calibrate", "plan")  # one process per rank, under mpirun


def is_local(name: str, arguments: list[str]) -> bool:
    """Whether a command runs as one process; to plan for a file of devices, or for a profile, is one that needs no MPI."""
    described = {argument.partition("=")[0] for argument in arguments} & {"--devices", "--profile"}
    return name in LOCAL or name == "plan" and bool(described)


def run_local(command: click.Command, arguments: list[str] | None = None) -> None:
    """Run a command of one process and exit; a failure is one line on standard error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verbose = "--verbose" in arguments
    code, message = EXIT_DONE, ""
    try:
        command.main(arguments, prog_name=f"halo-mpi {command.name}", standalone_mode=False)
    except click.exceptions.Abort:  # what click makes of Ctrl-C
        code, message = EXIT_INTERRUPTED, "interrupted"
    except click.ClickException as error:
        code, message = EXIT_USAGE, f"{' '.join(error.format_message().split())} Try `halo-mpi {command.name} --help`."
    except Exception as error:
        if verbose:
            traceback.print_exc()
        code = error.exit_code if isinstance(error, HaloError) else EXIT_FAILED
        message = describe(error, verbose)
    if message:
        click.echo(f"halo-mpi: {message}", err=True)
    sys.exit(code)


def main() -> None:
    """Entry point of the `halo-mpi` script: hands over to the subcommand's own module, so that only it is imported."""
    names = (*LOCAL, *DISTRIBUTED)
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        click.echo(
            f"Usage: halo-mpi COMMAND [OPTIONS]\n\nCommands: {', '.join(sorted(names))}. `halo-mpi COMMAND --help` tells more."
        )
        sys.exit(EXIT_DONE)
    if arguments[0] == "--version":
        click.echo(f"halo_mpi {__version__}")
        sys.exit(EXIT_DONE)
    if arguments[0] not in names:
        click.echo(f"halo-mpi: no command {arguments[0]!r}; there are {', '.join(sorted(names))}", err=True)
        sys.exit(EXIT_USAGE)
    command = getattr(importlib.import_module(f"halo_mpi.{arguments[0]}"), arguments[0])
    if is_local(arguments[0], arguments):
        run_local(command, arguments[1:])
    else:
        from halo_mpi.engine.launch import run_distributed

        run_distributed(command, arguments[1:])


if __name__ == "__main__":
    main()
