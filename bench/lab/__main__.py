"""python -m bench.lab up SCENARIO.toml | run SCENARIO.toml [--seed S] -- COMMAND ... | down [LAB ...]"""

from __future__ import annotations

import shlex
import sys
import time

import click

from bench.lab.lab import BACKENDS, Lab, existing_labs, is_owned, take_down
from bench.lab.launch import LAUNCHERS, require_open_mpi_5
from bench.lab.record import record, record_path, write
from bench.lab.run import Interruption, Run, marks_progress
from bench.lab.scenario import load_scenario
from bench.lab.system import LabError, require_root_and_tools

EXIT_FAILED, EXIT_USAGE = 1, 2


def scenario_options(function):
    """What `up` and `run` share."""
    for decorate in (
        click.option("--hosts", type=click.IntRange(1), help="Number of hosts instead of the scenario's."),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the relay's random numbers."),
        click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True,
                     help="Who makes the links: the kernel (nft, tbf, netem), or the relay (seeded)."),
        click.argument("scenario", type=click.Path()),
    ):  # fmt: skip
        function = decorate(function)
    return function


@click.group()
def main() -> None:
    """A lossy network of small computers, one network namespace each, on this machine (root)."""


@main.command()
@scenario_options
def up(scenario: str, hosts: int | None, seed: int, backend: str) -> None:
    """Bring the network up, its losses on, and leave it until `down`."""
    lab = Lab(load_scenario(scenario, hosts), backend, seed)
    with Interruption() as interruption:
        lab.__enter__()
        try:
            lab.conditions.lossy = True
            lab.apply()
            if interruption.number:
                sys.exit(128 + interruption.number)
            lab.disown()
        except BaseException:
            lab.__exit__()
            raise
    click.echo(f"{lab.names.lab}: {', '.join(lab.scenario.hosts)} on {lab.names.network}, links by {lab.links.name}")
    click.echo(f"a command on pi1: {lab.agent} pi1 'ping -c 3 {lab.names.address('pi1')}'")
    click.echo(f"end it with: python -m bench.lab down {lab.names.lab}")


@main.command()
@click.argument("labs", nargs=-1)
def down(labs: tuple[str, ...]) -> None:
    """Take labs down: those named, else all that no running `run` owns."""
    require_root_and_tools()
    for lab in labs:
        if lab not in existing_labs():
            raise LabError(f"there is no lab {lab}; there are: {', '.join(existing_labs()) or 'none'}")
    for lab in labs or [lab for lab in existing_labs() if not is_owned(lab)]:
        take_down(lab)
        click.echo(f"{lab} is down")


@main.command()
@scenario_options
@click.option("--keep", is_flag=True, help="Leave the network up afterwards, for `down`.")
@click.option("--record", "record_file", help="Where to write what happened; default: beside COMMAND's --json file.")
@click.option("--marks/--no-marks", "marked", default=None,
              help="Whether COMMAND marks its progress [default: if it is halo_mpi].")  # fmt: skip
@click.option("--launcher", type=click.Choice(LAUNCHERS), default="mpirun", show_default=True,
              help="Who starts COMMAND: mpirun, or launch/halo-mpirun, whose exit code counts then.")  # fmt: skip
@click.option("--ft/--no-ft", default=True, show_default=True,
              help="mpirun: a rank that dies does not end the others.")  # fmt: skip
@click.option("--mpirun-options", default="", help="More options for mpirun, in one word.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0), help="End the run after so many seconds (exit code 124).")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(scenario, hosts, seed, backend, keep, record_file, marked, launcher, ft, mpirun_options, timeout_s, command) -> None:
    """Run COMMAND under mpirun or halo-mpirun, one rank per host, and return its exit code."""
    command = list(command)
    lab = Lab(load_scenario(scenario, hosts), backend, seed)
    require_root_and_tools()
    require_open_mpi_5()
    with Interruption() as interruption:
        lab.__enter__()
        try:
            started = time.monotonic()
            marked = marks_progress(command) if marked is None else marked
            running = Run(lab, command, marked, shlex.split(mpirun_options), launcher, ft)
            code = running.follow(interruption, timeout_s)
            for remark in running.remarks(code):
                click.echo(f"lab: {remark}", err=True)
            path = record_path(command, record_file)
            if path:
                write(path, record(lab, running, code, time.monotonic() - started))
            running.close()
        finally:
            if keep:
                lab.disown()
                click.echo(f"lab: kept as {lab.names.lab}; python -m bench.lab down {lab.names.lab}", err=True)
            else:
                lab.__exit__()
    sys.exit(code)


def guarded() -> None:
    """main(), with errors as one line."""
    try:
        main()
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except OSError as error:
        print(f"lab: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    guarded()
