"""Workers that are gone, and what becomes of their work: others take it over, all at once, while the token waits.

gone --> the ranks that are left load its heads and groups, and fill the caches of its heads, from attention inputs that the root
         kept or by computing the text so far again; then the token under way is computed again, as if nothing had been
back --> it gets its part again: as the scheduler wants it, or what it had at first, a few layers at a time while text flows
"""

from collections.abc import Callable

import numpy as np

from halo_mpi.engine.crew import Crew, WorkersGone
from halo_mpi.engine.mover import Mover, Refused
from halo_mpi.errors import RanksLostError
from halo_mpi.schedule.placement import Disks, Plan, changed_keys
from halo_mpi.wire.root_link import RootLink

MOST_S = 600.0  # that loading for others may take, and a worker's part of a sync if it says that it is there
STOPPED_S = 0.2  # between two looks at the messages: this process was stopped
LEAST = 0.01  # of a head or group: what a rank without work counts as having, when work is dealt to those that are left


class Vigil:
    """Waiting for others: `since` when this process has looked again and again, but for the times in which it was stopped itself."""

    def __init__(self, now: float):
        self.since = self.looked_at = now

    def look(self, now: float) -> float:
        """It looks now; seconds since the last time."""
        passed_s, self.looked_at = now - self.looked_at, now
        if passed_s > STOPPED_S:
            self.since = now
        return passed_s


class Rescue:
    """`disks`: what each rank's holds. `silent_s`: how long somebody who must answer may be silent; 0: for ever.

    `note` is told what happens, `phase` when work begins to move.
    """

    def __init__(self, disks: Disks, silent_s: float, crew: Crew, mover: Mover, link: RootLink, note: Callable[[str], None],
                 phase: Callable[[str], None]):  # fmt: skip
        self._disks, self._crew, self._mover, self._link, self._note, self._phase = disks, crew, mover, link, note, phase
        self.silent_s = silent_s
        self._home = mover.plan
        self._without: set[int] = set()  # they have no work, since they were gone

    def with_work(self, ranks: set[int]) -> set[int]:
        """Those of the ranks that have work under the plan in force."""
        return {rank for rank in ranks if rank in self._mover.plan.query or rank in self._mover.plan.ffn}

    @property
    def settled(self) -> bool:
        """Whether nobody who is back waits for its work."""
        return self._without <= self._crew.lost()

    def look(self, waited_for: set[int], since: float, patience_s: Callable[[int], float]) -> None:
        """Whether somebody who is waited for `since` then says nothing for longer than `silent_s` and `patience_s` of the worker.

        Or answers kicks, but has not done its part for `MOST_S`: its disk hangs. Raises WorkersGone then.
        """
        crew, link, now = self._crew, self._link, self._link.waiter.now()
        if not self.silent_s or now - since < self.silent_s / 2:
            return
        for rank in waited_for - crew.done_without():
            if now - max(since, link.asked_since(rank)) > MOST_S + patience_s(rank):
                link.failures.setdefault(rank, f"it answers, but did not do its part in {MOST_S:.0f} s; check its disk")
                crew.notice()
                raise WorkersGone
            silent_s = now - max(since, crew.waiting_since(rank))
            if silent_s < self.silent_s / 2:
                continue
            if not link.peers[rank].kicks_in_flight:  # whoever is busy hears a kick while it waits for its weights
                link.probe(rank)
            elif silent_s > self.silent_s + patience_s(rank):
                crew.stop_asking(rank, "says nothing", self.silent_s)
                raise WorkersGone

    def take_over(self, position: int, epoch: int) -> bool:
        """Give the work of everybody who is not there to the others, before the token at `position`; whether the caches hold
        all of the text before it then.

        Raises RanksLostError if they cannot take it: no shard, no memory.
        """
        begin, refusals, heads, taken = self._link.waiter.now(), {}, self._mover.plan.query, set()
        self._phase("re-placement")
        while gone := self.with_work(self._crew.done_without()):
            taken |= gone
            try:
                plan = dealt_to_others(self._mover.plan, gone, self._crew.done_without() | refusals.keys(), self._disks)
            except RanksLostError as error:
                if not refusals:
                    raise
                last = list(refusals.values())[-1]
                raise RanksLostError(f"{error} ({last})", gone, last.exit_code) from error
            try:
                if refusal := self._at_once(plan, position, epoch):
                    refusals[refusal.rank] = refusal
            except WorkersGone:
                pass  # somebody else, too
        self._without |= self._crew.done_without()
        counts = self._mover.plan.counts(self._link.ranks)
        took_s = self._link.waiter.now() - begin
        whose = f"rank {', '.join(map(str, sorted(taken)))}"
        self._note(f"the work of {whose} was taken over in {took_s:.2f} s: heads {counts[0]}, groups {counts[1]} by rank")
        return self._crew.history is not None or not position or np.array_equal(heads, self._mover.plan.query)

    def before_token(self, position: int, epoch: int) -> None:
        """Whoever is back gets again what it had at first; for runs in which no scheduler sees to it. Raises WorkersGone."""
        back = self._without - self._crew.done_without()
        anew = self._crew.history is None  # a cache can be filled only with a new text
        if not back or not self._mover.idle or not self._mover.may_move or position and anew:
            return
        without = self._without - back
        plan = dealt_to_others(self._home, without, without, self._disks) if without else self._home
        if changed_keys(self._mover.plan, plan):
            self._note(f"rank {', '.join(map(str, sorted(back)))} gets its work again")
            if anew:
                self._at_once(plan, position, epoch)
            else:
                self._mover.aim_at(plan)
        self._without = without

    def _at_once(self, plan: Plan, position: int, epoch: int) -> Refused | None:
        """Make this the plan now; the refusal of a rank, if one refuses, and then all stays as it is. Raises WorkersGone."""
        try:
            self._mover.begin_at_once(plan, epoch)
            self._wait(position)
        except (Refused, WorkersGone) as error:
            self._mover.forget()
            if isinstance(error, WorkersGone):
                raise
            self._note(f"takes no more over: {error}")
            return error
        return None

    def mind_the_move(self) -> None:
        """While work moves between tokens: who was to load its part and is silent is away, and the move is given up."""
        self._ask_who_is_there(self._mover.awaited(), 0.0, self.silent_s)

    def _ask_who_is_there(self, ranks: set[int], since: float, silent_s: float) -> set[int]:
        """Kick these workers; those that said nothing for so long since they were kicked are away now."""
        link, silent = self._link, set()
        for rank in ranks:
            peer = link.peers[rank]
            if not peer.kicks_in_flight:
                link.probe(rank)
            elif link.waiter.now() - max(peer.heard_at, peer.probed_since, since) > silent_s > 0:
                self._crew.stop_asking(rank, "does not answer", silent_s)
                silent.add(rank)
        return silent

    def _wait(self, position: int) -> None:
        """Until the plan that the mover was told is in force. Raises WorkersGone, Refused."""
        link, begin = self._link, self._link.waiter.now()
        vigil = Vigil(begin)
        while True:
            missing = self._mover.go_on_at_once(position)
            if self._mover.idle:
                return
            for _ in link.poll():
                pass  # an answer of the token that was given up
            now = link.waiter.now()
            vigil.look(now)
            if self._crew.notice() or self._ask_who_is_there(missing, vigil.since, 2 * self.silent_s):
                raise WorkersGone
            if now - begin > MOST_S and self.silent_s:
                raise RanksLostError(
                    f"the ranks that are left could not load the work of those that are gone in {MOST_S:.0f} s", set()
                )
            link.waiter.wait()


