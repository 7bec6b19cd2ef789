"""What a rank computes with: it is chosen what stays in memory, checked that everybody's memory holds it, and begun to load."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil

from halo_mpi.engine.agreement import AgreedError
from halo_mpi.engine.holdings import Holdings
from halo_mpi.engine.loader import Loader, enough_memory
from halo_mpi.engine.predictor import predictor_bytes
from halo_mpi.engine.split_head import OwnRows, ranges
from halo_mpi.engine.vocabulary import HeldVocabulary, ReadVocabulary, Vocabulary
from halo_mpi.model.loading import HeadBlock, Part, head_parts, scores_part, share_parts
from halo_mpi.model.norms import Norms, load_norms
from halo_mpi.model.sizes import shape_bytes
from halo_mpi.schedule.memory import Need, available_bytes, check_memory, free_bytes
from halo_mpi.schedule.residence import Residence, reside
from halo_mpi.wire.exchange import broadcast, gather

if TYPE_CHECKING:
    from halo_mpi.engine.session import Session


class Weights:
    """A rank's weights, which its loader reads from now on (collective).

    `loaded`: called when everything that stays in memory is there. Raises AgreedError, on all ranks, if the memory of one does not
    hold the least that it needs, or it cannot be read.
    """

    holdings: Holdings | None = None
    norms: Norms | None = None  # on the root
    vocabulary: Vocabulary | None = None  # on the root
    loader: Loader | None = None
    own_rows: OwnRows | None = None  # of the head, on a worker that has some

    def __init__(self, session: Session, loaded: Callable[[], None]):
        store, config, kernel, run, is_root = session.store, session.config, session.kernel, session.run, session.is_root
        heads, groups = session.plan.query_heads(session.comm.rank), session.plan.groups(session.comm.rank)
        layers, parts = share_parts(store, kernel, heads, groups)
        vocabulary, beside = kernel.sizes.vocabulary_bytes() if is_root else 0, 0
        cache = kernel.sizes.cache_bytes(heads, session.context)
        if is_root:
            cache += session.kept_bytes
        if is_root and run.sync.mode == "relaxed":
            beside = predictor_bytes(store, config, session.plan, session.uses_calibration)
        budget = None if session.memory is None else session.memory - beside - cache
        room = None if session.memory is None else session.memory - beside - vocabulary - (session.kept_bytes if is_root else 0)
        residence, blocks = _reside(parts, None if budget is None else budget - vocabulary), []
        self.head_rows = _head_rows(session, residence, vocabulary + beside + cache)
        start, stop = ranges(self.head_rows)[session.comm.rank]
        self._scored = 0 if is_root else shape_bytes(kernel.sizes.scores(stop - start))
        if self._scored:
            rows = HeadBlock()
            parts = [*parts, scores_part(store, kernel, start, stop, rows)]
            residence = _reside(parts, None)
            room = None if room is None else room - self._scored
        if is_root and residence.streamed_bytes:
            blocks, head = head_parts(store, kernel)
            parts, vocabulary = [*parts, *head], 0
            residence = _reside(parts, budget)
        _check(session, residence.nbytes + vocabulary + beside, cache)

        def begin() -> None:
            with enough_memory():
                self.loader = Loader(parts, residence, loaded, is_root)
                if is_root:
                    self.norms = load_norms(store, config)
                    if blocks:
                        self.vocabulary = ReadVocabulary(store, kernel, blocks, self.loader.need, 2 * config.layers)
                    else:
                        self.vocabulary = HeldVocabulary(store, kernel)
                if self._scored:
                    self.own_rows = OwnRows(kernel, stop - start, rows, self.loader, run.sync.wire)
                if run.load_first:
                    self.loader.load()
                share = kernel.share(layers, session.context)
                self.holdings = Holdings(store, kernel, share, heads, groups, session.comm.size, self.loader, room)

        try:
            session.together(begin, patient=run.load_first)
        except AgreedError:
            self.close()
            raise

    def close(self) -> None:
        """Read no more."""
        for each in (self.holdings, self.loader):
            if each:
                each.close()

    def to_dict(self) -> dict:
        """For the report's device."""
        residence, vocabulary = self.loader.residence, self.vocabulary.nbytes if self.vocabulary else 0
        held = self.holdings.weights_bytes + self._scored
        whole = vocabulary + (sum(residence.sizes) if residence.streamed_bytes else held)
        return {
            "weights_bytes": whole,
            "resident_bytes": residence.nbytes + vocabulary if residence.streamed_bytes else whole,
            "streamed_bytes": residence.streamed_bytes,
            "read_s": round(self.loader.read_s, 3),
            "waited_s": round(self.loader.waited_s, 3),
        }


def _reside(parts: list[Part], budget: int | None) -> Residence:
    return reside([shape_bytes(part.shapes) for part in parts], budget)


def _head_rows(session: Session, residence: Residence, beside: int) -> list[int]:
    """The head's rows by rank, as planned, but the root's where there is no room for them (collective). `beside`: bytes of the rest."""
    planned, rank = session.head_rows, session.comm.rank
    if not any(planned[1:]):
        return planned
    budget = free_bytes(session.ranks_on_host, session.kernel.program_bytes)
    if session.memory is not None:
        budget = min(budget, session.memory)
    needed = residence.nbytes + beside + (shape_bytes(session.kernel.sizes.scores(planned[rank])) if rank else 0)
    fits = gather(session.comm, not residence.streamed_bytes and needed <= budget)
    if session.is_root:
        workers = [own if fits[0] and fit else 0 for own, fit in zip(planned[1:], fits[1:])]
        planned = [session.config.vocabulary - sum(workers), *workers]
    return broadcast(session.comm, planned)


def _check(session: Session, weights: int, cache: int) -> None:
    resident = psutil.Process().memory_info().rss
    mine = Need(session.comm.rank, session.host, session.machine, weights, cache, resident, available_bytes(), session.memory,
                session.kernel.program_bytes)  # fmt: skip
    needs = gather(session.comm, {name: getattr(mine, name) for name in Need.__slots__})
    session.on_root(lambda: check_memory([Need(**need) for need in needs], session.context))
