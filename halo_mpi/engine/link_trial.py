"""What the links between the root and the workers can do, measured at start-up, in some tenths of a second however bad they are.

alone       each worker sends back what it is sent
together    all do, again and again, and more often if somebody seems unstable; who is late is not waited for, and asked again once it
            has answered
long        those with stable links answer with many vectors
busy        those with stable links compute before they answer, as in the token loop

Late is what was late when the root had looked last before it found it: it may have been away from its core since.
"""

from collections.abc import Callable, Sequence

import numpy as np

from halo_mpi.schedule.advice import LATE_RATE
from halo_mpi.schedule.head import MOST_VECTORS
from halo_mpi.schedule.telemetry import LATE, LATE_MS
from halo_mpi.wire.root_link import RootLink

ALONE, TOGETHER, BUSY = 6, 32, 32  # echoes of each link, rounds of all links at once, and rounds in which all compute
MORE_TOGETHER = 4 * TOGETHER  # if somebody seems unstable: the first may all lie in one moment in which a busy machine stood still
LEAST_BUSY = 3  # of the last, however long they take
ALONE_S, TOGETHER_S, LONG_S, BUSY_S = 0.1, 0.6, 0.2, 0.5  # no more are begun after so long: of one worker, of all of them
LONG_BYTES, LONG_ALONE, LONG_TOGETHER = 48 * 2**10, 3, 5  # long answers of each link, and of all links at once
LEAST_LATE = 3  # answers; fewer are the hiccups of a busy machine
AWAY_MS = 2.0  # without a look; an answer that is found then may have come at any time of it
UNDISTURBED = 25  # percentile of an answer's times, of which a link that loses many packets shows what it takes without


