"""Who computes what: an owner rank for every query head and FFN group of every layer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from halo_mpi.errors import InputError, UsageError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.records import owners, split_evenly
from halo_mpi.schedule.advice import Advice
from halo_mpi.schedule.dealing import by_layer, dealt_again, in_runs
from halo_mpi.wire.messages import Kind

Disks = list[dict[str, set[int]]]  # heads ("query") and groups ("ffn") on each rank's disk


@dataclass(frozen=True, slots=True)
class Change:
    """What a rank has of one layer from now on, ascending."""

    heads: list[int]
    groups: list[int]


@dataclass(frozen=True)
class Plan:
    """Owner ranks: `query` int [layers, heads] and `ffn` int [layers, groups]. `gathered`: ranks that have whole layers."""

    name: str
    query: np.ndarray
    ffn: np.ndarray
    gathered: tuple[int, ...] = ()

    def query_heads(self, rank: int) -> list[list[int]]:
        """The query heads of a rank in each layer, ascending."""
        return [np.flatnonzero(owner == rank).tolist() for owner in self.query]

    def groups(self, rank: int) -> list[list[int]]:
        """The FFN groups of a rank in each layer, ascending."""
        return [np.flatnonzero(owner == rank).tolist() for owner in self.ffn]

    def counts(self, ranks: int) -> tuple[list[int], list[int]]:
        """How many heads and groups each rank has, of a layer in the middle; if some are gathered, on average."""
        if self.gathered:
            totals = (np.bincount(table.ravel(), minlength=ranks) for table in (self.query, self.ffn))
            heads, groups = (np.rint(total / len(self.query)).astype(int).tolist() for total in totals)
            return heads, groups
        layer = len(self.query) // 2
        heads, groups = (np.bincount(table[layer], minlength=ranks).tolist() for table in (self.query, self.ffn))
        return heads, groups

    def changes(self, other: "Plan", rank: int) -> dict[int, Change]:
        """What a rank has otherwise, by layer, if the other plan follows this one."""
        heads, groups, after = self.query_heads(rank), self.groups(rank), (other.query_heads(rank), other.groups(rank))
        found = {layer: Change(*own) for layer, own in enumerate(zip(*after))}
        return {layer: own for layer, own in found.items() if own != Change(heads[layer], groups[layer])}

    def to_dict(self) -> dict:
        tables = {"query": self.query.tolist(), "ffn": self.ffn.tolist()}
        return {"name": self.name, **tables, "gathered": list(self.gathered)}

    @classmethod
    def from_dict(cls, fields: dict) -> "Plan":
        return cls(fields["name"], np.array(fields["query"]), np.array(fields["ffn"]), tuple(fields["gathered"]))


def changed_keys(before: Plan, after: Plan) -> set[tuple[Kind, int, int]]:
    """(kind, layer, rank) of all parts that are others in the second plan."""
    keys = set()
    for kind, old, new in ((Kind.ATTENTION, before.query, after.query), (Kind.FFN, before.ffn, after.ffn)):
        for layer, entry in np.argwhere(old != new).tolist():
            keys |= {(kind, layer, int(old[layer, entry])), (kind, layer, int(new[layer, entry]))}
    return keys


def make_plan(config: ModelConfig, placement: str, available: list[dict[str, set[int]]], calibration: dict | None = None,
              advice: Advice | None = None) -> Plan:  # fmt: skip
    """The plan that `--placement` asks for; `available` tells which heads ("query") and groups ("ffn") each rank's disk holds.

    even: the same number everywhere, up to one; of sorted groups some of the better and some of the worse. root-attention: all
    heads on rank 0. FILE: JSON with "heads" and "groups", counts per rank; or with "tiers", lists of ranks from the most stable to
    the least, for a calibrated model (`calibration`: what was found, from its metadata); of three tiers or more, the last has
    nothing of the first and last layer; beside them "gathered", workers that get whole layers, as few as possible. importance: even; of a
    calibrated model in tiers, rank 0, which is never late, before all others. auto: as `advice` has it, with a tier of what is unstable.

    Raises UsageError or InputError if the file is wrong or nobody's disk holds what is needed.
    """
    ranks, fixed = len(available), False
    heads, groups = split_evenly(config.heads, ranks), split_evenly(config.groups, ranks)
    tiers, least_stable, gathered = None, [], ()
    if placement in ("auto", "importance") and calibration and ranks > 1:
        unstable = list(advice.unstable) if advice else []
        tiers = [tier for tier in ([0], [rank for rank in range(1, ranks) if rank not in unstable], unstable) if tier]
    measured = advice is not None and advice.chosen == "measured"
    name = placement
    if measured:
        name, heads, groups = "measured", list(advice.shares.heads), list(advice.shares.groups)
        gathered = advice.shares.gathered
    elif placement == "root-attention":
        heads = [config.heads] + [0] * (ranks - 1)
    elif placement in ("auto", "importance", "even"):
        name = "importance" if tiers else "even"
    else:
        wanted = read_placement(Path(placement), config, ranks)
        tiers, fixed = wanted.get("tiers"), "heads" in wanted
        least_stable = tiers[-1] if tiers and len(tiers) > 2 and 0 not in tiers[-1] else []
        if tiers and not calibration:
            raise UsageError(
                f"{placement}: tiers need a calibrated model; run `halo-mpi calibrate` on it, or give heads and groups"
            )
        heads, groups, gathered = (wanted.get(key, usual) for key, usual in (("heads", heads), ("groups", groups), ("gathered", ())))
    in_rank_order = in_runs(heads, [range(ranks)], config.heads_per_kv)
    if name == "even" and calibration:  # its groups are sorted: in runs, the last rank would have nothing that matters
        ffn = np.array(_back_and_forth(groups, [list(range(ranks))]))
        query = np.tile(in_rank_order, (config.layers, 1))
    elif tiers:
        if not fixed and not measured:
            heads, groups = (_largest_first(shares, tiers) for shares in (heads, groups))
        query, ffn = by_importance(config, heads, groups, tiers, calibration["heads"]["importance"])
    else:
        query, ffn = np.tile(in_rank_order, (config.layers, 1)), np.array(owners(groups))
    query = np.stack([_assign("query", heads, row, available, fixed or placement == "root-attention") for row in query.tolist()])
    ffn = _assign("ffn", groups, ffn.tolist(), available, fixed)
    plan = Plan(name, query, np.tile(ffn, (config.layers, 1)))
    if gathered:
        last = tiers[-1] if tiers and len(tiers) > 1 else []
        return replace(moved(plan, config, heads, groups, last, available, calibration, gathered), name=name)
    return without_ends(plan, least_stable, ranks, available) if least_stable else plan


def by_importance(config: ModelConfig, heads: list[int], groups: list[int], tiers: list[list[int]],
                  of_heads: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Owners, query [layers, heads] and ffn [groups]: what matters most to the first tier; within a tier, to all alike.

    `heads`, `groups`: how many each rank gets; groups are stored by falling importance. Heads go in runs of falling importance, but stay
    together with those that share their KV head, since each of its holders computes it.
    """
    query = np.empty((config.layers, config.heads), int)
    for layer, (row, importance) in enumerate(zip(query, of_heads)):
        turned = [tier[layer % len(tier) :] + tier[: layer % len(tier)] for tier in tiers]  # another one is first in each layer
        row[order_of_heads(config, importance)] = in_runs(heads, turned, config.heads_per_kv)
    return query, np.array(_back_and_forth(groups, tiers))


