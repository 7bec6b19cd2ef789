"""A plan for people, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halo_mpi.model.config import ModelConfig
from halo_mpi.schedule.advice import WORTH, Advice
from halo_mpi.schedule.candidates import Shares
from halo_mpi.schedule.cost import KINDS, Cluster, Cost, share_ms
from halo_mpi.schedule.head import HeadSplit
from halo_mpi.schedule.losses import losses_of_one, most_lost
from halo_mpi.schedule.reading import Reading, reading_of, room
from halo_mpi.schedule.work import Work

NAMES = {
    "even": "even shares",
    "measured": "the best shares found",
    "root-attention": "all heads on the root, groups even",
    "root alone": "everything on the root",
}
MOST_ROWS = 40  # of devices; of more the JSON has all
MOST_NAMED = 10
NAME_WIDTH = 14


def as_json(config: ModelConfig, cluster: Cluster, work: Work, advice: Advice, head: HeadSplit) -> dict:
    """The devices as measured, which `--devices` reads again, and the shares by name with their cost."""
    return {
        "model": config.name,
        "devices": [asdict(device) for device in cluster.devices],
        "sync_ms": cluster.sync_ms,
        "further_ms": cluster.further_ms,
        "head_ms": cluster.head_ms,
        "kb_ms": cluster.kb_ms,
        "head": asdict(head),
        "chosen": advice.chosen,
        "unstable": list(advice.unstable),
        "options": {name: _option(shares, _readings(cluster, work, shares)) for name, shares in advice.options.items()},
    }


def losses_as_json(cluster: Cluster, work: Work) -> dict:
    """What the loss of workers would mean."""
    return {"losses": [asdict(loss) for loss in losses_of_one(cluster, work)], "may_lose": most_lost(cluster, work)}


def _option(shares: Shares, read: list[Reading]) -> dict:
    cost = shares.cost
    return {
        "heads": list(shares.heads),
        "groups": list(shares.groups),
        "gathered": list(shares.gathered),
        "bytes": [int(own.held_bytes) for own in read],
        "read_bytes": [int(own.read_bytes) for own in read],
        "tpot_ms": cost.tpot_ms,
        "attention_ms": asdict(cost.attention),
        "ffn_ms": asdict(cost.ffn),
        "head_ms": cost.head_ms,
    }


def _readings(cluster: Cluster, work: Work, shares: Shares) -> list[Reading]:
    own = zip(cluster.devices, shares.heads, shares.groups)
    return [reading_of(device, work, rank == 0, heads, groups) for rank, (device, heads, groups) in enumerate(own)]


def print_plan(config: ModelConfig, cluster: Cluster, work: Work, advice: Advice, head: HeadSplit) -> None:
    """The chosen shares by device, the time of a token and its parts, and what else was considered."""
    console, shares = Console(highlight=False), advice.shares
    console.print(_devices(config, cluster, work, shares))
    for line in _parts(shares.cost, cluster, head):
        console.print(line, markup=False)
    console.print(_options(advice))
    for line in [*_reasons(cluster, work, shares, advice), *_losses(cluster, work)]:
        console.print(line, markup=False)


def _devices(config: ModelConfig, cluster: Cluster, work: Work, shares: Shares) -> Table:
    every = _readings(cluster, work, shares)
    reads = ["read\nMiB"] if any(own.read_bytes for own in every) else []
    title = escape(f"{config.name}: {config.layers} layers of {config.heads} heads and {config.groups} groups")
    table = Table(title=title, padding=(0, 0 if reads else 1))  # all columns in 80
    columns = ("rank", "device", "heads", "groups", "memory\nMiB", "of\nMiB", *reads, "link\nms", "late", "attn.\nms", "FFN\nms")
    for column in columns:
        if column == "device":
            table.add_column(column, no_wrap=True, max_width=NAME_WIDTH)
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for rank, (device, own) in enumerate(zip(cluster.devices[:MOST_ROWS], every)):
        heads, groups = shares.heads[rank], shares.groups[rank]
        parts, reading_ms = (heads / work.heads, groups / work.groups), (float(own.attention_ms), float(own.ffn_ms))
        times = (share_ms(device, kind, part, rank == 0, ms) for kind, part, ms in zip(KINDS, parts, reading_ms))
        memory = "-" if device.memory is None else f"{device.memory / 2**20:.0f}"
        read = [f"{own.read_bytes / 2**20:.0f}" if own.read_bytes else "-" for _ in reads]
        held = f"{own.held_bytes / 2**20:.0f}"
        table.add_row(str(rank), escape(device.name), str(heads), str(groups), held, memory, *read, f"{device.link_ms:.2f}",
                      f"{device.late_rate:.1%}", *(f"{ms:.2f}" if ms else "-" for ms in times))  # fmt: skip
    return table


def _parts(cost: Cost, cluster: Cluster, head: HeadSplit) -> list[str]:
    lines = [f"A token takes {cost.tpot_ms:.1f} ms (predicted, strict mode):"]
    for name, sync in (("attention", cost.attention), ("FFN", cost.ffn)):
        lines.append(
            f"  {cost.layers} x {sync.ms:.2f} ms {name}: {sync.longest_ms:.2f} the longest share (rank {sync.longest}, "
            f"{cluster.devices[sync.longest].name}), {sync.further_ms:.2f} messages, {sync.stall_ms:.2f} lost packets"
        )
    return [*lines, f"  {cost.head_ms:.2f} ms vocabulary, {_where(head, cluster)}"]


def _where(head: HeadSplit, cluster: Cluster) -> str:
    if head.is_split:
        more = ", ..." if len(head.rows) > MOST_NAMED else ""
        rows = ", ".join(map(str, head.rows[:MOST_NAMED]))
        return f"on the root; {head.ms:.2f} with --head auto: {rows}{more} rows by rank"
    if len(head.rows) > 1 and all(device.kb_ms is None for device in cluster.devices[1:]):
        return "on the root; whether to split it is not known without kb_ms or mbit of the workers"
    return "on the root"


def _options(advice: Advice) -> Table:
    table = Table(title="considered")
    for column in ("shares", "ms per token", ""):
        table.add_column(column, justify="right" if column == "ms per token" else "left")
    for name, words in NAMES.items():
        shares = advice.options.get(name)
        cost = f"{shares.cost.tpot_ms:.1f}" if shares else "memory or shards are lacking"
        table.add_row(words, cost, "chosen" if name == advice.chosen else "")
    return table


def _reasons(cluster: Cluster, work: Work, shares: Shares, advice: Advice) -> list[str]:
    even, best, ranks = advice.options.get("even"), advice.options["measured"], len(cluster.devices)
    if even is None:
        lines = ["Even shares do not fit: some device has too little memory, or too few shards."]
    elif advice.chosen == "even":
        gain = 1 - best.cost.tpot_ms / even.cost.tpot_ms
        lines = [f"Shares stay even: the best ones found would be {gain:.0%} faster, and {WORTH:.0%} would be worth it."]
    else:
        lines = [f"The best shares found are {1 - best.cost.tpot_ms / even.cost.tpot_ms:.0%} faster than even ones."]
    idle = [rank for rank in range(ranks) if not shares.heads[rank] and not shares.groups[rank]]
    full = [rank for rank in idle if room(cluster.devices[rank], work, rank == 0, 0, 1) < 0]
    if idle and advice.chosen == "even":
        lines.append(f"Nothing to do for {_named(idle)}: there are only {work.heads} heads and {work.groups} groups.")
    elif idle:
        lines.append(
            f"Nothing to do for {_named(idle)}: with a part there a token would take longer, or there is no room for it."
        )
    if full:
        lines.append(f"No room for a single group on {_named(full)}.")
    if shares.gathered:
        lines.append(
            f"Gathered in whole layers, as few as possible: what {_named(shares.gathered)} has, whose answers a sync waits for longest."
        )
    if advice.unstable:
        lines.append(f"What matters least goes to {_named(advice.unstable)}, from where answers are late more often.")
    if ranks > MOST_ROWS:
        lines.append(f"The table has the first {MOST_ROWS} of {ranks} devices; --json has all.")
    return lines


def _losses(cluster: Cluster, work: Work) -> list[str]:
    losses, workers = losses_of_one(cluster, work), len(cluster.devices) - 1
    if not losses:
        return []
    needed = sorted(rank for loss in losses if loss.tpot_ms is None for rank in loss.ranks)
    if needed:
        return [f"Without {_named(needed)} nothing goes on: the others' memory or disks do not hold its part."]
    worst, count = max(losses, key=lambda loss: loss.tpot_ms), most_lost(cluster, work)
    any_of = "any one of " if len(worst.ranks) > 1 else ""
    at_once = "all of them" if count == workers else f"any {count} of them"
    return [f"One worker may be lost: a token takes at most {worst.tpot_ms:.1f} ms then (without {any_of}{_named(worst.ranks)}). "
            f"So may {at_once}."]  # fmt: skip


def _named(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank {', '.join(map(str, ranks[:MOST_NAMED]))}{more}"
