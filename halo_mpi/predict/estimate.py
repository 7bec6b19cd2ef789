"""What a worker's partial sum probably is, from the layer's input: the calibration's low-rank estimates, added up per worker."""

import numpy as np

from halo_mpi.model.config import ModelConfig
from halo_mpi.predict.stored import read_estimate
from halo_mpi.schedule.placement import Plan, changed_keys
from halo_mpi.store.reader import ModelStore
from halo_mpi.wire.messages import Kind

PARTS = {Kind.ATTENTION: ("heads", "head_estimate"), Kind.FFN: ("groups", "group_estimate")}


class LowRankEstimates:
    """Of every (kind, layer, worker). With memory m, the worker's last answer tells of the error that the estimate has now:

        y(t) is about f(x(t)) + m^(t-s) (y(s) - f(x(s)))   for the last answer that came, to the token at s

    which needs f only once, since it is affine. Held in f16: 2 (2 rank + 1) D bytes for each group and head of the workers.
    """

    def __init__(self, store: ModelStore, plan: Plan):
        self._store, self._plan = store, plan
        self._last: dict[tuple, tuple[int, np.ndarray, np.ndarray]] = {}
        kinds = ((Kind.ATTENTION, plan.query), (Kind.FFN, plan.ffn))
        self._maps = self._read(
            plan, {(kind, layer, rank) for kind, owners in kinds for layer, row in enumerate(owners) for rank in row.tolist()}
        )
        self._next: dict[tuple, tuple | None] = {}

    def _read(self, plan: Plan, keys: set[tuple[Kind, int, int]]) -> dict[tuple, tuple | None]:
        """The maps of these parts in a plan, None where a part is nothing; none of the root's."""
        found, maps = self._store.meta["calibration"], {}
        for kind, layer, rank in sorted(keys):
            own = np.flatnonzero((plan.query if kind == Kind.ATTENTION else plan.ffn)[layer] == rank).tolist()
            name, table = PARTS[kind]
            if rank and own:
                memory = float(np.clip(np.mean([found[name]["memory"][layer][entry] for entry in own]), 0, 1))
                maps[kind, layer, rank] = (*_joined(self._store, table, layer, own), np.float32(memory))
            elif rank:
                maps[kind, layer, rank] = None
        return maps

    def load(self, plan: Plan) -> None:
        """Read what another plan changes, in any thread."""
        self._next = self._read(plan, changed_keys(self._plan, plan))

    def follow(self, plan: Plan) -> None:
        """The workers' parts are those of this plan, which was loaded, from now on."""
        self._maps |= self._next
        for key in self._next:
            self._last.pop(key, None)
        self._plan, self._next = plan, {}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in self._maps.values() if arrays for array in arrays)

    def begin_text(self) -> None:
        """The last answers belong to another text."""
        self._last.clear()

    def observe(self, key: tuple[Kind, int, int], position: int, x: np.ndarray, y: np.ndarray) -> None:
        """The answer y, f32 [T, D], to x, f32 [T, D], came; the last row's token is at `position`."""
        self._last[key] = position, x[-1].copy(), y[-1].copy()

    def estimate(self, key: tuple[Kind, int, int], position: int, x: np.ndarray) -> np.ndarray:
        """The answer to x, f32 [1, D], of the token at `position`, as it probably is: f32 [D]."""
        inward, outward, bias, memory = self._maps[key]
        inputs, rest = x[-1], bias.astype(np.float32)
        if key in self._last:
            last, last_x, last_y = self._last[key]
            kept = memory ** np.float32(position - last)
            inputs, rest = inputs - kept * last_x, (1 - kept) * rest + kept * last_y
        return (inward.astype(np.float32) @ inputs) @ outward.astype(np.float32) + rest


def estimate_bytes(store: ModelStore, config: ModelConfig, plan: Plan) -> int:
    """Bytes that LowRankEstimates will need."""
    parts = int((plan.query > 0).sum() + (plan.ffn > 0).sum())
    return 2 * parts * (2 * store.meta["calibration"]["rank"] + 1) * config.hidden


def _joined(store: ModelStore, table: str, layer: int, entries: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sum of some estimates as one of their ranks' sum: f16 inward, outward [rank, D], bias [D]."""
    parts = [read_estimate(store, table, layer, entry) for entry in entries]
    inward, outward = (np.concatenate([getattr(part, name) for part in parts]) for name in ("inward", "outward"))
    bias = sum(part.bias for part in parts)
    return inward.astype(np.float16), outward.astype(np.float16), bias.astype(np.float16)
