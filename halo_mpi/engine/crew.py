"""The workers as the root sees them: who has which part, who is late, who is cut off, and how they come back.

present --> suspect    missed a deadline and was not heard since; any message clears it
        --> behind     silent for `outage_s`, and the run's quality allows to do without it: still asked, not waited for;
                       once heard again, present at the next attention
any     --> away       `CREDIT` syncs ago was the last request that it has done, or it holds everybody up (answers take it, or the
                       root lately waited for it, `FAR` times as long as most others), and the run's quality allows to do without it: not
                       asked any more
away    --> present    heard again, and sent every attention input that it missed; not before `PAUSE_S` if it was too slow, and twice as
                       long the next time
any     --> lost       its process has ended, or it says or shows that it cannot do its part: not asked any more in this run

Whoever is lost, or not there and silent, is gone: others have to do its work.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from halo_mpi.engine.history import AttentionInputs
from halo_mpi.schedule.placement import Plan
from halo_mpi.wire.messages import Kind
from halo_mpi.wire.root_link import RootLink

CREDIT = 128  # syncs
MEMORY_S = 1.0  # of how long the root waited for whom
HELD_UP_S = 0.3  # of that, what makes a worker pause for whom the root waited FAR times as long as for most others
FAR, FAR_S = 5.0, 5e-3  # times the others' latency, and so much on top; with 30 % loss on its link a worker takes 22 ms, others 3
SLOWER = 20.0  # times as long as it should, a worker may compute before it counts as silent
UNKNOWN_S = 5.0  # the same where nobody can tell how long it should
PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(slots=True)
class Patience:
    """How long the root lately waited for a worker past its deadline, or would have, had it not gone on without.

    It fades in `MEMORY_S`; times are the waiter's.
    """

    waited_s: float = 0.0
    at: float = 0.0
    pause_s: float = 0.0
    not_before: float = 0.0  # it comes back

    def wait(self, seconds: float, now: float) -> float:
        self.waited_s = self.waited_s * math.exp((self.at - now) / MEMORY_S) + seconds
        self.at = now
        return self.waited_s

    def end(self, now: float) -> None:
        """The worker has to pause."""
        again = now - self.not_before < 4 * self.pause_s
        self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S) if again else PAUSE_S
        self.waited_s, self.not_before = 0.0, now + self.pause_s


def workers_of(plan: Plan) -> dict[Kind, list[list[int]]]:
    """The workers that have a part in each layer's attention and FFN."""
    owners = {Kind.ATTENTION: plan.query, Kind.FFN: plan.ffn}
    return {kind: [sorted(set(row.tolist()) - {0}) for row in table] for kind, table in owners.items()}


def _larger(owners: np.ndarray) -> float:
    own, *others = np.bincount(owners, minlength=2).tolist()
    return max(1.0, max(others) / max(1, own))


class WorkersGone(Exception):
    """Workers without whom the root cannot go on are gone; their work must be done by others, and the token again."""


