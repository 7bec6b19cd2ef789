"""The root and its workers in one process, on a simulated wire with a clock of its own: any delay, no MPI.

Messages between two ranks keep their order, as TCP keeps it; everything else may happen.
"""

import itertools
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, settings

from halo_mpi.engine.loader import Loader, enough_memory
from halo_mpi.engine.marks import Marks
from halo_mpi.engine.options import SyncOptions
from halo_mpi.engine.predictor import make_predictor
from halo_mpi.engine.holdings import Holdings
from halo_mpi.engine.rescue import Rescue
from halo_mpi.engine.root import Root
from halo_mpi.engine.split_head import OwnRows, SplitHead, ranges
from halo_mpi.engine.vocabulary import HeldVocabulary
from halo_mpi.engine.worker import Worker
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.choice import make_kernel
from halo_mpi.model.loading import HeadBlock, Part, down_dtype, scores_part, share_parts
from halo_mpi.model.norms import load_norms
from halo_mpi.model.sizes import shape_bytes
from halo_mpi.schedule.placement import make_plan
from halo_mpi.schedule.residence import reside
from halo_mpi.store.reader import ModelStore
from halo_mpi.wire.messages import Kind, Message
from halo_mpi.wire.root_link import RootLink
from halo_mpi.wire.worker_link import WorkerLink

TICK_S = 2e-4
STRICT = SyncOptions(mode="strict", wire="f32", late="defer", max_lag=4, quality=0.3, deadline_ms=1.0, kick_ms=1.0, outage_ms=300.0,
                     takeover_ms=0.0,
                     copies="1", trailer=False, tune_sockets=False, old_kernel=False, check=True,
                     calibration=True)  # fmt: skip
RANKS, CONTEXT = 4, 48
IDS = [int(token) for token in np.random.default_rng(5).integers(3, 300, 10)]
QUICK, NO_STALL = [[1e-4]] * RANKS, [[0.0]] * RANKS  # a perfect wire, and workers that are always at work


def generated(examples: int) -> settings:
    """Of a property test: so many examples, as they come, since each takes a second."""
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=examples, deadline=None, phases=phases, suppress_health_check=list(HealthCheck))


class Clock:
    """Stands in for a Waiter: waiting moves the time and gives everybody a turn."""

    def __init__(self):
        self.time_s = 0.0
        self.turns = []
        self.loaders: weakref.WeakSet[ClockedLoader] = weakref.WeakSet()

    def now(self) -> float:
        return self.time_s

    def heard(self) -> None:
        pass

    def wait(self) -> None:
        self.time_s += TICK_S
        for turn in self.turns:
            turn()
        for loader in list(self.loaders):
            loader.turn()


class Box:
    """Stands in for a Mailbox. `delays`: seconds that each message takes, one after the other, for ever."""

    def __init__(self, clock: Clock, width: int, rows: int, delays: list[float]):
        self._clock, self._shape, self.delays = clock, (rows, width), itertools.cycle(delays)
        self.peers: dict[int, Box] = {}  # set by whoever connects them
        self.rank = 0
        self._arriving: dict[int, deque] = {}
        self.most_waiting = 0
        self.width, self.ended, self._held_until = width, set(), 0.0

    def post(self, peers, kind, seq, layer=0, position=0, x=None, epoch=0, lag=0, plan=0, wire=None) -> None:
        for peer in peers:
            message = Message(*self._shape)
            message.write(seq, kind, layer, position, x, wire or "f32", epoch, lag, plan)
            quick = kind in (Kind.PING, Kind.STOP)
            delay_s = 0.0 if quick else next(self.delays)
            self.peers[peer].deliver(self.rank, message, max(self._clock.now() + delay_s, self._held_until))

    def deliver(self, sender: int, message: Message, at: float) -> None:
        line = self._arriving.setdefault(sender, deque())
        after = line[-1][0] if line else 0.0
        line.append((max(after, at), message))
        self.most_waiting = max(self.most_waiting, len(line))

    def held_up(self, seconds: float) -> None:
        """What was sent, and is sent, from here comes after so long."""
        self._held_until = self._clock.now() + seconds
        for peer in self.peers.values():
            line = peer._arriving.setdefault(self.rank, deque())
            for index, (at, message) in enumerate(line):
                line[index] = (max(at, self._held_until), message)

    def poll(self) -> Iterator[tuple[int, Message]]:
        for sender, line in self._arriving.items():
            while line and line[0][0] <= self._clock.now():
                yield sender, line.popleft()[1]

    def close(self) -> None:
        pass


