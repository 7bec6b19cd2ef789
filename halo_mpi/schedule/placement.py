"""Who computes what: an owner rank for every query head and FFN group of every layer."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halo_mpi.errors import InputError, UsageError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.records import owners, split_evenly


@dataclass(frozen=True)
class Plan:
    """Owner ranks: `query` int [layers, heads] and `ffn` int [layers, groups]."""

    name: str
    query: np.ndarray
    ffn: np.ndarray

    def query_heads(self, rank: int) -> list[list[int]]:
        """The query heads of a rank in each layer, ascending."""
        return [np.flatnonzero(owner == rank).tolist() for owner in self.query]

    def groups(self, rank: int) -> list[list[int]]:
        """The FFN groups of a rank in each layer, ascending."""
        return [np.flatnonzero(owner == rank).tolist() for owner in self.ffn]

    def to_dict(self) -> dict:
        return {"name": self.name, "query": self.query.tolist(), "ffn": self.ffn.tolist()}

    @classmethod
    def from_dict(cls, fields: dict) -> "Plan":
        return cls(fields["name"], np.array(fields["query"]), np.array(fields["ffn"]))


def make_plan(config: ModelConfig, placement: str, available: list[dict[str, set[int]]], calibration: dict | None = None) -> Plan:
    """The plan that `--placement` asks for; `available` tells which heads ("query") and groups ("ffn") each rank's disk holds.

    even: the same number everywhere, up to one. root-attention: all heads on rank 0. FILE: shares from a JSON file,
    {"heads": [count per rank], "groups": [count per rank]}. auto: even shares; of a calibrated model (`calibration`: what was
    found, from its metadata) rank 0, which is never late, gets the most important groups and heads, and the workers alike.

    Raises UsageError or InputError if the file is wrong or nobody's disk holds what is needed.
    """
    ranks = len(available)
    heads, groups = split_evenly(config.heads, ranks), split_evenly(config.groups, ranks)
    fixed = False
    if placement == "root-attention":
        heads = [config.heads] + [0] * (ranks - 1)
    elif placement == "auto" and calibration and ranks > 1:
        return _by_importance(config, heads, groups, available, calibration)
    elif placement in ("auto", "even"):
        placement = "even"
    else:
        heads, groups = _shares_from_file(Path(placement), config, ranks)
        fixed = True
    query = _assign("query", heads, owners(heads), available, fixed or placement == "root-attention")
    ffn = _assign("ffn", groups, owners(groups), available, fixed)
    return Plan(placement, np.tile(query, (config.layers, 1)), np.tile(ffn, (config.layers, 1)))


def _by_importance(config: ModelConfig, heads: list[int], groups: list[int], available: list[dict[str, set[int]]],
                   calibration: dict) -> Plan:  # fmt: skip
    """Groups are stored by falling importance: the root takes the first, the workers the others in turns.

    Heads go in runs of falling importance, but stay together with those that share their KV head, which each holder computes.
    """
    workers = len(groups) - 1
    turns = [workers - turn % workers for turn in range(config.groups - groups[0])]  # the last ranks take the remainder
    ffn = _assign("ffn", groups, [0] * groups[0] + turns, available, False)
    query = np.empty((config.layers, config.heads), int)
    for layer, importance in enumerate(calibration["heads"]["importance"]):
        of_kv = np.reshape(importance, (config.kv_heads, -1)).sum(1)
        order = sorted(range(config.heads), key=lambda head: (-of_kv[head // config.heads_per_kv], -importance[head]))
        preferred = np.empty(config.heads, int)
        preferred[order] = owners(heads)
        query[layer] = _assign("query", heads, preferred.tolist(), available, False)
    return Plan("importance", query, np.tile(ffn, (config.layers, 1)))


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


def _shares_from_file(path: Path, config: ModelConfig, ranks: int) -> tuple[list[int], list[int]]:
    if not path.exists():
        raise UsageError(f"--placement {path}: neither auto, even, root-attention nor an existing file")
    expected = {"heads": config.heads, "groups": config.groups}
    try:
        shares = json.loads(path.read_text())
        lists = [shares[key] for key in expected]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f'{path} is not of the form {{"heads": [count per rank], "groups": [count per rank]}}') from error
    for key, counts in zip(expected, lists):
        if not isinstance(counts, list) or not all(isinstance(count, int) and count >= 0 for count in counts):
            raise InputError(f"{path}: {key} must be a list of counts, one per rank")
        if len(counts) != ranks or sum(counts) != expected[key]:
            raise InputError(
                f"{path}: {key} {counts} must have {ranks} counts (one per rank) that add up to the model's {expected[key]}"
            )
    return lists[0], lists[1]