def moved(plan: Plan, config: ModelConfig, heads: Sequence[int], groups: Sequence[int], unstable: Sequence[int], available: Disks,
          calibration: dict | None, gathered: Sequence[int] = ()) -> Plan:  # fmt: skip
    """The plan with so many heads and groups by rank, and as few of them as possible in another place than now.

    Of a calibrated model, what matters least goes to the `unstable`, of every layer in which others have a part; what matters most to
    rank 0, if anybody is unstable."""
    ranks = len(heads)
    tiers = [list(range(ranks))]
    if calibration and unstable:
        tiers = [[0], [rank for rank in range(1, ranks) if rank not in unstable], sorted(unstable)]
    query, ffn = plan.query.copy(), plan.ffn.copy()
    own_heads, own_groups = (by_layer(counts, config.layers, gathered).tolist() for counts in (heads, groups))
    disks = {table: [disk[table] for disk in available] for table in ("query", "ffn")}
    for layer in range(config.layers):
        order = list(range(config.heads))
        if calibration:
            order = order_of_heads(config, calibration["heads"]["importance"][layer])

        def has_kv(rank: int, head: int) -> bool:
            first = head // config.heads_per_kv * config.heads_per_kv
            return rank in query[layer, first : first + config.heads_per_kv]

        query[layer] = dealt_again(plan.query[layer], own_heads[layer], order, tiers, disks["query"], False, has_kv)
        ffn[layer] = dealt_again(plan.ffn[layer], own_groups[layer], list(range(config.groups)), tiers, disks["ffn"], True)
    return Plan("moved", query, ffn, tuple(gathered))