class ClockedLoader(Loader):
    """Reads parts without a thread. `stalls`: seconds that each takes, one after the other."""

    def __init__(self, parts: list[Part], clock: Clock, stalls: Iterator[float]):
        self._clock, self._stalls = clock, stalls
        super().__init__(parts, reside([max(1, shape_bytes(part.shapes)) for part in parts], None))

    def _start(self) -> None:
        self._there_at = self._clock.now() + next(self._stalls)
        self._clock.loaders.add(self)

    def turn(self) -> None:
        """Read what should be there by now."""
        while self._clock.now() >= self._there_at and (part := self._wanted()) is not None and not self._error:
            self._read_now(part)
            self._there_at += next(self._stalls)

    def _has(self, part: int) -> bool:
        self._read_now(part)
        if self._error:
            raise self._error
        return True

    def close(self) -> None:
        self._clock.loaders.discard(self)

    def _read_now(self, part: int) -> None:
        try:
            with enough_memory():
                self._read(part)
        except Exception as error:  # as the thread has it
            self._error = error


class ClockedHoldings(Holdings):
    """Loads by the clock."""

    def on(self, clock: Clock, stalls: list[float]) -> "ClockedHoldings":
        self._clock, self._stalls = clock, itertools.cycle(stalls)
        return self

    def _load(self, parts: list[Part]) -> Loader:
        return ClockedLoader(parts, self._clock, self._stalls)


