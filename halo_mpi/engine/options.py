"""The options that every command of a distributed run takes, and their values as one object."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import click

from halo_mpi.model.kernels.choice import KERNELS
from halo_mpi.schedule.memory import parse_size
from halo_mpi.wire.messages import WIRES
from halo_mpi.wire.sockets import COPIES

MAX_LAG = 100  # below the requests that a worker may have unanswered
OWN, SYNC, RANKS = "Options", "Options of the network", "Options of the ranks and the report"  # sections of the help


class Size(click.ParamType):
    """A number of bytes: 800M, 1.5G, 2GiB."""

    name = "SIZE"

    def convert(self, value, param, ctx):
        size = parse_size(str(value))
        if size is None:
            self.fail(f"{value!r} is not a size; write for example 800M or 1.5G", param, ctx)
        return size


class Several(click.ParamType):
    """Values of one kind with commas between; a tuple. `name`: as the help shows it."""

    def __init__(self, each: click.ParamType, name: str):
        self._each, self.name = each, name

    def convert(self, value, param, ctx):
        return value if isinstance(value, tuple) else tuple(self._each.convert(word, param, ctx) for word in str(value).split(","))


SIZES_BY_RANK = Several(Size(), "SIZE[,SIZE...]")


def of_rank(sizes: tuple[int, ...] | None, rank: int) -> int | None:
    """Of sizes of rank 0, rank 1, ..., the last of all further ranks too."""
    return None if sizes is None else sizes[min(rank, len(sizes) - 1)]


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """How long the root waits for the workers, and what is done against waiting."""

    mode: str
    wire: str
    late: str  # defer or drop
    max_lag: int  # syncs
    quality: float  # largest inexact share of a token's work
    deadline_ms: float | None  # None: learned
    kick_ms: float  # 0: never
    outage_ms: float
    takeover_ms: float  # 0: never
    copies: str  # of COPIES
    trailer: bool
    tune_sockets: bool
    old_kernel: bool
    check: bool
    calibration: bool


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How the ranks work together, whatever they compute. The root's values count on every rank, but for `model`."""

    model: Path
    sync: SyncOptions
    kernel: str
    cache: str
    placement: str
    head: str  # auto, root or split
    moves: bool
    memory: tuple[int, ...] | None  # bytes by rank (see of_rank), weights and KV cache; what they do not hold is read at every token
    threads: int | None
    load_first: bool
    report: Path | None
    samples: bool
    verbose: bool


