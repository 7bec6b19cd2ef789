"""The options that every command of a distributed run takes, and their values as one object."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from halo_mpi.wire.messages import WIRES

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Size(click.ParamType):
    """A number of bytes: 800M, 1.5G, 2GiB."""

    name = "SIZE"

    def convert(self, value, param, ctx):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(value), re.IGNORECASE)
        if not match:
            self.fail(f"{value!r} is not a size; write for example 800M or 1.5G", param, ctx)
        return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How the ranks work together, whatever they compute. The root's values count on every rank, but for `model`."""

    model: Path
    wire: str
    sync: str
    placement: str
    memory: int | None  # bytes per rank, weights and KV cache
    threads: int | None
    report: Path | None
    samples: bool
    verbose: bool


def run_options(command: Callable) -> Callable:
    """Add the options of RunOptions to a click command, which receives them as one argument `run`."""

    @functools.wraps(command)
    def with_run(*arguments, model, wire, sync, placement, memory, threads, report, samples, verbose, **options):
        run = RunOptions(model, wire, sync, placement, memory, threads, report, samples, verbose)
        return command(*arguments, run=run, **options)

    options = (
        click.option("--model", type=click.Path(path_type=Path), required=True, help="Folder made by `halo-mpi convert`."),
        click.option("--wire", type=click.Choice(WIRES), default="f32", show_default=True, help="Numbers in messages; f16 halves them."),
        click.option("--sync", type=click.Choice(["strict"]), default="strict", show_default=True, help="strict: waits for every answer."),
        click.option("--placement", default="auto", show_default=True, metavar="auto|even|root-attention|FILE",
                     help="Who computes what. auto: even. FILE: JSON, {\"heads\": [count per rank], \"groups\": [count per rank]}."),
        click.option("--memory", type=Size(), help="Most memory for weights and KV cache of one rank, e.g. 800M. Default: what is free."),
        click.option("--threads", type=click.IntRange(1), envvar="OMP_NUM_THREADS",
                     help="Threads of each rank. Default: OMP_NUM_THREADS, else the host's cores shared among its ranks."),
        click.option("--json", "report", type=click.Path(path_type=Path), help="Write a report of the run to this file."),
        click.option("--samples", is_flag=True, help="With --json: also the time of every token and every sync."),
        click.option("--verbose", is_flag=True, help="Show a traceback if something fails."),
    )  # fmt: skip
    for option in reversed(options):
        with_run = option(with_run)
    return with_run