class Simulation:
    """A model on `ranks` ranks. `delays[r]`: of the messages to and from worker r; `stalls[r]`: of its computing and loading, seconds;
    `rows`: of the head, by rank, if it is split."""

    def __init__(
        self,
        model: Path,
        ranks: int,
        sync: SyncOptions,
        delays: list[list[float]],
        stalls: list[list[float]],
        context: int,
        keeps: bool | None = None,
        kernel: str = "reference",
        cache: str = "f32",
        rows: list[int] | None = None,
    ):
        store = ModelStore(model)
        config = self.config = ModelConfig.from_dict(store.meta["config"])
        disks = [{table: set(store.entries(table)) for table in ("query", "ffn")}] * ranks
        plan = make_plan(config, "auto", disks, store.meta.get("calibration"))
        self.clock = Clock()
        boxes = [Box(self.clock, config.hidden, 64, [0.0])] + [
            Box(self.clock, config.hidden, 64, delays[r]) for r in range(1, ranks)
        ]
        self.kernel = make_kernel(kernel, config, store.meta["dtype"], 1, cache, down_dtype(store))
        self.holdings = [self._holdings(store, plan, rank, ranks, context).on(self.clock, stalls[rank]) for rank in range(ranks)]
        self.workers = {}
        for rank in range(1, ranks):
            boxes[rank].rank, boxes[rank].peers = rank, {0: boxes[0]}
            outward = Box(self.clock, config.hidden, 64, delays[rank][::-1])
            outward.peers = {rank: boxes[rank]}
            boxes[0].peers[rank] = _Direction(outward, rank)
            link = WorkerLink(boxes[rank], self.clock)
            own = self._own_rows(store, rows, rank, sync.wire) if rows and rows[rank] else None
            self.workers[rank] = Worker(link, self.holdings[rank], Marks(None, rank), own)
            self.clock.turns.append(_turns(self.clock, self.workers[rank], link, itertools.cycle(stalls[rank])))
        workers = list(range(1, ranks))
        link = RootLink(_RootBox(boxes[0]), workers, sync.kick_ms / 1e3, sync.deadline_ms / 1e3, self.clock)
        self.boxes, self.notes = boxes, []
        predictor = make_predictor(store, config, plan, ranks, sync.calibration)
        norms, vocabulary = load_norms(store, config), HeldVocabulary(store, self.kernel)
        if rows:
            vocabulary = SplitHead(vocabulary, rows, link, sync.wire, 64, lambda rank: self.root.crew.does_without(rank))
        self.vocabulary = vocabulary
        keeps = sync.mode == "relaxed" if keeps is None else keeps
        note = self.notes.append
        self.root = root = Root(
            config, norms, vocabulary, self.holdings[0], plan, link, Marks(None, 0), sync, context, note, note, predictor, keeps
        )
        if sync.takeover_ms:
            silent_s = sync.takeover_ms / 1e3
            root.rescue = Rescue(disks, silent_s, root.crew, root.mover, link, self.notes.append, lambda phase: None)
        self.store = store

    def _own_rows(self, store, rows, rank, wire) -> OwnRows:
        start, stop = ranges(rows)[rank]
        block = HeadBlock()
        part = scores_part(store, self.kernel, start, stop, block)
        part.make_room()
        part.read()
        return OwnRows(self.kernel, stop - start, block, Loader([], reside([], None)), wire)

    def _holdings(self, store, plan, rank, ranks, context) -> ClockedHoldings:
        heads, groups = plan.query_heads(rank), plan.groups(rank)
        layers, parts = share_parts(store, self.kernel, heads, groups)
        for part in parts:
            part.make_room()
            part.read()
        return ClockedHoldings(store, self.kernel, self.kernel.share(layers, context), heads, groups, ranks)

    def text(self, ids: list[int], prefill: int) -> np.ndarray:
        """Logits f32 [T, V] of a text whose first `prefill` tokens are computed at once; for these only the last one's."""
        first = [self.root.prefill(ids[:prefill]).copy()] if prefill else []
        return np.stack(first + [self.root.step(token, position).copy() for position, token in enumerate(ids) if position >= prefill])

    def end(self, rank: int) -> None:
        """A worker's process ends now."""
        self.boxes[0].ended.add(rank)
        self.cut_off(rank)

    def cut_off(self, rank: int, seconds: float = 1e9) -> None:
        """Nothing goes to this worker, nor comes from it, for so long."""
        self.boxes[rank].held_up(seconds)
        self.boxes[0].peers[rank].box.held_up(seconds)

    def settle(self, seconds: float = 1.0) -> None:
        """Let everything arrive that is under way, and be done."""
        for _ in range(int(seconds / TICK_S)):
            self.clock.wait()
            for _ in self.root._link.poll():
                pass


class _Direction:
    """The way from the root to one worker."""

    def __init__(self, box: Box, rank: int):
        self.box, self._rank = box, rank

    def post(self, *message, **fields) -> None:
        self.box.post([self._rank], *message, **fields)


class _RootBox:
    """The root's mailbox: a way of its own to every worker."""

    def __init__(self, box: Box):
        self._box = box
        self.poll, self.close, self.width, self.ended = box.poll, box.close, box.width, box.ended
        self.copies: dict[int, int] = {}

    def post(self, peers, *message, **fields) -> None:
        for peer in peers:
            self._box.peers[peer].post(*message, **fields)


def _turns(clock: Clock, worker: Worker, link: WorkerLink, stalls: Iterator[float]):
    busy_until = 0.0

    def turn() -> None:
        nonlocal busy_until
        while clock.now() >= busy_until and not link.stopped and worker.turn():
            busy_until = clock.now() + next(stalls)

    return turn