class Finite(click.FloatRange):
    """A number within limits, neither infinite nor nan."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class OrAuto(click.ParamType):
    """auto (None) or a number."""

    def __init__(self, number: click.ParamType):
        self.name, self._number = "number or auto", number

    def convert(self, value, param, ctx):
        return None if value is None or value == "auto" else self._number.convert(value, param, ctx)


threads_option = click.option("--threads", type=click.IntRange(1), metavar="N", envvar="OMP_NUM_THREADS", help="Threads of each rank.",
                              show_default="OMP_NUM_THREADS, else the host's cores shared among its ranks")  # fmt: skip

_OPTIONS = (
    click.option("--model", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder made by `halo-mpi convert`."),
    click.option("--wire", type=click.Choice(WIRES), default="f16", show_default=True,
                 help="Numbers in messages: 4, 2 or 1 byte each; what fits one packet is lost less often."),
    click.option("--sync", "mode", type=click.Choice(["strict", "relaxed"]), default="strict", show_default=True,
                 help="strict: waits for every answer, and the network cannot change the text, but for the rounding when work moves. "
                      "relaxed: goes on past a late answer with an estimate, and corrects it when the answer comes."),
    click.option("--late", type=click.Choice(["defer", "drop"]), default="defer", show_default=True,
                 help="relaxed: what becomes of late answers. drop: they count as zero, in every layer, as in HALO (for comparison)."),
    click.option("--max-lag", type=click.IntRange(0, MAX_LAG), default=8, show_default=True, metavar="K",
                 help="relaxed: how many syncs may lack a late answer before the root waits for it."),
    click.option("--quality", type=Finite(0, 1), default=0.3, show_default=True, metavar="Q",
                 help="relaxed: the largest share of a token's work that may be inexact; of its importance, if the model is calibrated."),
    click.option("--deadline-ms", type=OrAuto(Finite(0)), default="auto", show_default=True, metavar="auto|MS",
                 help="When an answer is late, counted after the root's own share. auto: learned from each worker's times."),
    click.option("--kick-ms", type=Finite(0), default=1.0, show_default=True, metavar="MS",
                 help="How often an overdue worker is sent 16 bytes, so that TCP repairs a loss; 0: never."),
    click.option("--outage-ms", type=Finite(1), default=300.0, show_default=True, metavar="MS",
                 help="relaxed: how long a worker may be silent before the root goes on without it, if --quality allows."),
    click.option("--takeover-ms", type=Finite(0), default=1000.0, show_default=True, metavar="MS",
                 help="How long a worker that must answer may be silent before others take its work over, and the token is computed again. "
                      "One whose process has ended is not waited for. 0: wait for ever."),
    click.option("--copies", type=click.Choice(list(COPIES)), default="auto", show_default=True,
                 help="How often every small message is sent to another host, each time over another TCP connection, so that it is late "
                      "only if all copies are (Open MPI). auto: twice, and four times where many are late."),
    click.option("--trailer/--no-trailer", default=True, show_default=True,
                 help="Send 16 bytes right behind every message that is not sent twice, for the same reason as kicks."),
    click.option("--tune-sockets/--no-tune-sockets", default=True, show_default=True,
                 help="Let TCP repair losses after 8 ms instead of 200, in this program's own connections (Linux 6.15; no root needed)."),
    click.option("--old-kernel", is_flag=True, help="Tune as if the kernel were older than 6.15; for measurements."),
    click.option("--check", is_flag=True, help="Recompute on the root what was added up, and stop if it is wrong."),
    click.option("--calibration/--no-calibration", default=True, show_default=True,
                 help="relaxed: predict importance and late answers by what `halo-mpi calibrate` found, if the model was calibrated. "
                      "--placement auto goes by it in any case."),
    click.option("--kernel", type=click.Choice(KERNELS), default="auto", show_default=True,
                 help="What multiplies. llvm: code compiled for this processor, for int4 and int8 models. torch: 4-bit blocks and "
                      "bf16 by PyTorch, for any model. reference: PyTorch in f32, exact and slow. auto: of int4 and int8 models llvm, or where "
                      "it does not work the quicker one of the others, which is measured once; of others the reference."),
    click.option("--cache", type=click.Choice(["auto", "f32", "f16"]), default="auto", show_default=True,
                 help="Numbers of the KV cache. f16 takes half the memory, and half the reading in long texts. auto: f16, but f32 with "
                      "--kernel reference."),
    click.option("--placement", default="auto", show_default=True, metavar="auto|even|importance|root-attention|FILE",
                 help="Who computes what. auto: devices and links are measured at start, in about a second, and get the shares with "
                      "which a token takes least time, or even ones if that is within a tenth (see `halo-mpi plan`). importance: even "
                      "shares, and of a calibrated model the most important ones on the root, as in auto. FILE: JSON, {\"heads\": [count "
                      "per rank], \"groups\": [count per rank]}, or {\"tiers\": [[0], [1, 3], [2]]}: ranks from the most stable to the "
                      "least, for a calibrated model; beside them \"gathered\": [2], workers that get whole layers, as few as possible."),
    click.option("--head", type=click.Choice(["auto", "root", "split"]), default="root", show_default=True,
                 help="Who scores the vocabulary. root: rank 0 alone. split: every rank an even part of it, which rank 0 does itself where "
                      "it does not come in time. auto: with --placement auto the parts that `halo-mpi plan` tells, if it pays; else root."),
    click.option("--moves/--no-moves", default=True, show_default=True,
                 help="With --placement auto: work moves to other ranks while text flows, if a device or its link becomes slow or lossy, "
                      "and back when it recovers."),
    click.option("--memory", type=SIZES_BY_RANK, show_default="everything is held",
                 help="Most memory for weights and KV cache of one rank, e.g. 800M, or 2G,800M: of rank 0, and of each other. Weights that "
                      "it does not hold are read from disk at every token, ahead of their turn."),
    click.option("--load-first", is_flag=True,
                 help="Read all weights before the first prompt, not while it is computed; for measurements."),
    threads_option,
    click.option("--json", "report", type=click.Path(path_type=Path), metavar="FILE", help="Write a report of the run to this file."),
    click.option("--samples", is_flag=True, help="With --json: also the time of every token and every sync."),
    click.option("--verbose", is_flag=True, help="Show the workers' state while running, and a traceback if something fails."),
)  # fmt: skip


class RunCommand(click.Command):
    """A command whose help lists its own options first, then those of `run_options`."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list] = {OWN: [], SYNC: [], RANKS: []}
        for parameter in self.get_params(context):
            if record := parameter.get_help_record(context):
                sections[_section(parameter)].append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _section(parameter: click.Parameter) -> str:
    if parameter.name in {field.name for field in fields(SyncOptions)}:
        return SYNC
    is_own = parameter.required or parameter.name not in {field.name for field in fields(RunOptions)}
    return OWN if is_own else RANKS


def run_options(command: Callable) -> Callable:
    """Add the options of RunOptions to a click command, which receives them as one argument `run`."""

    @functools.wraps(command)
    def with_run(*arguments, **options):
        sync = SyncOptions(**{field.name: options.pop(field.name) for field in fields(SyncOptions)})
        rest = {field.name: options.pop(field.name) for field in fields(RunOptions) if field.name != "sync"}
        return command(*arguments, run=RunOptions(sync=sync, **rest), **options)

    for option in reversed(_OPTIONS):
        with_run = option(with_run)
    return with_run


def default_run(model: Path, memory: tuple[int, ...] | None, threads: int | None, verbose: bool) -> RunOptions:
    """A run with the default of every other option."""

    @click.command()
    @run_options
    def take(run: RunOptions) -> RunOptions:
        return run

    return replace(take.main(["--model", str(model)], standalone_mode=False), memory=memory, threads=threads, verbose=verbose)