def order_of_heads(config: ModelConfig, importance: list[float]) -> list[int]:
    """A layer's heads by falling importance, those that share a KV head side by side."""
    of_kv = np.reshape(importance, (config.kv_heads, -1)).sum(1)
    return sorted(range(config.heads), key=lambda head: (-of_kv[head // config.heads_per_kv], -importance[head]))


def without_ends(plan: Plan, unstable: Sequence[int], ranks: int, available: Disks) -> Plan:
    """The same, but nothing of the first and the last layer on the `unstable`: what is lost there costs most, and is always waited for."""
    query, ffn = plan.query.copy(), plan.ffn.copy()
    for name, table in (("query", query), ("ffn", ffn)):
        for layer in {0, len(table) - 1}:
            load = np.bincount(table[layer], minlength=ranks)
            for entry in np.flatnonzero(np.isin(table[layer], list(unstable))).tolist():
                takers = [rank for rank in range(ranks) if rank not in unstable and entry in available[rank][name]]
                if takers:
                    taker = min(takers, key=lambda rank: (load[rank], rank))
                    table[layer, entry] = taker
                    load[taker] += 1
    return replace(plan, query=query, ffn=ffn)


def _back_and_forth(shares: list[int], tiers: list[list[int]]) -> list[int]:
    """Owners of things that are sorted, tier after tier; within one in turns, to and fro, so that nobody always chooses first."""
    result, left = [], list(shares)
    for tier in tiers:
        while any(left[rank] for rank in tier):
            for rank in tier:
                if left[rank]:
                    result.append(rank)
                    left[rank] -= 1
            tier = tier[::-1]
    return result


def _largest_first(shares: list[int], tiers: list[list[int]]) -> list[int]:
    """The same shares, but the remainder of an even split goes to the first workers by tiers; rank 0 has other work."""
    order = [rank for tier in tiers for rank in tier if rank] + [0]
    result = [0] * len(shares)
    for rank, share in zip(order, sorted(shares, reverse=True)):
        result[rank] = share
    return result


def _assign(table: str, shares: list[int], preferred: list[int], available: list[dict[str, set[int]]], fixed: bool) -> np.ndarray:
    """The preferred owner where its disk holds the entry, else the rank with the most of its share still open."""
    what = {"query": "query head", "ffn": "FFN group"}[table]
    load = np.zeros(len(shares), int)
    result = np.empty(len(preferred), int)
    for entry in sorted(range(len(preferred)), key=lambda entry: sum(entry in disk[table] for disk in available)):
        holders = [rank for rank, disk in enumerate(available) if entry in disk[table]]
        if not holders:
            raise InputError(f"no host has the shard with {what} {entry}; copy the missing shard-KK.h5 to one of them")
        rank = preferred[entry]
        if rank not in holders:
            if fixed:
                raise InputError(
                    f"the placement gives {what} {entry} to rank {rank}, whose disk lacks its shard; copy it or change the placement"
                )
            rank = min(holders, key=lambda holder: (load[holder] - shares[holder], holder))
        load[rank] += 1
        result[entry] = rank
    return result


FORM = '{"heads": [count per rank], "groups": [count per rank]}, {"tiers": [[rank, ...], ...]} or both; "gathered": [rank, ...] beside'
KEYS = ({"heads", "groups"}, {"tiers"}, {"heads", "groups", "tiers"})


def read_placement(path: Path, config: ModelConfig, ranks: int) -> dict:
    """A placement file: "heads" and "groups", or "tiers", or all three. Raises UsageError or InputError that names what is wrong."""
    if not path.exists():
        raise UsageError(f"--placement {path}: neither auto, even, importance, root-attention nor an existing file")
    expected = {"heads": config.heads, "groups": config.groups}
    try:
        wanted = json.loads(path.read_text())
        known = isinstance(wanted, dict) and set(wanted) - {"gathered"} in KEYS
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not of the form {FORM}") from error
    if not known:
        raise InputError(f"{path} is not of the form {FORM}")
    for key in expected.keys() & wanted.keys():
        counts = wanted[key]
        if not isinstance(counts, list) or not all(isinstance(count, int) and count >= 0 for count in counts):
            raise InputError(f"{path}: {key} must be a list of counts, one per rank")
        if len(counts) != ranks or sum(counts) != expected[key]:
            raise InputError(
                f"{path}: {key} {counts} must have {ranks} counts (one per rank) that add up to the model's {expected[key]}"
            )
    gathered = wanted.get("gathered", [])
    workers = isinstance(gathered, list) and all(type(rank) is int and 0 < rank < ranks for rank in gathered)
    if not workers or len(set(gathered)) < len(gathered):
        raise InputError(f"{path}: gathered {gathered} must be a list of workers, ranks from 1 to {ranks - 1}, each once")
    if "tiers" in wanted:
        tiers = wanted["tiers"]
        if not isinstance(tiers, list) or not all(isinstance(tier, list) and tier for tier in tiers):
            raise InputError(f"{path}: tiers must be a list of lists of ranks, the most stable first")
        flat = [rank for tier in tiers for rank in tier]
        if not all(isinstance(rank, int) for rank in flat) or sorted(flat) != list(range(ranks)):
            raise InputError(f"{path}: tiers {tiers} must have each of the ranks 0 to {ranks - 1} once")
    return wanted
