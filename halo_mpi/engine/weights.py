"""What a rank computes with: it is chosen what stays in memory, checked that everybody's memory holds it, and begun to load."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil

from halo_mpi.engine.agreement import AgreedError
from halo_mpi.engine.holdings import Holdings
from halo_mpi.engine.loader import Loader, enough_memory
from halo_mpi.engine.predictor import predictor_bytes
from halo_mpi.engine.vocabulary import ReadVocabulary
from halo_mpi.model.llama import Share, Trunk
from halo_mpi.model.loading import Part, head_parts, load_trunk, share_parts
from halo_mpi.model.sizes import cache_bytes, shape_bytes, trunk_bytes
from halo_mpi.schedule.memory import Need, available_bytes, check_memory
from halo_mpi.schedule.residence import Residence, reside
from halo_mpi.wire.exchange import gather

if TYPE_CHECKING:
    from halo_mpi.engine.session import Session


class Weights:
    """A rank's weights, which its loader reads from now on (collective).

    `loaded`: called when everything that stays in memory is there. Raises AgreedError, on all ranks, if the memory of one does not
    hold the least that it needs, or it cannot be read.
    """

    holdings: Holdings | None = None
    trunk: Trunk | None = None  # on the root
    vocabulary: ReadVocabulary | None = None  # on the root, if the trunk does not hold it
    loader: Loader | None = None

    def __init__(self, session: Session, loaded: Callable[[], None]):
        store, config, run, is_root = session.store, session.config, session.run, session.is_root
        heads, groups = session.plan.query_heads(session.comm.rank), session.plan.groups(session.comm.rank)
        layers, parts = share_parts(store, config, heads, groups)
        trunk, beside, cache = trunk_bytes(config) if is_root else 0, 0, cache_bytes(config, heads, session.context)
        if is_root:
            cache += session.kept_bytes
        if is_root and run.sync.mode == "relaxed":
            beside = predictor_bytes(store, config, session.plan, session.uses_calibration)
        budget = None if run.memory is None else run.memory - beside - cache
        room = None if run.memory is None else run.memory - beside - trunk - (session.kept_bytes if is_root else 0)
        residence, blocks = _reside(parts, None if budget is None else budget - trunk), []
        if is_root and residence.streamed_bytes:
            blocks, head = head_parts(store, config)
            parts, trunk = [*parts, *head], 0
            residence = _reside(parts, budget)
        _check(session, residence.nbytes + trunk + beside, cache)

        def begin() -> None:
            with enough_memory():
                self.loader = Loader(parts, residence, loaded, is_root)
                if is_root:
                    self.trunk = load_trunk(store, config, vocabulary=not blocks)
                if blocks:
                    self.vocabulary = ReadVocabulary(store, config, blocks, self.loader.need, 2 * config.layers)
                if run.load_first:
                    self.loader.load()
                share = Share(config, layers, session.context)
                self.holdings = Holdings(store, share, heads, groups, session.comm.size, self.loader, room)

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
        residence, trunk = self.loader.residence, self.trunk.nbytes if self.trunk else 0
        whole = trunk + (sum(residence.sizes) if residence.streamed_bytes else self.holdings.weights_bytes)
        return {
            "weights_bytes": whole,
            "resident_bytes": residence.nbytes + trunk if residence.streamed_bytes else whole,
            "streamed_bytes": residence.streamed_bytes,
            "read_s": round(self.loader.read_s, 3),
            "waited_s": round(self.loader.waited_s, 3),
        }


def _reside(parts: list[Part], budget: int | None) -> Residence:
    return reside([shape_bytes(part.shapes) for part in parts], budget)


def _check(session: Session, weights: int, cache: int) -> None:
    resident = psutil.Process().memory_info().rss
    mine = Need(session.comm.rank, session.host, session.machine, weights, cache, resident, available_bytes(), session.run.memory)
    needs = gather(session.comm, {name: getattr(mine, name) for name in Need.__slots__})
    session.on_root(lambda: check_memory([Need(**need) for need in needs], session.context))