def dealt_to_others(plan: Plan, gone: set[int], takers_not: set[int], disks: Disks) -> Plan:
    """The plan with what the `gone` have dealt to all but `takers_not`, to each as much as fits what it has.

    Raises RanksLostError if there is something that nobody else's disk holds.
    """
    tables = []
    for name, what, table in (("query", "query head", plan.query), ("ffn", "FFN group", plan.ffn)):
        dealt = table.copy()
        usual = np.bincount(table.ravel(), minlength=len(disks)) / len(table)
        for layer, row in enumerate(dealt):
            held = np.bincount(row, minlength=len(disks)).astype(float)
            for entry in np.flatnonzero(np.isin(row, list(gone))).tolist():
                takers = [rank for rank, disk in enumerate(disks) if rank not in takers_not | gone and entry in disk[name]]
                if not takers:
                    lost = ", ".join(map(str, sorted(gone)))
                    raise RanksLostError(
                        f"rank {lost} is gone, and nobody who is left can take its work over: no disk with the shard of {what} {entry}, "
                        "or no memory; copy all shards to more hosts, or run on more",
                        gone,
                    )
                taker = min(takers, key=lambda rank: ((held[rank] + 1) / max(usual[rank], LEAST), rank))
                row[entry] = taker
                held[taker] += 1
        tables.append(dealt)
    return Plan(plan.name, *tables, plan.gathered)
