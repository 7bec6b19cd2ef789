"""What the root knows about the workers' answers before they come: from the model's calibration, or without one."""

import functools
import time
from collections.abc import Callable

import numpy as np

from halo_mpi.engine.running_means import RunningMeans
from halo_mpi.engine.shares import WorkShares
from halo_mpi.model.config import ModelConfig
from halo_mpi.predict.estimate import LowRankEstimates, estimate_bytes
from halo_mpi.predict.fits import SINKS
from halo_mpi.predict.importance import PredictedShares
from halo_mpi.schedule.placement import Plan
from halo_mpi.store.reader import ModelStore
from halo_mpi.wire.messages import Kind


Key = tuple[Kind, int, int]  # kind, layer, rank


def timed(method: Callable) -> Callable:
    """Add the time that a method of Predictor takes to its `seconds`."""

    @functools.wraps(method)
    def with_time(self, *arguments):
        begin = time.perf_counter()
        result = method(self, *arguments)
        self.seconds += time.perf_counter() - begin
        return result

    return with_time


class Predictor:
    """How much of a sync's importance is whose, and what stands in for an answer that is late. `seconds`: that it took."""

    def __init__(self, shares: PredictedShares | WorkShares, estimates: LowRankEstimates | RunningMeans):
        self._shares, self._estimates, self.seconds = shares, estimates, 0.0
        self.share, self.rest, self.too_costly = shares.share, shares.rest, shares.too_costly
        self.calibrated = isinstance(estimates, LowRankEstimates)

    @timed
    def look_ahead(self, kind: Kind, layer: int, x: np.ndarray) -> None:
        """While the workers compute this sync from x, f32 [1, D]: predict what matters in the next layer; at first, in this one."""
        if kind == Kind.FFN or layer == 0:
            self._shares.look_ahead(layer + (kind == Kind.FFN), x)

    @timed
    def observe(self, key: Key, position: int, x: np.ndarray, y: np.ndarray) -> None:
        """The answer y, f32 [T, D], to x, f32 [T, D], came; the last row's token is at `position`."""
        if position >= SINKS:
            self._estimates.observe(key, position, x, y)

    @timed
    def estimate(self, key: Key, position: int, x: np.ndarray) -> np.ndarray:
        """The answer to x, f32 [1, D], of the token at `position`, as it probably is: f32 [D]."""
        return self._estimates.estimate(key, position, x)

    def load(self, plan: Plan) -> None:
        """Read what another plan will need, in any thread."""
        self._estimates.load(plan)

    def follow(self, plan: Plan) -> None:
        """The workers' parts are those of this plan from now on, which was loaded last."""
        self._shares.follow(plan)
        self._estimates.follow(plan)

    def begin_text(self) -> None:
        """What came before belongs to another text."""
        self._estimates.begin_text()


def make_predictor(store: ModelStore, config: ModelConfig, plan: Plan, ranks: int, calibration: bool) -> Predictor:
    """`calibration`: use the model's, if it has one."""
    if calibration and store.meta.get("calibration"):
        return Predictor(PredictedShares(store, config, plan, ranks), LowRankEstimates(store, plan))
    return Predictor(WorkShares(plan, ranks), RunningMeans(config.hidden, plan))


def predictor_bytes(store: ModelStore, config: ModelConfig, plan: Plan, calibration: bool) -> int:
    """What the larger part of it, the estimates, will need."""
    return estimate_bytes(store, config, plan) if calibration and store.meta.get("calibration") else 0
