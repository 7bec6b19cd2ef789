"""The root's token loop: one token is a chain of syncs, two per layer.

Strict, every sync waits for all partial sums. Relaxed, the root goes on past a late one with an estimate in its place and adds
the difference when it comes; what must be exact (prefill, the first token, the first and the last layer, and parts that calibration
says are costly) waits all the same, but for workers that are cut off. Where a worker is gone that cannot be done without, others take its
work over, and the token is computed again.
"""

import time
from collections.abc import Callable

import numpy as np

from halo_mpi.engine.check import Check
from halo_mpi.engine.crew import UNKNOWN_S, Crew, WorkersGone
from halo_mpi.engine.doing_without import DoingWithout
from halo_mpi.engine.held_text import HeldText
from halo_mpi.engine.history import AttentionInputs
from halo_mpi.engine.holdings import Holdings
from halo_mpi.engine.late_sums import LateSums
from halo_mpi.engine.ledger import Ledger
from halo_mpi.engine.marks import Marks
from halo_mpi.engine.mover import Mover
from halo_mpi.engine.open_sums import OpenSums
from halo_mpi.engine.options import SyncOptions
from halo_mpi.engine.predictor import Predictor
from halo_mpi.engine.replacer import Replacer
from halo_mpi.engine.rescue import Rescue, Vigil
from halo_mpi.engine.vocabulary import Vocabulary
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.norms import Norms
from halo_mpi.predict.fits import SINKS
from halo_mpi.schedule.devices import AT_FIRST
from halo_mpi.schedule.placement import Plan
from halo_mpi.wire.messages import EPOCHS, Kind
from halo_mpi.wire.root_link import Answer, RootLink

PREFILL_ROWS = 64  # tokens per prefill request; 147 KiB at hidden 576 in f32


