"""Moves heads and groups to other ranks while text flows: a few layers at a time, and each time for all ranks at once.

    announce --> every worker loads what it will have of these layers, and says so; it serves what it has meanwhile
             --> the caches of heads that are new somewhere are filled, a portion before each token
             --> before a token the plan's number goes up: all requests from then on are of the new plan
    and again, until all layers are as they should be

A step is small, so that it takes little memory (what a rank has of these layers, a second time) and no token waits for it. Whoever is
away loses what it loses without being asked; nobody gets anything who is away.
"""

import json
import time
from collections.abc import Callable

import numpy as np

from halo_mpi.engine.crew import Crew
from halo_mpi.engine.holdings import Holdings, new_kv_heads
from halo_mpi.engine.predictor import Predictor
from halo_mpi.errors import HaloError
from halo_mpi.model.config import ModelConfig
from halo_mpi.schedule.placement import Change, Plan, changed_keys
from halo_mpi.wire.messages import PLANS, TEXT_ROWS, rows_text, text_rows
from halo_mpi.wire.peer import Peer
from halo_mpi.wire.root_link import RootLink

STEP_BYTES = 48 * 2**20  # of matrices and cache that a rank holds twice, at most, if one layer's are not more
PORTION_BYTES, MOST_BYTES = 32 * 2**10, 2 * 2**20  # of attention inputs, before a token
FIRST_BYTES = 128 * 2**10
AT_ONCE_BYTES = 8 * 2**20  # the same, while everybody waits for them
SHORT, LONG = 0.1, 0.3  # of a token's time that a portion may take: below it grows, above it shrinks
FASTER = 4  # rows, at least, for each that a token adds
ENTRY_BYTES = 4  # of what a worker is told, for a head or group; and as much for what is around them


def to_rows(plan: int, changes: dict[int, Change], width: int) -> np.ndarray:
    """The number of the plan in force, and what a worker will have otherwise under the next one, as u8 [rows, width]."""
    layers = {layer: [own.heads, own.groups] for layer, own in changes.items()}
    return text_rows(json.dumps({"plan": plan, "layers": layers}, separators=(",", ":")), width)


def from_rows(rows: np.ndarray) -> tuple[int, dict[int, Change]]:
    """The same again."""
    told = json.loads(rows_text(rows))
    return told["plan"], {int(layer): Change(*own) for layer, own in told["layers"].items()}


class Refused(HaloError):
    """A rank cannot load what it was to have."""

    def __init__(self, rank: int, why: str, exit_code: int = HaloError.exit_code):
        super().__init__(f"rank {rank}: {why}" if rank else why)
        self.rank, self.exit_code = rank, exit_code


