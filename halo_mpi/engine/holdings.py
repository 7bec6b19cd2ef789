"""What a rank computes with, and how that changes while text flows.

held      the share that requests are computed with, under a plan's number
coming    some layers as the next plan has them: a thread loads them while the held ones serve, and the caches of heads that are
          new here are filled from attention inputs that the root kept; the first request under the next number makes them held
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from halo_mpi.engine.loader import Loader, enough_memory
from halo_mpi.errors import HaloError
from halo_mpi.model.kernels.kernel import Kernel, Share
from halo_mpi.model.layer_weights import Cache, LayerWeights, runs_of
from halo_mpi.model.loading import Held, Part, attention_part, ffn_part
from halo_mpi.model.sizes import shape_bytes
from halo_mpi.schedule.memory import available_bytes, mebibytes
from halo_mpi.schedule.placement import Change
from halo_mpi.schedule.residence import reside
from halo_mpi.store.reader import ModelStore
from halo_mpi.wire.messages import Kind


@dataclass(slots=True)
class Coming:
    """What some layers will be. `parts`: the part of a share -> the part of the loader."""

    plan: int
    changes: dict[int, Change]
    layers: dict[int, LayerWeights]
    caches: dict[int, Cache]
    loader: Loader
    parts: dict[int, int]


class Holdings:
    """A rank's share, its heads and groups by layer, and what is to come. `ranks`: of the run, for a lab's pace; `budget`: bytes for
    weights and caches; None: what is free."""

    def __init__(self, store: ModelStore, kernel: Kernel, share: Share, heads: list[list[int]], groups: list[list[int]], ranks: int,
                 loader: Loader | None = None, budget: int | None = None):  # fmt: skip
        self.kernel, self.share, self.heads, self.groups = kernel, share, list(heads), list(groups)
        self.sizes, self.config = kernel.sizes, kernel.sizes.config
        self._groups = self.config.groups
        self._store, self.ranks, self._first, self._budget = store, ranks, loader, budget
        self.meanwhile: Callable[[], None] = lambda: None  # again and again while weights are waited for
        self.plan = 0
        self._coming: Coming | None = None
        self._refusal = ""  # of the plan that was told last
        self._last: Coming | None = None  # held already, not whole yet

    def even_share(self, kind: Kind, layer: int) -> float:
        """This rank's part of a sync's work, in even shares: 1.0 is as much as everybody would have."""
        if kind == Kind.ATTENTION:
            return len(self.heads[layer]) * self.ranks / self.config.heads
        return len(self.groups[layer]) * self.ranks / self._groups

    @property
    def weights_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.share.layers)

    def need(self, part: int) -> None:
        """Wait until a part of the share is there: 2 * layer is its attention, 2 * layer + 1 its FFN, what follows the vocabulary.

        Raises what reading it raised: InputError, DamagedFileError, HaloError.
        """
        if self._last:
            if self._last.loader.complete:
                self._last = None
            elif part in self._last.parts:
                self._last.loader.need(self._last.parts[part])
                return
        if self._first:
            self._first.need(part)

    def prepare(self, plan: int, changes: dict[int, Change], also: Callable[[], None] | None = None) -> None:
        """Begin to load what the plan with this number changes here; what was coming before is not wanted any more.

        `also`: to be read by the same thread. Raises HaloError if there is no memory for it.
        """
        self.forget()
        self._refusal = ""
        try:
            self._prepare(plan, changes, also)
        except HaloError as error:
            self._refusal = str(error)
            raise

    def _prepare(self, plan: int, changes: dict[int, Change], also: Callable[[], None] | None) -> None:
        self._check_room(changes)
        for loader in (changes and self._first, self._last and self._last.loader):
            if loader:
                loader.load()
        layers, caches, parts, numbers = {}, {}, [], {}
        for layer, change in changes.items():
            before = Held(self.share.layers[layer], self.heads[layer], self.groups[layer])
            weights = layers[layer] = replace(before.weights)
            if change.heads != before.heads:
                numbers[2 * layer] = len(parts)
                parts.append(attention_part(self._store, self.kernel, layer, change.heads, weights, before))
                with enough_memory():
                    caches[layer] = self.share.empty_cache(len(weights.runs))
            if change.groups != before.groups:
                numbers[2 * layer + 1] = len(parts)
                parts.append(ffn_part(self._store, self.kernel, layer, change.groups, weights, before))
        if also:
            parts.append(Part(None, {}, also))
        loader = self._load(parts)
        loader.meanwhile = self.meanwhile
        self._coming = Coming(plan, changes, layers, caches, loader, numbers)

    def _load(self, parts: list[Part]) -> Loader:
        """Begin to read these, which all stay."""
        return Loader(parts, reside([max(1, shape_bytes(part.shapes)) for part in parts], None))

    def _check_room(self, changes: dict[int, Change]) -> None:
        """Raise HaloError if there is no room for what changes, beside what is held till then."""
        if not changes:
            return
        sizes, context = self.sizes, self.share.context
        if self._first and self._first.residence.streamed_bytes:
            raise HaloError("it reads weights at every token, as its memory demands, and can take over none")
        new = sum(sizes.layer_bytes(own.heads, own.groups, context) for own in changes.values())
        free = available_bytes()
        if self._budget is not None:
            held = sum(sizes.layer_bytes(heads, groups, context) for heads, groups in zip(self.heads, self.groups))
            free = min(free, self._budget - held)
        if new > free:
            raise HaloError(
                f"its new part takes {mebibytes(new)} until the old one is given up, and {mebibytes(max(0, free))} are free"
            )

    def is_prepared(self, plan: int) -> bool:
        """Whether all is loaded for this plan. Raises what reading raised."""
        return bool(self._coming and self._coming.plan == plan) and self._coming.loader.is_done()

    def refill(self, layer: int, x: np.ndarray, position: int) -> None:
        """Append K and V of the normed input x [T, D] at `position` to the cache that a layer will have."""
        coming = self._coming
        if coming and layer in coming.caches:
            coming.loader.need(coming.parts[2 * layer])
            self.share.append(layer, x, position, (coming.layers[layer], coming.caches[layer]))

    def follow(self, plan: int) -> None:
        """A request is of this plan: if it is the coming one, hold that from now on. Raises HaloError if it is unknown."""
        if plan == self.plan:
            return
        if not self._coming or self._coming.plan != plan:
            raise HaloError(self._refusal or f"a request is of plan {plan}, of which this rank was not told; this is a defect, report it")
        coming, self._coming = self._coming, None
        each, share = self.config.heads_per_kv, self.share
        for layer, change in coming.changes.items():
            if layer in coming.caches:
                before, after = (runs_of(heads, each)[0] for heads in (self.heads[layer], change.heads))
                for had, has in zip(share.kv[layer], coming.caches[layer]):
                    for head in set(before) & set(after):
                        has[after.index(head), : share.filled] = had[before.index(head), : share.filled]
                share.kv[layer] = coming.caches[layer]
            share.layers[layer] = coming.layers[layer]
            self.heads[layer], self.groups[layer] = change.heads, change.groups
        self.plan, self._last = plan, coming

    def forget(self) -> None:
        """What was coming is not wanted any more."""
        if self._coming:
            self._coming.loader.close()
            self._coming = None

    def close(self) -> None:
        """End all threads."""
        self.forget()
        for loader in (self._first, self._last and self._last.loader):
            if loader:
                loader.close()


def new_kv_heads(heads_per_kv: int, before: list[int], after: list[int]) -> set[int]:
    """KV heads whose cache a rank lacks when its query heads change."""
    return {head // heads_per_kv for head in after} - {head // heads_per_kv for head in before}
