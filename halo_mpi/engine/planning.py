"""Who computes what in a run: devices and links are measured, the scheduler decides, and it is said what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
import numpy as np
import psutil

from halo_mpi.engine.predictor import predictor_bytes
from halo_mpi.engine.profile import measure_cluster
from halo_mpi.engine.read_speed import read_gbps
from halo_mpi.errors import MemoryBudgetError
from halo_mpi.schedule.advice import Advice, advise
from halo_mpi.schedule.cost import Cluster
from halo_mpi.schedule.memory import available_bytes
from halo_mpi.schedule.moving import ends_spared
from halo_mpi.schedule.placement import Disks, Plan, make_plan
from halo_mpi.schedule.shares import Shares, Work, with_cost
from halo_mpi.schedule.shown import as_json
from halo_mpi.wire.exchange import broadcast, gather

if TYPE_CHECKING:
    from halo_mpi.engine.session import Session


def measure(session: Session) -> Cluster | None:
    """What devices and links can do, on the root (collective)."""
    program = max(0, session.kernel.program_bytes - psutil.Process().memory_info().rss)  # what this rank will take beside weights and cache
    free = max(0, available_bytes() // session.ranks_on_host - program)
    budget, store = session.run.memory, session.store
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
    return measure_cluster(session.comm, session.kernel, session.marks, session.link, about)


@dataclass(frozen=True, slots=True)
class Basis:
    """What a plan was made from, for another one when the devices change; on the root, if they were measured."""

    cluster: Cluster
    work: Work
    advice: Advice


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
            basis = Basis(cluster, work, advice)
            plan = ends_spared(plan, advice.unstable, session.kernel.sizes, cluster, work, available)
            session.scheduler = as_json(config, cluster, work, advice)
            _explain(session, advice, with_cost(cluster, work, *plan.counts(comm.size)))
        return plan

    plan = session.on_root(decide)
    return Plan.from_dict(broadcast(comm, plan.to_dict() if plan else None)), available, basis


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