class LinkTrial:
    """`links`: link_ms, late_rate, late_ms and kb_ms of each worker, fields of its Device; `stable`: workers whose answers are seldom
    late, or all if there is none; `further_ms`: what each worker beyond the first adds to a sync; `kb_ms`: each KB of long answers from
    all stable ones at once, None if nobody's link is stable.

    Raises MissingError if somebody has ended, or is silent for long.
    """

    def __init__(self, link: RootLink, width: int):
        self._link, self._x = link, np.full((1, width), 0.5, np.float32)
        self._open: dict[int, tuple[int, float]] = {}  # what is awaited of workers that have not answered yet
        self._times_ms: dict[int, list[float]] = {rank: [] for rank in link.workers}
        self._unseen_ms: dict[int, list[float]] = {rank: [] for rank in link.workers}  # of these, before the answer was found
        alone = self._alone()
        rounds = self._together(alone)
        self.links = {rank: self._judged(rank, alone[rank]) for rank in link.workers}
        stable = [rank for rank, own in self.links.items() if own["late_rate"] < LATE_RATE]
        self.stable = stable or link.workers
        slowest_ms = self._slowest_ms(rounds)
        longest_ms = max(self.links[rank]["link_ms"] for rank in self.stable)
        self.further_ms = max(0.0, slowest_ms - longest_ms) / max(1, len(self.stable) - 1)
        self.kb_ms = self._kb_ms(slowest_ms) if stable else None

    def busy_ms(self, work: Callable[[], None], shares_ms: Sequence[Sequence[float]]) -> float:
        """How much longer syncs take in which all compute than the longest share: who computes hears and answers later.

        `shares_ms`: of each rank, what its computing takes every other time.
        """
        over, until = [], self._link.waiter.now() + BUSY_S
        while len(over) < BUSY and (len(over) < LEAST_BUSY or self._link.waiter.now() < until):
            begin, number = self._link.waiter.now(), len(over) % 2
            self._link.echo(self._x, self.stable, work)
            shares = [shares_ms[rank][number] + self.links[rank]["link_ms"] for rank in self.stable]
            over.append((self._link.waiter.now() - begin) * 1e3 - max(*shares, shares_ms[0][number]))
        return float(np.median(over))

    def end(self) -> None:
        """Let the workers know that this was all."""
        self._link.echo(None, self._link.workers, last=True)

    def _alone(self) -> dict[int, list[float]]:
        """The times of each worker's answers, one worker after the other; of those that were seen coming, if there are such."""
        for rank in self._link.workers:
            asked, until = 0, self._link.waiter.now() + ALONE_S
            while asked < ALONE and (left_s := until - self._link.waiter.now()) > 0:
                asked += len(self._round([rank], left_s * 1e3))
        return {rank: self._seen(rank).tolist() or list(self._times_ms[rank]) for rank in self._link.workers}

    def _seen(self, rank: int) -> np.ndarray:
        """The times, ms, of answers before which the root was not away."""
        return np.array(self._times_ms[rank])[np.array(self._unseen_ms[rank]) <= AWAY_MS]

    def _together(self, alone: dict[int, list[float]]) -> list[dict[int, float]]:
        """The times of the answers that came before the next round, by worker and round. `alone`: what they take one by one."""
        rounds, until = [], self._link.waiter.now() + TOGETHER_S
        for rank in self._link.workers:
            self._times_ms[rank], self._unseen_ms[rank] = [], []
        for number in (TOGETHER, MORE_TOGETHER):
            while self._link.waiter.now() < until and min(map(len, self._times_ms.values())) < number:
                least_ms = max(min(alone[rank] + own, default=0.0) for rank, own in self._times_ms.items())
                rounds.append(self._round(self._link.workers, LATE * least_ms + LATE_MS))
            if not any(self._judged(rank, own)["late_rate"] >= LATE_RATE for rank, own in alone.items()):
                break
        return rounds

    def _round(self, workers: list[int], patience_ms: float) -> dict[int, float]:
        """Ask those that have answered everything; ms of those that answer in time. Whatever comes is noted."""
        asked = [rank for rank in workers if rank not in self._open]
        if asked:
            self._open |= self._link.ask_echo(self._x, asked)
        came = self._link.hear_echoes(self._open, asked or list(self._open), patience_ms / 1e3)
        for rank, (seconds, unseen_s) in came.items():
            self._times_ms[rank].append(seconds * 1e3)
            self._unseen_ms[rank].append(unseen_s * 1e3)
        return {rank: came[rank][0] * 1e3 for rank in asked if rank in came}

    def _judged(self, rank: int, alone_ms: list[float]) -> dict[str, float | None]:
        """Fields of a Device: what the link takes while nothing is lost, how often answers were late, and by how much."""
        times = np.array(self._times_ms[rank] or alone_ms or [ALONE_S * 1e3])
        unseen = np.array(self._unseen_ms[rank] or [0.0] * len(times))
        seen = self._seen(rank)
        usual = float(np.percentile(seen if len(seen) else times, UNDISTURBED))
        late = times[times - unseen > LATE * usual + LATE_MS]
        known = len(late) >= LEAST_LATE
        in_time = [ms for ms in alone_ms if ms <= LATE * usual + LATE_MS]
        return {
            "link_ms": float(np.median(in_time)) if in_time else usual,
            "late_rate": len(late) / len(times) if known else 0.0,
            "late_ms": float(late.mean()) - usual if known else 0.0,
            "kb_ms": None,
        }

    def _slowest_ms(self, rounds: list[dict[int, float]]) -> float:
        """What a round takes in which all stable workers answer in time."""
        whole = [max(own[rank] for rank in self.stable) for own in rounds if own.keys() >= set(self.stable)]
        return float(np.median(whole)) if whole else max(self.links[rank]["link_ms"] for rank in self.stable)

    def _kb_ms(self, together_ms: float) -> float:
        """What each KB of long answers takes from all stable workers at once; adds each one's own. `together_ms`: of short ones."""
        rows = min(MOST_VECTORS, max(1, LONG_BYTES // (4 * self._x.size)))
        kb = 4 * rows * self._x.size / 1e3
        for rank in self.stable:
            long_ms = self._long_ms([rank], rows, LONG_ALONE)
            self.links[rank]["kb_ms"] = max(0.0, long_ms - self.links[rank]["link_ms"]) / kb
        return max(0.0, self._long_ms(self.stable, rows, LONG_TOGETHER) - together_ms) / (kb * len(self.stable))

    def _long_ms(self, workers: list[int], rows: int, times: int) -> float:
        """The median of so many long answers from these at once, or of fewer if they take very long."""
        taken, until = [], self._link.waiter.now() + LONG_S
        while len(taken) < times and (not taken or self._link.waiter.now() < until):
            taken.append(max(self._link.echo(self._x, workers, rows=rows)) * 1e3)
        return float(np.median(taken))
