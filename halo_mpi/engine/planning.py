"""Who computes what in a run: devices and links are measured, the scheduler decides, and it is said what came of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click
import numpy as np

from halo_mpi.engine.predictor import predictor_bytes
from halo_mpi.engine.profile import measure_cluster
from halo_mpi.engine.read_speed import read_gbps
from halo_mpi.errors import MemoryBudgetError
from halo_mpi.schedule.advice import Advice, advise
from halo_mpi.schedule.cost import Cluster
from halo_mpi.schedule.head import F16_BYTES, MOST_TOKENS, HeadSplit, best_head, counted, even_rows, most_rows, with_head
from halo_mpi.schedule.memory import free_bytes
from halo_mpi.schedule.placement import Disks, Plan, make_plan
from halo_mpi.schedule.room import ends_spared
from halo_mpi.schedule.shares import Shares, Work, with_cost
from halo_mpi.schedule.shown import as_json
from halo_mpi.wire.exchange import broadcast, gather

if TYPE_CHECKING:
    from halo_mpi.engine.session import Session


def measure(session: Session) -> Cluster | None:
    """What devices and links can do, on the root (collective)."""
    free = free_bytes(session.ranks_on_host, session.kernel.program_bytes)
    budget, store = session.memory, session.store
    reads = (
        budget is not None and budget <= free
    )  # what is over its budget a rank reads from disk; there is none for what is free
    about = {
        "name": session.host,
        "memory": budget if reads else free,
        "read_gbps": session.together(
            lambda: read_gbps(store, session.kernel, session.comm.rank, session.comm.size) if reads else None
        ),
        "disk_heads": len(session.store.entries("query")),
        "disk_groups": len(session.store.entries("ffn")),
    }
    session.marks.measuring()
    return measure_cluster(session.comm, session.kernel, session.marks, session.link, about)


@dataclass(frozen=True, slots=True)
class Basis:
    """What a plan was made from, for another one when the devices change; on the root, if they were measured."""

    cluster: Cluster
    work: Work
    advice: Advice
    head: HeadSplit


def plan_run(session: Session) -> tuple[Plan, Disks, Basis | None]:
    """The plan that `--placement` asks for (collective), and on the root what the ranks' disks hold, and the plan's basis."""
    comm, config, wanted = session.comm, session.config, session.run.placement
    disks = gather(comm, {table: sorted(session.store.entries(table)) for table in ("query", "ffn")})
    available = [{table: set(entries) for table, entries in disk.items()} for disk in disks]
    cluster = measure(session) if wanted == "auto" and comm.size > 1 else None

    basis: Basis | None = None

    def decide() -> Plan:
        nonlocal basis
        found = session.store.meta.get("calibration")
        work = Work.of(session.kernel.sizes, session.context, _root_extra(session))
        try:
            advice = advise(cluster, work, bool(found)) if cluster else None
        except MemoryBudgetError:
            advice = None  # the check of memory says what is lacking, of even shares
        plan = make_plan(config, wanted, available, found, advice)
        if advice:
            plan = ends_spared(plan, advice.unstable, session.kernel.sizes, cluster, work, available)
            shares = with_cost(cluster, work, *plan.counts(comm.size), plan.gathered)
            head = _head(session, cluster, work, shares)
            basis = Basis(cluster, work, advice, head)
            session.scheduler = as_json(config, cluster, work, with_head(advice, head), head)
            _explain(session, advice, counted(shares, head))
        return plan

    plan = session.on_root(decide)
    return Plan.from_dict(broadcast(comm, plan.to_dict() if plan else None)), available, basis


def plan_head(session: Session, basis: Basis | None) -> tuple[list[int], int]:
    """How many rows of the head each rank is to score, and of how many tokens at once (collective)."""
    vocabulary, ranks = session.config.vocabulary, session.comm.size
    rows, tokens = [vocabulary] + [0] * (ranks - 1), MOST_TOKENS
    if session.run.head == "split":
        rows = even_rows(vocabulary, ranks, most_rows(session.config.hidden))
    elif basis:
        rows, tokens = list(basis.head.rows), basis.head.tokens
    return broadcast(session.comm, (rows, tokens))


def _head(session: Session, cluster: Cluster, work: Work, shares: Shares) -> HeadSplit:
    """What `--head` leaves to the scheduler."""
    if session.run.head != "auto":
        cluster = replace(cluster, devices=[replace(device, kb_ms=None) for device in cluster.devices])
    score_bytes = 4 if session.run.sync.wire == "f32" else F16_BYTES
    return best_head(cluster, work, shares, most_rows(session.config.hidden), score_bytes)


def _root_extra(session: Session) -> int:
    """Bytes that relaxed mode, and attention inputs kept for a move, take on the root, at most."""
    if session.run.sync.mode != "relaxed":
        return session.kept_bytes
    config = session.config
    elsewhere = Plan("", np.ones((config.layers, config.heads), int), np.ones((config.layers, config.groups), int))
    return session.kept_bytes + predictor_bytes(session.store, config, elsewhere, session.uses_calibration)


def _explain(session: Session, advice: Advice, shares: Shares) -> None:
    """Say what the measured shares are; on standard error too if somebody has nothing to do."""
    said = f"{advice.chosen} shares by rank: heads {list(shares.heads)}, groups {list(shares.groups)}"
    session.event(f"{said}; predicted {shares.cost.tpot_ms:.1f} ms per token")
    idle = [str(rank) for rank, own in enumerate(zip(shares.heads, shares.groups)) if not any(own)]
    if idle and advice.chosen == "measured":
        click.echo(
            f"halo-mpi: rank {', '.join(idle)} has nothing to do: with a part there a token would take longer "
            "(--placement even shares alike, `halo-mpi plan` tells more)",
            err=True,
        )
