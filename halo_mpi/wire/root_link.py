"""The root's side of the star: requests to the workers, their answers as they come, kicks where they do not come."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from halo_mpi.wire.deadline import Deadline
from halo_mpi.wire.exchange import ENDED, SILENT_S, MissingError, Patience
from halo_mpi.wire.mailbox import Mailbox
from halo_mpi.wire.messages import BYTES, LONGEST_TOOK, PINGS, TOOK_S, Echo, Kind, ProtocolError, rows_text
from halo_mpi.wire.peer import Answer, Peer
from halo_mpi.wire.polling import Waiter

KICKS_BEFORE_BACKOFF = 4
KICKS_IN_FLIGHT = 16  # per worker: an outage must not pile them up
LONGEST_KICK_S = 0.064
TOUCH_S = 30.0  # between two messages that only tell that the root is there
ECHO_PATIENCE_S = 0.02  # before an echo is kicked
LAST_WORDS_S, UNHEARD_S = 10.0, 1.0  # so long the last words of a worker are waited for, and of one that is cut off
NOTHING = np.empty((0, 0), np.float32)
FEW_ROWS = 16  # whose answer takes about as long as that to one


class RootLink:
    """Requests to the workers and their answers.

    `kick_s`: while it waits the root sends a worker 16 bytes every so often; 0: never. TCP repairs a lost packet within
    about a round trip if later ones arrive, and after a timeout of 200 ms (as Linux has it) if none do.
    """

    def __init__(self, mailbox: Mailbox, workers: list[int], kick_s: float = 0.0, deadline_s: float | None = None,
                 waiter: Waiter | None = None):  # fmt: skip
        self._mailbox, self._kick_s, self._deadline_s = mailbox, kick_s, deadline_s
        self.waiter = waiter or Waiter()
        self.workers = workers
        self.peers = {rank: Peer(rank, Deadline(deadline_s)) for rank in workers}
        self.failures: dict[int, str] = {}  # workers that say, or show, that they cannot do their part, and why
        self.seq, self._touched_at = 0, 0.0
        self._looked_at = self.waiter.now()
        self._sums: deque[Answer] = deque()  # came while only scores were looked for
        self._scores: list[Answer] = []
        for rank in workers:
            self._ping(rank)

    @property
    def ranks(self) -> int:
        return len(self.workers) + 1

    @property
    def ended(self) -> set[int]:
        """Workers whose process has ended, as far as MPI tells."""
        return self._mailbox.ended

    @property
    def copies(self) -> dict[int, int]:
        """How often each worker is sent a small message."""
        return self._mailbox.copies

    @property
    def sent_bytes(self) -> dict[int, int]:
        return self._mailbox.sent_bytes

    @property
    def received_bytes(self) -> dict[int, int]:
        return self._mailbox.received_bytes

    def echo(self, x: np.ndarray | None, workers: list[int], work: Callable[[], None] | None = None, rows: int = 0,
             last: bool = False) -> list[float]:  # fmt: skip
        """Send x, f32 [1, width] or None, to these workers at once, to be sent back; after how many seconds each answer was there.

        `work`: what the root does meanwhile, and the workers something like it before they answer; `rows`: the answer has so many, in f32,
        instead of x; `last`: there are no more. Raises MissingError if somebody has ended, or is silent for long.
        """
        awaited = self.ask_echo(x, workers, lag=Echo.LAST if last else Echo.WORK if work else Echo.PLAIN, rows=rows)
        if work:
            work()
        came = self.hear_echoes(awaited, workers)
        return [came[rank][0] for rank in workers]

    def ask_echo(self, x: np.ndarray | None, workers: list[int], lag: Echo = Echo.PLAIN, rows: int = 0) -> dict[int, tuple[int, float]]:
        """Begin to send what is to be sent back; by worker, which answer is awaited, and since when."""
        begin = self.waiter.now()
        seq = self.ask(Kind.PING, 0, rows, x, workers, lag=lag)
        return dict.fromkeys(workers, (seq, begin))

    def hear_echoes(
        self, awaited: dict[int, tuple[int, float]], workers: Iterable[int], within_s: float = math.inf
    ) -> dict[int, tuple[float, float]]:
        """Wait for what these workers are to send back, but not longer than `within_s`: after how many seconds each answer was found, and
        for how many before that the root did not look.

        All that comes is told, others' too, and taken out of `awaited`. Raises MissingError if somebody has ended, or is silent for long.
        """
        begin, came, patience = self.waiter.now(), {}, Patience(SILENT_S, self.waiter)
        while awaited.keys() & workers and self.waiter.now() - begin < within_s:
            for answer in self.poll():
                seq, asked_at = awaited.get(answer.rank, (None, 0.0))
                if answer.seq == seq:
                    came[answer.rank] = self.waiter.now() - asked_at, answer.unseen_s
                    del awaited[answer.rank]
            if self.waiter.now() - begin > ECHO_PATIENCE_S:
                for rank in awaited:
                    self.kick(rank)
            if ended := awaited.keys() & self.ended:
                raise MissingError(ended, ENDED)
            if missing := awaited.keys() & workers:
                patience.wait(missing)
        return came

    def ask(self, kind: Kind, layer: int, position: int, x: np.ndarray | None, workers: list[int], epoch: int = 0,
            lag: int = 0, plan: int = 0, wire: str | None = None) -> int:  # fmt: skip
        """Start sending x, f32 [rows, width], to the workers; returns the request's seq."""
        self.seq += 1
        self._mailbox.post(workers, kind, self.seq, layer, position, x, epoch, lag, plan, wire)
        now = self.waiter.now()
        for rank in workers:
            peer = self.peers[rank]
            peer.asked_seq = self.seq
            peer.asked_at[self.seq] = now
            peer.kick_at = now + peer.deadline.usual_s + self._kick_s
        self.waiter.heard()
        return self.seq

    def replay(self, rank: int, kind: Kind, layer: int, position: int, x: np.ndarray, epoch: int, plan: int, wire: str) -> None:
        """Start sending inputs of attention, f32 [rows, width], of which the worker needs only K and V: a REPLAY, or a REFILL.

        It has the seq of the last request: were it counted, what is open with other workers would seem older than it is.
        """
        self.peers[rank].replays += 1
        self._mailbox.post([rank], kind, self.seq, layer, position, x, epoch, plan=plan, wire=wire)

    def announce(self, rank: int, plan: int, text: np.ndarray, epoch: int) -> None:
        """Start sending a worker what it will have under a plan, u8 [rows, width]."""
        self.peers[rank].prepared = None
        self._mailbox.post([rank], Kind.PLAN, self.seq, x=text, epoch=epoch, plan=plan, wire=BYTES)

    def probe_speed(self, rank: int) -> None:
        """Ask a worker that has nothing to do to compute something."""
        self.peers[rank].probed_at = self.waiter.now()
        self._mailbox.post([rank], Kind.PROBE, self.seq)

    def poll(self) -> Iterator[Answer]:
        """The answers that have come, one worker's in the order of its requests, but for scores."""
        while self._sums:
            yield self._sums.popleft()
        yield from self._arrived()

    def poll_scores(self) -> list[Answer]:
        """The answers to HEAD that have come, now or before."""
        self._sums.extend(self._arrived())
        scores, self._scores = self._scores, []
        return scores

    def _arrived(self) -> Iterator[Answer]:
        looked_at, self._looked_at = self._looked_at, self.waiter.now()
        for rank, message in self._mailbox.poll():
            peer, header = self.peers[rank], message.header
            kind, seq = int(header["kind"]), int(header["seq"])
            now = self.waiter.now()
            peer.heard_at, peer.suspect = now, False
            self.waiter.heard()
            peer.answered_seq = max(peer.answered_seq, seq)
            if kind == Kind.KICK:
                peer.kicks_in_flight = max(0, peer.kicks_in_flight - 1)
                self._forget(peer)
            elif kind in (Kind.REPLAY, Kind.REFILL):
                peer.replays -= 1
                peer.replayed_at = now
            elif kind == Kind.PLAN:
                peer.prepared = int(header["plan"])
                peer.refusal = rows_text(message.read()) if header["rows"] else ""
            elif kind == Kind.FAILURE:
                self.failures.setdefault(rank, rows_text(message.read()))
            elif kind == Kind.PROBE:
                latency_s = now - peer.probed_at - int(header["position"]) * TOOK_S  # as if it had computed only what it tells
                peer.probe = Answer(rank, seq, NOTHING, int(header["lag"]) * TOOK_S, latency_s, now - max(peer.probed_at, looked_at))
                peer.probed_at = None
            elif kind != Kind.TRAILER:
                if seq not in peer.asked_at:
                    if seq <= peer.settled_seq:
                        continue
                    raise ProtocolError(
                        f"rank {rank} answered request {seq}, which it was not asked or has answered; report this"
                    )
                y = message.read().copy() if header["rows"] else NOTHING
                if not math.isfinite(y.sum()):  # as quick as a look at 576 values can be
                    self.failures.setdefault(rank, "its partial sums are not finite; check its memory")
                    continue
                asked = peer.asked_at.pop(seq)
                if header["rows"] <= FEW_ROWS and kind not in (Kind.PING, Kind.HEAD) and seq >= peer.judged_from:
                    peer.deadline.observe(now - asked)
                self._forget(peer)
                took_s = int(header["lag"]) * TOOK_S if header["lag"] < LONGEST_TOOK else now - asked
                peer.took_s[kind] = took_s / max(1, len(y))
                answer = Answer(rank, seq, y, took_s, now - asked, now - max(asked, looked_at))
                if kind != Kind.HEAD:
                    yield answer
                else:
                    self._scores.append(answer)

    def kick(self, rank: int) -> None:
        """Send the worker a kick if one is due."""
        peer, now = self.peers[rank], self.waiter.now()
        if not self._kick_s or now < peer.kick_at or peer.kicks_in_flight >= KICKS_IN_FLIGHT:
            return
        self.probe(rank)
        backoff = max(0, peer.kicks_in_flight - KICKS_BEFORE_BACKOFF)
        peer.kick_at = now + min(self._kick_s * 2**backoff, max(LONGEST_KICK_S, self._kick_s))

    def unanswered(self, rank: int) -> int:
        """How many syncs ago the last request was asked that the worker has taken in, counted up to its last one."""
        return self.peers[rank].asked_seq - self.peers[rank].answered_seq

    def asked_since(self, rank: int) -> float:
        """When the oldest request was asked that the worker has not done, as far as is known; now if it has done all."""
        return next(iter(self.peers[rank].asked_at.values()), self.waiter.now())

    def catch_up(self, rank: int) -> None:
        """The worker was sent all that it missed: nothing is expected of what it was asked before, though it may not have done it yet."""
        peer = self.peers[rank]
        peer.answered_seq = peer.settled_seq = self.seq
        self._forget(peer)

    def excuse(self, rank: int) -> None:
        """Learn nothing from the worker's answers until `judge`: after a stall many come late, though nothing is wrong any more."""
        self.peers[rank].judged_from = sys.maxsize

    def judge(self, rank: int) -> None:
        """Learn again from its answers, to what it is asked from now on."""
        self.peers[rank].judged_from = self.seq + 1

    def forget_latency(self, rank: int) -> None:
        """Learn anew how long the worker's answers take."""
        self.peers[rank].deadline = Deadline(self._deadline_s)

    def probe(self, rank: int) -> None:
        """Send a kick whose answer will tell that the worker has taken in everything sent before."""
        self._mailbox.post([rank], Kind.KICK, self.seq)
        if not self.peers[rank].kicks_in_flight:
            self.peers[rank].probed_since = self.waiter.now()
        self.peers[rank].kicks_in_flight += 1

    def unheard(self, seconds: float) -> set[int]:
        """Workers that said nothing for so long, perhaps since they were not asked."""
        now = self.waiter.now()
        return {rank for rank, peer in self.peers.items() if now - peer.heard_at > seconds}

    def touch(self) -> None:
        """Let everybody hear something now and then, who has nothing to do too: that the root is there."""
        now = self.waiter.now()
        if now - self._touched_at > TOUCH_S:
            self._touched_at = now
            for rank in self.workers:
                self._mailbox.post([rank], Kind.TRAILER, self.seq)

    def stop(self, unheard: set[int], alone: bool = False) -> dict[int, str]:
        """Tell all workers to leave their request loop, and let go of MPI's requests; the last words of those who answered, by rank.

        `unheard`: for these nobody waits long. `alone`: the ranks part without MPI's own end even if all are there.
        """
        self._mailbox.post(self.workers, Kind.STOP, self.seq + 1)
        words = self._last_words(set(self.workers), unheard)
        alone = alone or len(words) < len(self.workers)
        self._mailbox.post(list(words), Kind.STOP, self.seq + 2, lag=int(alone))
        self._last_words(set(words), set(), kicks=False)  # nothing is under way any more, for a run that may follow
        self._mailbox.close()
        return words

    def _last_words(self, workers: set[int], unheard: set[int], kicks: bool = True) -> dict[int, str]:
        words, begin = {}, self.waiter.now()
        while missing := workers - words.keys() - self._mailbox.ended:
            over_s = self.waiter.now() - begin
            if over_s > LAST_WORDS_S or over_s > UNHEARD_S and unheard >= missing:
                break
            for rank in missing if kicks else ():
                self.kick(rank)
            for rank, message in self._mailbox.poll():
                if message.header["kind"] == Kind.STOP:
                    words[rank] = rows_text(message.read()) if message.header["rows"] else ""
                elif message.header["kind"] == Kind.KICK:
                    self.peers[rank].kicks_in_flight = max(0, self.peers[rank].kicks_in_flight - 1)
            self.waiter.wait()
        return words

    def _forget(self, peer: Peer) -> None:
        """Requests before the last answered one were skipped: their answers never come."""
        while peer.asked_at and (oldest := next(iter(peer.asked_at))) <= peer.answered_seq:
            del peer.asked_at[oldest]

    def _ping(self, rank: int) -> None:
        times_ms = [self.echo(None, [rank])[0] * 1e3 for _ in range(PINGS)]
        self.peers[rank].rtt_ms = round(float(np.median(times_ms)), 3)