class Crew:
    """`history`: keeps what attention workers that were away, or get other heads, must be sent; None: caches are filled with a text that is
    computed anew."""

    def __init__(self, plan: Plan, link: RootLink, history: AttentionInputs | None, outage_s: float, note: Callable[[str], None],
                 warn: Callable[[str], None]):  # fmt: skip
        self._link, self._outage_s, self._note, self._warn = link, outage_s, note, warn
        self._left_at: dict[int, float] = {}  # behind or away
        self._away: set[int] = set()
        self._lost: dict[int, str] = {}  # as the report has it
        self._patience = {rank: Patience() for rank in link.workers}
        self.history = history
        self.follow(plan)

    def follow(self, plan: Plan) -> None:
        """Who has which part is told by this plan from now on."""
        self._workers = workers_of(plan)
        self._larger = {
            Kind.ATTENTION: [_larger(row) for row in plan.query],
            Kind.FFN: [_larger(row) for row in plan.ffn],
        }
        if self.history:
            self.history.follow(self._workers[Kind.ATTENTION])

    def asked(self, kind: Kind, layer: int) -> tuple[list[int], list[int]]:
        """The workers that have a part in this sync, and those of them that are asked to do it."""
        workers = self._workers[kind][layer]
        return workers, [rank for rank in workers if rank not in self._away] if self._away else workers

    def deadline(self, rank: int, seq: int, own_done: float) -> float:
        """Until when to wait for the answer to request `seq`."""
        peer = self._link.peers[rank]
        return own_done if peer.suspect or seq not in peer.asked_at else peer.deadline.at(peer.asked_at[seq], own_done)

    def suspect(self, rank: int) -> None:
        self._link.peers[rank].suspect = True

    def overrun(self, workers: list[int]) -> set[int]:
        """Those of the workers that have as many requests before them as they may have."""
        return {rank for rank in workers if self._link.unanswered(rank) >= CREDIT}

    def silent(self, workers: set[int], now: float) -> set[int]:
        """Those of the workers that said nothing for so long that the root should do without them."""
        return {
            rank
            for rank in workers
            if now - self.waiting_since(rank) > self._outage_s + 2 * self._link.peers[rank].deadline.usual_s
        }

    def computing_s(self, rank: int, kind: Kind, layer: int, rows: int, own_s: float) -> float:
        """How long the worker may compute its part: by its last answer, else by the root's own time for its part, if it has one."""
        row_s = self._link.peers[rank].took_s.get(kind)
        known_s = own_s * self._larger[kind][layer] if row_s is None else row_s * rows
        return SLOWER * known_s if known_s else UNKNOWN_S

    def notice(self) -> set[int]:
        """Workers that are lost since the last call."""
        link, known = self._link, self._lost.keys()
        if not link.ended and not link.failures:
            return set()
        new = {rank: ("lost", "its process has ended") for rank in link.ended - known}
        new |= {rank: ("suspended", why) for rank, why in link.failures.items() if rank not in known and rank not in new}
        for rank, (state, why) in new.items():
            self._lost[rank] = state
            self._left_at.setdefault(rank, link.waiter.now())
            self._away.add(rank)
            link.excuse(rank)
            self._warn(f"rank {rank} is {state}: {why}")
        return set(new)

    def lost(self) -> set[int]:
        """Workers that do nothing any more in this run."""
        return set(self._lost)

    def gone(self, seconds: float = 0.0) -> set[int]:
        """Workers that are lost, and those the root has done without for so long and that were not heard since."""
        now, peers = self._link.waiter.now(), self._link.peers
        silent = {rank for rank, left_at in self._left_at.items() if peers[rank].heard_at <= left_at <= now - seconds}
        return silent | self.lost()

    def too_slow(self, workers: set[int], seconds: float, now: float) -> set[int]:
        """The root waited so long for these; those of them for whom it lately waited too long, and much longer than for most.

        Where all are alike, a pause helps nobody: without one worker the root can do even less without the others. Kernels before 6.15
        at 5 % loss: perplexity +740 % if all take turns to pause (bench/tradeoff.py).
        """
        waited = {rank: patience.wait(seconds if rank in workers else 0.0, now) for rank, patience in self._patience.items()}
        most = sorted(waited.values())[(len(waited) - 1) // 2]
        return {rank for rank in workers if waited[rank] > max(HELD_UP_S, FAR * most)}

    def far_behind(self) -> set[int]:
        """Workers whose answers take many times as long as most others' do; a device at a quarter of the speed is none."""
        mean = {rank: peer.deadline.mean_s for rank, peer in self._link.peers.items() if peer.deadline.mean_s}
        if len(mean) < 3:
            return set()
        others = sorted(mean.values())[(len(mean) - 1) // 2]
        limit = max(FAR * others, others + FAR_S)
        return {rank for rank, mean_s in mean.items() if mean_s > limit}

    def pause(self, rank: int) -> None:
        """The worker, whom the root does without, is too slow to be asked."""
        self._patience[rank].end(self._link.waiter.now())
        self._link.forget_latency(rank)
        self.stop_asking(rank, "holds everybody up")

    def done_without(self) -> set[int]:
        """The workers that are behind, away or lost."""
        return set(self._left_at)

    def all_at_work(self) -> bool:
        """Whether nobody is behind, away, or lost with work that nobody has taken over."""
        with_work = {rank for layers in self._workers.values() for ranks in layers for rank in ranks}
        return self._left_at.keys() <= self._lost.keys() - with_work

    def does_without(self, rank: int) -> bool:
        """Whether the worker is behind, away or lost."""
        return rank in self._left_at

    def away_for(self, seconds: float) -> set[int]:
        """The workers that are lost, and those that have been behind or away for so long."""
        now = self._link.waiter.now()
        return {rank for rank, left_at in self._left_at.items() if rank in self._lost or now - left_at >= seconds}

    def state(self, rank: int) -> str:
        """As the report has it."""
        return self._lost.get(rank, "suspended" if rank in self._left_at else "ok")

    def state_now(self, rank: int) -> str:
        """The same, and "suspect" for a worker that missed a deadline and was not heard since."""
        return "suspect" if self._link.peers[rank].suspect and rank not in self._left_at else self.state(rank)

    def leave(self, rank: int) -> None:
        """Wait for the worker no more."""
        self._left_at[rank] = self._link.waiter.now()
        self._link.excuse(rank)

    def stop_asking(self, rank: int, why: str = "is cut off", for_s: float = 0.0) -> None:
        """The worker is away, unless lost until it has received all that it was sent, and been sent all that it missed.

        `for_s`: so long nothing was heard of it already.
        """
        self._left_at.setdefault(rank, self._link.waiter.now() - for_s)
        self._away.add(rank)
        self._link.probe(rank)
        self._note(f"rank {rank} {why}: going on without it")

    def waiting_since(self, rank: int) -> float:
        """Since when the root knows nothing of a worker from which it wants something."""
        return max(self._link.peers[rank].heard_at, self._link.asked_since(rank))

    def begin_text(self, wait_for_all: bool) -> None:
        """A new text: nobody lacks anything of it. Whoever is gone stays so; but who is silent, if all are to be waited for."""
        for rank in self._left_at.keys() - (self.lost() if wait_for_all else self.gone()):
            self._link.judge(rank)
            del self._left_at[rank]
            self._away.discard(rank)

    def forget_text(self) -> None:
        """The caches are filled anew, from the text's first token on."""
        if self.history:
            self.history.begin_text()

    def sent_attention(self, layer: int, position: int, normed: np.ndarray, workers: list[int]) -> None:
        if self.history:
            self.history.keep(layer, position, normed, workers)

    def welcome_back(self, position: int, rows: int, layer: int, epoch: int, plan: int) -> None:
        """Before a layer's attention over so many rows from `position` on: who is heard again is present, after it was sent what it
        missed."""
        for rank in list(self._left_at):
            peer = self._link.peers[rank]
            if rank in self._lost or peer.heard_at <= self._left_at[rank]:
                continue
            if rank in self._away:
                if peer.kicks_in_flight or peer.replays or self._link.waiter.now() < self._patience[rank].not_before:
                    continue
                if self.history and not self.history.replay(self._link, rank, position, rows, layer, epoch, plan):
                    continue
                self._away.remove(rank)
                self._link.catch_up(rank)
                self._note(f"rank {rank} is back, with all that it missed")
            else:  # the root would have waited for it
                self._patience[rank].wait(peer.heard_at - self._left_at[rank], self._link.waiter.now())
            del self._left_at[rank]
            self._link.judge(rank)
