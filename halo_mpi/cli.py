"""The `halo-mpi` command: one subcommand per module, each also run as `python -m halo_mpi.NAME`."""

import importlib
import sys
import traceback

import click

from halo_mpi import __version__
from halo_mpi.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, HaloError

LOCAL = ("convert", "inspect")  # one process
DISTRIBUTED = ("generate", "evaluate")  # one process per rank, under mpirun


def run_click(command: click.Command, arguments: list[str] | None = None) -> tuple[int, str]:
    """Run a command; returns its exit code and, if it failed, the one line that says why."""
    verbose = "--verbose" in (sys.argv[1:] if arguments is None else arguments)
    try:
        code = command.main(arguments, prog_name=f"halo-mpi {command.name}", standalone_mode=False)
        return code if isinstance(code, int) else EXIT_DONE, ""
    except click.exceptions.NoArgsIsHelpError as error:
        return EXIT_USAGE, error.format_message()
    except click.ClickException as error:
        return EXIT_USAGE, f"{error.format_message()} Try `halo-mpi {command.name} --help`."
    except HaloError as error:
        if verbose:
            traceback.print_exc()
        return error.exit_code, str(error)
    except (KeyboardInterrupt, click.exceptions.Abort):
        return EXIT_INTERRUPTED, "interrupted"
    except Exception as error:
        if verbose:
            traceback.print_exc()
        hint = "" if verbose else "; run again with --verbose for the traceback and report it"
        return EXIT_FAILED, f"unexpected {type(error).__name__}: {' '.join(str(error).split())}{hint}"


def run_local(command: click.Command, arguments: list[str] | None = None) -> None:
    """Run a command of one process and exit."""
    code, message = run_click(command, arguments)
    if message:
        click.echo(f"halo-mpi: {message}", err=True)
    sys.exit(code)


def main() -> None:
    """Entry point of the `halo-mpi` script: hands over to the subcommand's own module, so that only it is imported."""
    names = (*LOCAL, *DISTRIBUTED)
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        click.echo(f"Usage: halo-mpi COMMAND [OPTIONS]\n\nCommands: {', '.join(sorted(names))}. `halo-mpi COMMAND --help` tells more.")
        sys.exit(EXIT_DONE)
    if arguments[0] == "--version":
        click.echo(f"halo_mpi {__version__}")
        sys.exit(EXIT_DONE)
    if arguments[0] not in names:
        click.echo(f"halo-mpi: no command {arguments[0]!r}; there are {', '.join(sorted(names))}", err=True)
        sys.exit(EXIT_USAGE)
    command = getattr(importlib.import_module(f"halo_mpi.{arguments[0]}"), arguments[0])
    if arguments[0] in LOCAL:
        run_local(command, arguments[1:])
    else:
        from halo_mpi.engine.session import run_distributed

        run_distributed(command, arguments[1:])


if __name__ == "__main__":
    main()