class Root:
    """Computes the model's logits with the workers' help. Strict: a token is the same whatever the network does, but for
    the rounding of other sums when work moves.

    The text is one sequence of at most `context` tokens; positions must be computed in order, and position 0 begins a new text.
    `note` is told when a worker is left behind or comes back, and when work moves, `warn` when one is lost. `keeps`: the
    inputs of attention, for workers that were away or get other heads; not without workers.
    """

    def __init__(self, config: ModelConfig, norms: Norms, vocabulary: Vocabulary, holdings: Holdings, plan: Plan, link: RootLink,
                 marks: Marks, sync: SyncOptions, context: int, note: Callable[[str], None], warn: Callable[[str], None],
                 predictor: Predictor, keeps: bool = False):  # fmt: skip
        self._config, self._norms, self._holdings, self._link, self._marks = config, norms, holdings, link, marks
        self._relaxed = sync.mode == "relaxed"
        self._drops = self._relaxed and sync.late == "drop"
        self.ledger = Ledger()
        self._sums = OpenSums(sync.max_lag, sync.quality, 2 * config.layers, self.ledger)
        history = AttentionInputs(config.layers, context, config.hidden, link.ranks, sync.wire) if keeps else None
        self.crew = Crew(plan, link, history, sync.outage_ms / 1e3, note, warn)
        self.mover = Mover(config, plan, holdings, self.crew, link, predictor, note)
        self.replacer: Replacer | None = None
        self.rescue: Rescue | None = None
        self.predictor, self._vocabulary = predictor, vocabulary
        self._check = Check() if sync.check else None
        self._without = DoingWithout(self.crew, self._sums, predictor, config.layers, self._relaxed, self._drops, self._check)
        self._late = LateSums(self._sums, predictor, self.crew, self.ledger, self._drops, self._check)
        self._epoch, self._text, self._whole = 0, HeldText(), True  # whole: the caches hold the text so far
        self.compute_s, self.computed_tokens = 0.0, 0  # own share and head

    @property
    def on_lossy_links(self) -> bool:
        """Whether somebody's small messages are sent more often than usual."""
        return max(self._link.copies.values(), default=0) > AT_FIRST

    def held(self, tokens: list[int]) -> int:
        """How many of a new text's first tokens need not be computed, since the caches hold them; not the last."""
        at_home = self.mover.idle and self.crew.all_at_work() and (self.rescue is None or self.rescue.settled)
        return self._text.shared(tokens[:-1]) if at_home else 0

    def prefill(self, tokens: list[int], held: int = 0) -> np.ndarray:
        """Compute a new text's first tokens, but for the `held`, in chunks; logits f32 [V] after the last, valid until the next call."""
        if held:
            self.predictor.begin_text()
        for start in range(held, len(tokens), PREFILL_ROWS):
            x = self._compute(tokens[start : start + PREFILL_ROWS], start, decoding=False)
        return self._logits(x[-1:])[0]

    def step(self, token: int, position: int) -> np.ndarray:
        """Compute one token at `position`; logits f32 [V] for the next, valid until the next call."""
        return self.steps([token], position)[0]

    def steps(self, tokens: list[int], position: int) -> np.ndarray:
        """Compute the token at `position` and, strict only, guesses of those after it; logits f32 [T, V] after each.

        They are valid until the next call. What was computed from `position` on before, of guesses that were wrong, is forgotten.
        """
        return self._logits(self._compute(tokens, position, decoding=True))

    def _compute(self, tokens: list[int], position: int, decoding: bool) -> np.ndarray:
        """The last residual vectors [T, D] of the tokens, whoever is lost meanwhile."""
        if position == 0:
            self.crew.begin_text(wait_for_all=not (self.rescue and self.rescue.silent_s))
        self._text.compute(tokens, position, exact=not (self._relaxed and (decoding or self.crew.done_without())))
        self._link.touch()
        while True:
            try:
                self.crew.notice()
                if self.rescue:
                    self._rescue(position, decoding)
                return self._forward(tokens, position, decoding)
            except WorkersGone:
                self._late.abandon()

    def _rescue(self, position: int, decoding: bool) -> None:
        """Let others do the work of those that the root cannot do without; in relaxed mode the replacer may see to it later."""
        rescue, replaces = self.rescue, self.replacer is not None and self.mover.may_move
        gone = self._without.unaffordable(rescue.silent_s, replaces) if self._relaxed and decoding else self.crew.done_without()
        if rescue.with_work(gone):
            self._whole &= rescue.take_over(position, self._epoch)
        elif not self.mover.idle:
            rescue.mind_the_move()
        elif not self.replacer:
            rescue.before_token(position, self._epoch)
        if not self._whole:
            for start in range(0, position, PREFILL_ROWS):
                self._forward(self._text.tokens[start : min(start + PREFILL_ROWS, position)], start, decoding=False)
            self._whole = True

    def _forward(self, tokens: list[int], position: int, decoding: bool) -> np.ndarray:
        norms = self._norms
        if position == 0:
            self._epoch = (self._epoch + 1) % EPOCHS
            self.crew.forget_text()
            self.predictor.begin_text()
        if self.replacer and decoding:
            self.replacer.before_token()
        if decoding or position == 0:
            self.mover.before_token(position, self._epoch)
        self._sums.begin_token()
        x = self._vocabulary.embed(tokens)  # [T, D]
        if self._check:
            self._check.begin(x)
        for layer in range(self._config.layers):
            x = self._sync(Kind.ATTENTION, layer, position, x, norms.attention, norms.o_bias, decoding)
            x = self._sync(Kind.FFN, layer, position, x, norms.ffn, norms.down_bias, decoding)
        x = self._settle(x)
        if decoding:
            self._sums.end_token()
        if self._check:
            self._check.end(x, self.ledger)
        self.computed_tokens += len(tokens)
        return x

    def _sync(self, kind: Kind, layer: int, position: int, x: np.ndarray, norms: np.ndarray, bias: np.ndarray | None,
              decoding: bool) -> np.ndarray:  # fmt: skip
        """One sync: the residual vectors x [T, D] plus the partial sums of all ranks, added in rank order."""
        begin = time.perf_counter()
        normed = self._holdings.kernel.norm(x, norms[layer], self._config.norm_eps)
        self._sums.next_sync()
        at = self._without.at = 2 * layer + (kind == Kind.FFN)
        if decoding:
            if self._relaxed:
                self._without.stop_asking(kind, layer)
            if kind == Kind.ATTENTION:
                self.crew.welcome_back(position, len(x), layer, self._epoch, self.mover.number)
        workers, asked = self.crew.asked(kind, layer)
        seq = self._ask(kind, layer, position, normed, asked)
        if bias is not None:
            x = self._add(x, bias[layer])
        took_s = 0.0
        if even_share := self._holdings.even_share(kind, layer):
            self._holdings.need(at)
            start, share = time.perf_counter(), self._holdings.share
            own = share.attention(layer, normed, position) if kind == Kind.ATTENTION else share.ffn(layer, normed)
            self._marks.pace(start, even_share, len(x))
            took_s = time.perf_counter() - start
            self.compute_s += took_s
            if self.replacer and decoding:
                self.replacer.computed(0, kind, layer, took_s, len(x))
            x = self._add(x, own)
        if self._relaxed and decoding:
            self.predictor.look_ahead(kind, layer, normed)
        if decoding:
            for rank in workers:
                self.ledger.ask(rank)
        exact = not decoding or position < SINKS or self._without.must_be_exact(layer, asked)
        answers, late = self._collect(
            seq, kind, layer, asked, exact, decoding, lambda rank: self.crew.computing_s(rank, kind, layer, len(x), took_s)
        )
        for rank in workers:
            if decoding and (rank in late or rank not in answers):
                self.ledger.missed_deadline(rank)
            if rank in answers:
                if self._relaxed:
                    self.predictor.observe((kind, layer, rank), position + len(normed) - 1, normed, answers[rank])
                x = self._add(x, answers[rank])
            else:
                x = x + self._late.stand_in(seq, (kind, layer, rank), position, normed)
        x = self._late.correct(x)
        if decoding:
            self.ledger.sync_ms.append((time.perf_counter() - begin) * 1e3)
        return x

    def _ask(self, kind: Kind, layer: int, position: int, normed: np.ndarray, workers: list[int]) -> int:
        link, seq = self._link, self._link.seq + 1
        if workers:
            link.ask(kind, layer, position, normed, workers, self._epoch, seq - self._sums.oldest(seq), self.mover.number)
        if kind == Kind.ATTENTION:
            self.crew.sent_attention(layer, position, normed, workers)
        return seq

    def _collect(self, seq: int, kind: Kind, layer: int, workers: list[int], exact: bool, counting: bool,
                 patience_s: Callable[[int], float]) -> tuple[dict[int, np.ndarray], set[int]]:  # fmt: skip
        """The answers, f32 [T, D] by worker: all, or those in time where the root may go on without the others; and who was late."""
        link, ledger, crew = self._link, self.ledger, self.crew
        if not link.workers:
            return {}, set()
        missing, late, answers = {rank for rank in workers if not crew.does_without(rank)}, set(), {}
        own_done = link.waiter.now()
        vigil = Vigil(own_done)
        while True:
            for answer in link.poll():
                if answer.seq == seq:
                    missing.discard(answer.rank)
                    answers[answer.rank] = answer.y
                    if counting and answer.rank in late:
                        ledger.waited += 1
                    elif counting:
                        ledger.on_time += 1
                    if counting and self.replacer:
                        self.replacer.answered(answer, kind, layer, vigil.looked_at > own_done, answer.unseen_s)
                else:
                    self._take_late(answer)
            overdue = self._sums.overdue()
            if not missing and not overdue:
                return answers, late
            now = link.waiter.now()
            passed_s = vigil.look(now)
            for rank in missing | overdue:
                if rank in missing and rank not in late and now > crew.deadline(rank, seq, own_done):
                    late.add(rank)
                    crew.suspect(rank)
                link.kick(rank)
            if not exact and missing <= late and not overdue and self._without.affords(kind, layer, missing):
                return answers, late
            if counting:
                missing -= self._without.leave_behind(crew.silent(missing | overdue, now))
                missing -= self._without.pause(crew.too_slow(missing & late | overdue, passed_s, now))
            missing -= self._look_who_is_gone(missing | overdue, counting, vigil.since, patience_s)
            link.waiter.wait()

    def _look_who_is_gone(
        self, waited_for: set[int], decoding: bool, since: float, patience_s: Callable[[int], float]
    ) -> set[int]:
        """Workers that are waited for no more, since they are gone and can be done without.

        Raises WorkersGone if somebody else must do a worker's part: it is lost, or silent `since` then for longer than it may
        compute, `patience_s` of the worker, and --takeover-ms.
        """
        self._link.touch()
        if self.rescue:
            self.rescue.look(waited_for, since, patience_s)
        lost = self.crew.notice()
        if not lost:
            return lost
        behind = self._without.leave_behind(lost) if decoding and self.replacer else set()
        if self.rescue and self.rescue.with_work(lost - behind):
            raise WorkersGone
        return behind

    def _take_late(self, answer: Answer) -> None:
        """A partial sum of an earlier sync came."""
        entry = self._late.take(answer)
        if entry and self.replacer:
            self.replacer.answered(answer, entry.kind, entry.layer, waited_for=True)

    def _settle(self, x: np.ndarray) -> np.ndarray:
        """Wait for everything that is open; what cannot come is final as estimated."""
        link, self._without.at = self._link, 2 * self._config.layers
        if not self._sums:
            return x
        vigil = Vigil(link.waiter.now())
        while True:
            for answer in link.poll():
                self._take_late(answer)
            if not self._sums:
                return self._late.correct(x)
            now, late = link.waiter.now(), self._sums.ranks()
            for rank in late:
                link.kick(rank)
            self._without.leave_behind(self.crew.silent(late, now))
            self._without.pause(self.crew.too_slow(late, vigil.look(now), now))
            self._look_who_is_gone(late, True, vigil.since, lambda rank: UNKNOWN_S)
            link.waiter.wait()

    def _add(self, x: np.ndarray, term: np.ndarray) -> np.ndarray:
        if self._check:
            self._check.add(term)
        return x + term

    def _logits(self, x: np.ndarray) -> np.ndarray:
        start = time.perf_counter()
        logits = self._vocabulary.logits(self._holdings.kernel.norm(x, self._norms.final, self._config.norm_eps))
        self.compute_s += time.perf_counter() - start
        return logits
