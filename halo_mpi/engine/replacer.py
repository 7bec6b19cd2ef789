"""Watches how the devices do while text flows, and lets work move when that is worth it."""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from halo_mpi.engine.crew import Crew
from halo_mpi.engine.mover import Mover
from halo_mpi.model.sizes import Sizes
from halo_mpi.schedule.cost import Cluster
from halo_mpi.schedule.placement import Disks, Plan, changed_keys, moved
from halo_mpi.schedule.room import ends_spared, room
from halo_mpi.schedule.shares import Work
from halo_mpi.schedule.telemetry import Telemetry
from halo_mpi.schedule.watch import Target, Watch
from halo_mpi.wire.messages import Kind
from halo_mpi.wire.peer import Answer
from halo_mpi.wire.root_link import RootLink

PROBE_S = 0.2  # between two probes of a worker that has nothing to do
GONE_S = 3.0  # that a worker is away, before its work moves
ROW = 0.08  # of the time of a sync over one row, that a further row takes: int4 kernels, 78 us for 1 row, 96 for 4


class Replacer:
    """`cluster`: as measured at the start; `disks`: what each rank's holds; `calibration`: of the model, if it has one.

    `note` is told of every move, `phase` when one begins.
    """

    def __init__(self, sizes: Sizes, cluster: Cluster, work: Work, unstable: tuple[int, ...], disks: Disks,
                 calibration: dict | None, mover: Mover, crew: Crew, link: RootLink, note: Callable[[str], None],
                 phase: Callable[[str], None]):  # fmt: skip
        self._sizes, self._config, self._work, self._disks, self._calibration = sizes, sizes.config, work, disks, calibration
        self._mover, self._crew, self._link, self._note, self._phase = mover, crew, link, note, phase
        self._telemetry = Telemetry(cluster)
        first = None if mover.plan.gathered else mover.plan.counts(link.ranks)
        self._watch = Watch(work, calibration is not None, unstable, first)
        self._aim: Plan | None = None  # until it is reached
        self._moving = False
        self._probed_at = 0.0
        self._plan: Plan | None = None
        self._follow()

    def computed(self, rank: int, kind: Kind, layer: int, seconds: float, rows: int) -> None:
        """A rank computed its part of a sync over a token, or over a few rows."""
        self._follow()
        self._telemetry.computed(rank, kind, self._parts[kind][layer][rank], seconds * 1e3 / (1 + ROW * (rows - 1)))

    def answered(self, answer: Answer, kind: Kind, layer: int, waited_for: bool, unseen_s: float = 0.0) -> None:
        """A worker's partial sum came; `waited_for`: else it may have come before, while the root computed; `unseen_s`: it may have come
        so much before, while the root was away from its core."""
        self.computed(answer.rank, kind, layer, answer.took_s, len(answer.y))
        self._telemetry.answered(answer.rank, (answer.latency_s - answer.took_s) * 1e3, waited_for, unseen_s * 1e3)

    def last_seen(self) -> list[dict]:
        """The devices as they are now, for the report."""
        return [asdict(device) for device in self._telemetry.cluster().devices]

    def before_token(self) -> None:
        """See to it, between two tokens."""
        now, mover = self._link.waiter.now(), self._mover
        self._telemetry.end_token(now)
        self._follow()
        if self._moving and mover.idle:
            self._moving = False
            self._watch.moved(now)
            if not changed_keys(self._plan, self._aim):
                self._note(f"moved: heads {self._heads}, groups {self._groups} by rank")
                self._aim = None
        if not mover.idle or not mover.may_move:
            return
        self._probe(now)
        gone = self._crew.away_for(GONE_S)
        idle = any(self._heads[rank] or self._groups[rank] for rank in gone)
        if not self._telemetry.known or not self._watch.due(now, idle):
            return
        cluster = self._telemetry.cluster(gone)
        if target := self._watch.look(cluster, self._heads, self._groups, now, self._plan.gathered):
            self._begin(cluster, target)
        elif self._aim and not self._crew.done_without():  # it was given up halfway
            self._move_to(self._aim, room(self._aim, self._sizes, cluster, self._work), "it was begun")

    def _begin(self, cluster: Cluster, target: Target) -> None:
        shares, unstable = target.advice.shares, target.advice.unstable
        shape = (shares.heads, shares.groups, unstable, self._disks, self._calibration, shares.gathered)
        plan = moved(self._plan, self._config, *shape)
        plan = ends_spared(plan, unstable, self._sizes, cluster, self._work, self._disks)
        left = room(plan, self._sizes, cluster, self._work)
        if not changed_keys(self._plan, plan):
            self._aim = None
            return
        if left is not None and left < 0:
            self._note("work stays where it is: some rank's memory would not hold its new part")
            return
        self._move_to(plan, left, target.why)

    def _move_to(self, plan: Plan, left: int | None, why: str) -> None:
        heads, groups = plan.counts(self._link.ranks)
        self._note(f"moving work, since {why}: heads {heads}, groups {groups} by rank")
        self._aim, self._moving = plan, True
        self._mover.aim_at(plan, left)
        self._phase("re-placement")

    def _follow(self) -> None:
        """The parts of the plan in force."""
        if self._plan is self._mover.plan:
            return
        plan, ranks = self._mover.plan, self._link.ranks
        self._plan = plan
        self._heads, self._groups = plan.counts(ranks)
        self._parts = {
            kind: [np.bincount(row, minlength=ranks) / len(row) for row in table]
            for kind, table in ((Kind.ATTENTION, plan.query), (Kind.FFN, plan.ffn))
        }

    def _probe(self, now: float) -> None:
        """Ask those that have nothing to do how fast they are."""
        able = [rank for rank in self._link.workers if not self._crew.does_without(rank)]
        idle = [rank for rank in able if rank not in self._plan.query and rank not in self._plan.ffn]
        for rank in idle:
            if probe := self._link.peers[rank].probe:
                over_ms, unseen_ms = (probe.latency_s - probe.took_s) * 1e3, probe.unseen_s * 1e3
                self._telemetry.probed(rank, 1 / self._config.groups, probe.took_s * 1e3, over_ms, unseen_ms)
                self._link.peers[rank].probe = None
        if now - self._probed_at > PROBE_S:
            self._probed_at = now
            for rank in idle:
                if self._link.peers[rank].probed_at is None:
                    self._link.probe_speed(rank)
