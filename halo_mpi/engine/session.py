"""Start-up and end of a run, the same code on every rank.

    compare versions -> open the model, compare digests -> (root: read the work) -> connect -> measure -> plan -> check memory
    -> begin to load, which goes on while the first prompt is computed

Every step is taken together: a failure on one rank ends all with one line from the root.
"""

import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TypeVar

from mpi4py import MPI

from halo_mpi.engine import stage
from halo_mpi.engine.agreement import AgreedError, require_equal, together, warn
from halo_mpi.engine.history import history_bytes
from halo_mpi.engine.last_words import device_of, last_words
from halo_mpi.engine.machine import share_cores, survives_ends, this_machine
from halo_mpi.engine.marks import Marks
from halo_mpi.engine.monitor import Monitor
from halo_mpi.engine.options import RunOptions, SyncOptions, of_rank
from halo_mpi.engine.parting import Parting
from halo_mpi.engine.planning import Basis, plan_head, plan_run
from halo_mpi.engine.predictor import make_predictor
from halo_mpi.engine.replacer import Replacer
from halo_mpi.engine.rescue import Rescue
from halo_mpi.engine.root import PREFILL_ROWS, Root
from halo_mpi.engine.split_head import SplitHead
from halo_mpi.engine.vocabulary import Vocabulary
from halo_mpi.engine.weights import Weights
from halo_mpi.engine.worker import Worker
from halo_mpi.errors import EXIT_DONE, EXIT_LOST
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.choice import make_kernel
from halo_mpi.model.loading import down_dtype
from halo_mpi.model.tokenizer import Tokenizer, TokenizerFiles
from halo_mpi.schedule.memory import available_bytes, mebibytes
from halo_mpi.schedule.placement import Disks
from halo_mpi.store.reader import ModelStore
from halo_mpi.versions import mpi_name
from halo_mpi.wire.exchange import ROOT, broadcast, duplicate, gather
from halo_mpi.wire.mailbox import Mailbox
from halo_mpi.wire.polling import sharpen_timers
from halo_mpi.wire.root_link import RootLink
from halo_mpi.wire.sockets import COPIES, count_connections, own_addresses, tune_sockets
from halo_mpi.wire.worker_link import WorkerLink

T = TypeVar("T")
UNHEARD_S = 5.0  # of a worker: its last words are not waited for as long as others'
HISTORY_PART = 0.25  # of the root's memory


