"""A model on more and more boards of one kind: what a token would take, in parts, and how well the boards are used. All simulated."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halo_mpi.errors import MemoryBudgetError
from halo_mpi.model.sizes import Sizes
from halo_mpi.schedule.advice import advise
from halo_mpi.schedule.cost import Cluster, Cost, token_cost
from halo_mpi.schedule.head import best_head, most_rows
from halo_mpi.schedule.profiles import Profile, simulated
from halo_mpi.schedule.work import Work

COLUMNS = ("boards", "loss", "with\nwork", "ms per\ntoken", "com-\nputing", "wire", "lost\npackets", "vocab-\nulary", "effi-\nciency",
           "head\nsplit")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parts:
    """Of a time per token, in ms. `compute_ms`: the longest shares; `wire_ms`: links of who has them, and messages; `wait_ms`: for lost
    packets; `head_ms`: the vocabulary."""

    compute_ms: float
    wire_ms: float
    wait_ms: float
    head_ms: float


@dataclass(frozen=True, slots=True)
class Point:
    """Of so many boards at one loss rate. `why_not`: they do not hold the model, and all else is empty. `working`: boards that get work;
    `efficiency`: against one board that had the memory; `split_tpot_ms`: with `--head auto`."""

    count: int
    loss: float
    why_not: str | None = None
    working: int = 0
    tpot_ms: float | None = None
    parts: Parts | None = None
    efficiency: float | None = None
    split_tpot_ms: float | None = None


def parts_of(cluster: Cluster, cost: Cost) -> Parts:
    syncs = (cost.attention, cost.ffn)
    links = [cluster.devices[sync.longest].link_ms if sync.longest else 0.0 for sync in syncs]
    return Parts(
        cost.layers * sum(sync.longest_ms - link for sync, link in zip(syncs, links)),
        cost.layers * sum(sync.further_ms + link for sync, link in zip(syncs, links)),
        cost.layers * sum(sync.stall_ms for sync in syncs),
        cost.head_ms,
    )


def sweep(profile: Profile, counts: Sequence[int], losses: Sequence[float], sizes: Sizes, context: int, **line) -> Iterator[Point]:
    """A point for each number of boards and loss rate. `line`: `mbit` and `memory`, as `simulated` takes them."""
    work = Work.of(sizes, context)
    alone_ms = _alone_ms(profile, sizes, context, work)
    for count in counts:
        for loss in losses:
            cluster = simulated(profile, count, sizes, context, loss=loss, **line)
            try:
                advice = advise(cluster, work, calibrated=False)
            except MemoryBudgetError as error:
                yield Point(count, loss, str(error))
                continue
            shares = advice.shares
            head = best_head(cluster, work, shares, most_rows(sizes.config.hidden))
            tpot_ms = shares.cost.tpot_ms
            yield Point(
                count,
                loss,
                None,
                sum(1 for own in zip(shares.heads, shares.groups) if any(own)),
                tpot_ms,
                parts_of(cluster, shares.cost),
                alone_ms / (count * tpot_ms),
                tpot_ms - head.alone_ms + head.ms,
            )


def _alone_ms(profile: Profile, sizes: Sizes, context: int, work: Work) -> float:
    """What one board would take that had the memory for everything."""
    one = simulated(profile, 1, sizes, context)
    one = replace(one, devices=[replace(one.devices[0], memory=None)])
    return token_cost(one, work.layers, [work.heads], [work.groups]).tpot_ms


def sweep_as_json(name: str, profile: Profile, sizes: Sizes, points: Sequence[Point]) -> dict:
    return {"model": sizes.config.name, "simulated": as_said(name, profile), "points": [asdict(point) for point in points]}


def as_said(name: str, profile: Profile) -> dict:
    """What a simulation was made from."""
    return {"profile": name, "figures": {key: figure._asdict() for key, figure in profile.figures.items()}}


def print_sweep(name: str, profile: Profile, sizes: Sizes, points: Sequence[Point]) -> None:
    table = Table(title=f"SIMULATED, not measured: {escape(sizes.config.name)} in {sizes.dtype} on boards of profile {name}", padding=0)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for point in points:
        table.add_row(str(point.count), f"{point.loss:.1%}", *_cells(point))
    console = Console(highlight=False)
    console.print(table)
    for line in [*_not_held(points), *figure_lines(profile)]:
        console.print(line, markup=False)


def _cells(point: Point) -> list[str]:
    if point.why_not:
        return ["-", "does not fit", *["-"] * 6]
    parts = point.parts
    times = (point.tpot_ms, parts.compute_ms, parts.wire_ms, parts.wait_ms, parts.head_ms)
    return [str(point.working), *(f"{ms:.1f}" for ms in times), f"{point.efficiency:.0%}", f"{point.split_tpot_ms:.1f}"]


def _not_held(points: Sequence[Point]) -> list[str]:
    reasons = {point.count: point.why_not for point in points if point.why_not}
    return [f"{count} boards: {why_not}." for count, why_not in reasons.items()]


def figure_lines(profile: Profile) -> list[str]:
    """What was published, a line each."""
    return ["From:", *(f"  {name} {figure.value:g}: {figure.source}" for name, figure in profile.figures.items())]