class Mover:
    """`plan` is in force, under `number`; `aim_at` another one, and it will be after a number of tokens.

    `note` is told what happens.
    """

    def __init__(self, config: ModelConfig, plan: Plan, holdings: Holdings, crew: Crew, link: RootLink, predictor: Predictor,
                 note: Callable[[str], None]):  # fmt: skip
        self._config, self._holdings, self._crew, self._link, self._predictor = config, holdings, crew, link, predictor
        self._note = note
        self.plan, self.number = plan, 0
        self._told = 0  # the last number that was announced
        self._epoch = 0
        self._aim: Plan | None = None
        self._next: Plan | None = None  # of which the step under way is told
        self._refilled: dict[tuple[int, int], int] = {}  # rows, by (rank, layer), of caches that are being filled
        self._portion, self._sent_at, self._own_s = FIRST_BYTES, 0.0, 0.0  # when it was sent, what the root took for its own
        self.may_move = True
        self._text_bytes = ENTRY_BYTES * (config.heads + config.groups + 4)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return self._aim is None

    def aim_at(self, plan: Plan, room: int | None = None) -> None:
        """Make this the plan, from the next token on. `room`: bytes that every rank has left."""
        self._aim, self._step_bytes = plan, STEP_BYTES if room is None else min(STEP_BYTES, room)

    def before_token(self, position: int, epoch: int) -> None:
        """Do what can be done before the token at `position`, 0 if it is a text's first."""
        if self._aim is None:
            return
        self._epoch = epoch
        try:
            self._go_on(position)
        except Refused as error:
            self._give_up(str(error), for_good=True)

    def _go_on(self, position: int) -> None:
        if self._next is None:
            self._announce(self._step())
            return
        if position == 0:
            self._refilled = dict.fromkeys(self._refilled, 0)
        prepared = self._is_prepared()
        away = [rank for rank in self._gainers if rank and self._crew.does_without(rank)]
        if away:
            self._give_up(f"rank {away[0]} does not answer")
        elif prepared and self._refill(position):
            self._switch()
            if self._aim is not None:
                self._announce(self._step())

    def begin_at_once(self, plan: Plan, epoch: int) -> None:
        """Make this the plan before anything else is computed: to be gone on with until done. Raises Refused."""
        self._aim, self._step_bytes, self._epoch = plan, STEP_BYTES, epoch
        self._announce(self._step())

    def go_on_at_once(self, position: int) -> set[int]:
        """The same, between two looks at the messages; the ranks that are waited for, none if it is done. Raises Refused.

        Without attention inputs that were kept, the new caches stay empty.
        """
        while self._is_prepared() and (self._crew.history is None or self._refill_at_once(position)):
            self._switch()
            if self._aim is None:
                return set()
            self._announce(self._step())
        return {rank for rank in self._changing if rank and not self._crew.does_without(rank)}

    def awaited(self) -> set[int]:
        """Workers that have not loaded their next part yet, or are filling caches."""
        if self._next is None:
            return set()
        peers = {rank: self._link.peers[rank] for rank in self._changing if rank and not self._crew.does_without(rank)}
        return {rank for rank, peer in peers.items() if peer.prepared != self._told or peer.replays}

    def forget(self) -> None:
        """Stay with the plan that is in force; let everybody forget what it was told."""
        self._announce(self.plan)
        self._aim = self._next = None

    def _step(self) -> Plan:
        """The plan in force, with the next layers of what it shall be."""
        query, ffn, layers = self.plan.query.copy(), self.plan.ffn.copy(), 0
        held, context = np.zeros(self._link.ranks, int), self._holdings.share.context
        own = [(self._aim.query_heads(rank), self._aim.groups(rank)) for rank in range(self._link.ranks)]
        for layer in np.flatnonzero((query != self._aim.query).any(1) | (ffn != self._aim.ffn).any(1)).tolist():
            held += [self._holdings.sizes.layer_bytes(heads[layer], groups[layer], context) for heads, groups in own]
            if layers and (held.max() > self._step_bytes or (layers + 1) * self._text_bytes > TEXT_ROWS * self._config.hidden):
                break
            query[layer], ffn[layer], layers = self._aim.query[layer], self._aim.ffn[layer], layers + 1
        return Plan(self._aim.name, query, ffn, self._aim.gathered)

    def _announce(self, plan: Plan) -> None:
        """Tell everybody what comes next."""
        changes = {rank: self.plan.changes(plan, rank) for rank in range(self._link.ranks)}
        self._next, self._told = plan, (self._told + 1) % PLANS
        if self._told == self.number:
            self._told = (self._told + 1) % PLANS
        self._changing, self._gainers, self._refilled = {rank for rank in changes if changes[rank]}, set(), {}
        for rank in self._changing:
            heads, groups = self.plan.query_heads(rank), self.plan.groups(rank)
            for layer, own in changes[rank].items():
                if set(own.heads) - set(heads[layer]) or set(own.groups) - set(groups[layer]):
                    self._gainers.add(rank)
                if new_kv_heads(self._config.heads_per_kv, heads[layer], own.heads):
                    self._refilled[rank, layer] = 0
        for rank in self._link.workers:
            self._link.announce(rank, self._told, to_rows(self.number, changes[rank], self._config.hidden), self._epoch)
        try:
            self._holdings.prepare(self._told, changes[0], lambda: self._predictor.load(plan))
        except HaloError as error:
            raise Refused(0, str(error), error.exit_code) from error

    def _is_prepared(self) -> bool:
        """Whether everybody who is there has loaded what changes. Raises Refused if somebody cannot."""
        try:
            if not self._holdings.is_prepared(self._told):
                return False
        except HaloError as error:
            raise Refused(0, str(error), error.exit_code) from error
        for rank in self._changing - {0}:
            peer = self._link.peers[rank]
            if self._crew.does_without(rank):
                continue
            if peer.prepared == self._told and peer.refusal:
                raise Refused(rank, peer.refusal)
            if peer.prepared != self._told:
                return False
        return True

    def _refill(self, position: int) -> bool:
        """Send some rows for caches that are being filled; whether nothing is lacking then."""
        now, peers = self._link.waiter.now(), self._filling()
        took_s = max([self._own_s, *(peer.replayed_at - self._sent_at for peer in peers)])
        token_s = now - self._sent_at
        if any(peer.replays for peer in peers):
            self._portion = max(PORTION_BYTES, self._portion // 2)
            return False
        if took_s > LONG * token_s:
            self._portion = max(PORTION_BYTES, self._portion // 2)
        elif 0 < took_s < SHORT * token_s:
            self._portion = min(MOST_BYTES, 2 * self._portion)
        self._sent_at = now
        return self._send_rows(position, self._portion, FASTER * len(self._refilled))

    def _filling(self) -> list[Peer]:
        """Workers with caches that are being filled."""
        return [self._link.peers[rank] for rank in {rank for rank, _ in self._refilled} if rank]

    def _refill_at_once(self, position: int) -> bool:
        """The same, as fast as it can be done."""
        peers = self._filling()
        if any(peer.replays for peer in peers):
            return False
        return self._send_rows(position, AT_ONCE_BYTES, 1) and not any(peer.replays for peer in peers)

    def _send_rows(self, position: int, size: int, least: int) -> bool:
        """Send rows of that size, and at least so many, for caches that are being filled; whether nothing is lacking then."""
        self._own_s = 0.0
        history, lacking = self._crew.history, [key for key, rows in self._refilled.items() if rows < position]
        left = max(history.portion(size), least) if lacking else 0
        for rank, layer in lacking:
            start = self._refilled[rank, layer]
            end = min(position, start + left)
            if end <= start:
                break
            if rank:
                history.refill(self._link, rank, layer, start, end, self._epoch, self._told)
            else:
                begin = time.perf_counter()
                self._holdings.refill(layer, history.rows(layer, start, end), start)
                self._own_s += time.perf_counter() - begin
            self._refilled[rank, layer] = end
            left -= end - start
        return all(rows >= position for rows in self._refilled.values())

    def _switch(self) -> None:
        """From now on all requests are of the new plan."""
        self.plan, self.number, self._next = self._next, self._told, None
        self._holdings.follow(self.number)
        self._crew.follow(self.plan)
        self._predictor.follow(self.plan)
        if not changed_keys(self.plan, self._aim):
            self._aim = None

    def _give_up(self, why: str, for_good: bool = False) -> None:
        """Stay with the plan that is in force; let everybody forget what it was told."""
        self.may_move = self.may_move and not for_good
        self.forget()
        self._note(f"work stays where it is: {why}")