class Session:
    """One run on one rank. Collective: every rank constructs it and calls the same methods in the same order."""

    def __init__(self, comm: MPI.Comm, run: RunOptions):
        self.begin = time.perf_counter()
        self.comm, self.host, self.machine = comm, socket.gethostname(), this_machine()
        self.is_root = comm.rank == ROOT
        self.events: list[dict] = []
        self.tokens = 0  # generated or scored
        self.parting = Parting()
        self.scheduler: dict | None = None  # for the report: what was measured, and what follows
        self.marks = Marks.from_environment(comm.rank)
        sharpen_timers()
        self.run = self._with_roots_options(run)
        self.hosts, self.ranks_on_host, threads = share_cores(comm, self.run.threads)
        self.store = self.together(lambda: ModelStore(self.run.model, self.marks.pace_reading))
        require_equal(comm, f"model in {self.run.model}", self.store.version, "copy one version of it to all hosts")
        self.config = self.together(lambda: ModelConfig.from_dict(self.store.meta["config"]))
        self.kernel = self.together(
            lambda: make_kernel(
                self.run.kernel, self.config, self.store.meta["dtype"], threads, self.run.cache, down_dtype(self.store)
            )
        )
        self.together(self.kernel.prepare, patient=True)
        self.tokenizer = self.on_root(lambda: Tokenizer(TokenizerFiles.from_dict(self.store.meta["tokenizer"])))

    @property
    def memory(self) -> int | None:
        """This rank's --memory, in bytes."""
        return of_rank(self.run.memory, self.comm.rank)

    def on_root(self, step: Callable[[], T]) -> T | None:
        """Run `step` on the root alone; if it fails, all ranks end (collective). None on the workers."""
        return self.together(lambda: step() if self.is_root else None)

    def together(self, step: Callable[[], T], patient: bool = False) -> T:
        return together(self.comm, step, self.run.verbose, patient)

    def load(self, context: int | None) -> None:
        """Connect, plan, check memory and begin to load this rank's share (collective); `context`: the root's longest text."""
        begin = time.perf_counter()
        self.context, self.load_s, self.weights = broadcast(self.comm, context), None, None

        def loaded() -> None:
            self.load_s = time.perf_counter() - begin
            self.event("weights loaded")

        self.connect()
        self.keeps = self.is_root and self._keeps_inputs()
        try:
            self.plan, disks, basis = plan_run(self)
            self.head_rows, self._head_tokens = plan_head(self, basis)
            self.weights = Weights(self, loaded)
            streams = any(gather(self.comm, self.weights.loader.residence.streamed_bytes))
            predictor = self.on_root(
                lambda: make_predictor(self.store, self.config, self.plan, self.comm.size, self.uses_calibration)
            )
        except AgreedError:
            if self.weights:
                self.weights.close()
            self._mailbox.close()
            raise
        weights = self.weights
        self.root = self.worker = None
        if self.is_root:
            self.root = Root(
                self.config,
                weights.norms,
                self._vocabulary(weights),
                weights.holdings,
                self.plan,
                self.link,
                self.marks,
                self.run.sync,
                self.context,
                self.event,
                self.warn,
                predictor,
                self.keeps,
            )
            self._say_what_is_not_survived()
            if self.comm.size > 1:
                root, silent_s = self.root, self.run.sync.takeover_ms / 1e3
                root.rescue = Rescue(disks, silent_s, root.crew, root.mover, self.link, self.warn, self.marks.phase)
            if self._may_move() and self.keeps and basis and not streams:  # what is read at every token does not move
                self.root.replacer = self._replacer(basis, disks)
            self.monitor = Monitor(self.hosts, self.link.peers, self.root.crew, self.root.ledger, self.run.verbose)
        else:
            weights.loader.meanwhile = weights.holdings.meanwhile = self.link.hear
            self.worker = Worker(self.link, weights.holdings, self.marks, weights.own_rows)
        stage.work_begins()

    def _vocabulary(self, weights: Weights) -> Vocabulary:
        """The root's, with the workers' help if they have rows of the head."""
        rows = self.head_rows = weights.head_rows
        if not any(rows[1:]):
            return weights.vocabulary
        self.event(f"the head is split: {rows} rows by rank")
        return SplitHead(
            weights.vocabulary, rows, self.link, self.run.sync.wire, self._head_tokens,
            lambda rank: self.root.crew.does_without(rank),
        )  # fmt: skip

    def connect(self) -> None:
        """Open and tune the connections between the root and the workers (collective)."""
        comm, sync = self.comm, self.run.sync
        workers = list(range(1, comm.size))
        at_first, most = COPIES[sync.copies] if self.ranks_on_host < comm.size else (1, 1)
        copies = [duplicate(comm) for _ in range(1, most)]
        peers = workers if self.is_root else [ROOT]
        mailbox = self._mailbox = Mailbox(comm, peers, PREFILL_ROWS, self.config.hidden, sync.wire, sync.trailer, copies)
        if self.is_root:
            self.link = RootLink(
                mailbox, workers, sync.kick_ms / 1e3, None if sync.deadline_ms is None else sync.deadline_ms / 1e3
            )
        else:
            self.link = WorkerLink(mailbox)
            self.link.greet()
        addresses = [set(each) for each in broadcast(comm, gather(comm, own_addresses()))]
        if copies:
            mailbox.limit(self._fewest_connections(addresses, peers, most))
        for peer in peers if at_first > 2 else ():
            mailbox.widen(peer)
        others = set().union(*addresses) - addresses[comm.rank]
        self.tuned_sockets = self._tune_sockets(others) if sync.tune_sockets else False

    def disconnect(self) -> None:
        """End without having computed anything (collective)."""
        if self.is_root:
            self.link.stop(set())
        else:
            while not self.link.stopped:
                self.link.next()
                self.link.wait()
            self.link.close()
        self.store.close()

    def _say_what_is_not_survived(self) -> None:
        if self.ranks_on_host < self.comm.size and self.run.sync.takeover_ms and not survives_ends():
            what = "a rank whose process ends will end the run"
            if mpi_name().startswith("Open MPI 5"):
                what += ": mpirun was started without --with-ft ulfm, which launch/halo-mpirun adds"
            self.warn(what)

    @property
    def kept_bytes(self) -> int:
        """What the attention inputs take that the root keeps, for workers that were away and for moves."""
        return self._history_bytes() if self.keeps else 0

    def _history_bytes(self) -> int:
        return history_bytes(self.config.layers, self.context, self.config.hidden, self.run.sync.wire)

    def _may_move(self) -> bool:
        """Whether work is to move while text flows."""
        return self.run.moves and self.run.placement == "auto" and self.comm.size > 1

    def _keeps_inputs(self) -> bool:
        """Whether the root keeps attention inputs: for workers that come back, or get other heads, if it has room."""
        if self.run.sync.mode == "relaxed" or self.comm.size == 1:
            return self.comm.size > 1
        if not self._may_move() and not self.run.sync.takeover_ms:
            return False
        needed = self._history_bytes()
        fits = needed <= HISTORY_PART * (self.memory or available_bytes())
        if not fits:
            self.event(
                f"work will not move, and if a worker is lost the text is computed again: what is needed else for {self.context} tokens, "
                f"{mebibytes(needed)}, is much of the root's memory"
            )
        return fits

    def _replacer(self, basis: Basis, disks: Disks) -> Replacer:
        root, advice = self.root, basis.advice
        calibration = self.store.meta.get("calibration")
        return Replacer(self.kernel.sizes, basis.cluster.without_disks(), basis.work, advice.unstable, disks, calibration, root.mover,
                        root.crew, self.link, self.event, self.marks.phase)  # fmt: skip

    @property
    def uses_calibration(self) -> bool:
        return self.run.sync.calibration and self.run.sync.mode == "relaxed"

    def _fewest_connections(self, addresses: list[set[str]], peers: list[int], most: int) -> int:
        """Between any two hosts that talk (collective), up to `most`; `addresses`: of every rank; `peers`: this one's."""
        here, there = addresses[self.comm.rank], [addresses[peer] for peer in peers]
        fewest = min(gather(self.comm, min([most, *(count_connections(peer) for peer in there if peer != here)])), default=most)
        if self.is_root and fewest < min(most, 2):
            self.event("messages are not sent twice: MPI opened only one connection to some host")
        return broadcast(self.comm, fewest)

    def _tune_sockets(self, others: set[str]) -> bool | str:
        """Tune the connections to the other hosts (collective). On the root, for the report: whether all took all options."""
        accepted = gather(self.comm, tune_sockets(others, self.run.sync.old_kernel))
        refused = {option for rank in accepted for option, taken in rank.items() if not taken}
        if refused and self.is_root:
            self.event(f"the kernel refused to tune sockets: {', '.join(sorted(refused))}")
        return "refused" if refused else any(accepted)

    def serve(self) -> None:
        """A worker's part of the run, until the root says stop."""
        self.worker.run()

    def token_done(self) -> None:
        """The root has generated or scored one more token."""
        self.tokens += 1
        self.marks.token()
        self.monitor.token()

    def resumed(self, tokens: int) -> None:
        """The root goes on with a text that has so many tokens already."""
        self.tokens += tokens
        self.event(f"goes on with a text after {tokens} tokens")

    def finish(self) -> list[dict]:
        """End the run (the root calls it when its loop is done). On the root: the devices of the report; who is gone has few figures.

        `parting` tells then how to leave.
        """
        self.weights.close()
        mine = last_words(self)
        if not self.is_root:
            self.parting = Parting(alone=self.link.close(json.dumps(mine)))
            self.store.close()
            return []
        alone = survives_ends()  # MPI's end would wait for a rank that ends meanwhile, and for ever if the root fails after it
        words = self.link.stop(self.root.crew.gone() | self.link.unheard(UNHEARD_S), alone)
        self.store.close()
        missing = set(self.link.workers) - words.keys()
        self.parting = Parting(EXIT_LOST if missing | self.root.crew.lost() else EXIT_DONE, alone or bool(missing))
        told = [mine] + [json.loads(words[rank]) if words.get(rank) else None for rank in self.link.workers]
        return [device_of(self, rank, words) for rank, words in enumerate(told)]

    def event(self, what: str) -> None:
        """Note something for the report, with the time since start-up and the tokens that were there."""
        t_s = round(time.perf_counter() - self.begin, 3)
        self.events.append({"t_s": t_s, "rank": self.comm.rank, "token": self.tokens, "what": what})

    def warn(self, what: str) -> None:
        """The same, and tell the user now."""
        self.event(what)
        warn(re.sub(r"\brank (\d+)", lambda found: f"{found[0]} on {self.hosts[int(found[1])]}", what, count=1))

    def _with_roots_options(self, run: RunOptions) -> RunOptions:
        """The root's options with this rank's own model folder, which may lie elsewhere on this host."""
        sync = SyncOptions(**broadcast(self.comm, asdict(run.sync)))
        names = ("kernel", "cache", "placement", "head", "moves", "memory", "threads", "load_first", "verbose")
        shared = broadcast(self.comm, {name: getattr(run, name) for name in names})
        return replace(run, sync=sync, **shared)
