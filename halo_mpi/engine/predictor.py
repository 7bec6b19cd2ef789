"""What the root knows about the workers' answers before they come: from the model's calibration, or without one."""

from dataclasses import dataclass

from halo_mpi.engine.estimate import RunningMeans
from halo_mpi.engine.shares import WorkShares
from halo_mpi.model.config import ModelConfig
from halo_mpi.predict.estimate import LowRankEstimates, estimate_bytes
from halo_mpi.predict.importance import PredictedShares
from halo_mpi.schedule.placement import Plan
from halo_mpi.store.reader import ModelStore


@dataclass(frozen=True, slots=True)
class Predictor:
    """`shares`: how much of a sync's importance is whose; `estimates`: what stands in for an answer that is late."""

    shares: PredictedShares | WorkShares
    estimates: LowRankEstimates | RunningMeans


def make_predictor(store: ModelStore, config: ModelConfig, plan: Plan, ranks: int, calibration: bool) -> Predictor:
    """`calibration`: use the model's, if it has one."""
    if calibration and store.meta.get("calibration"):
        return Predictor(PredictedShares(store, config, plan, ranks), LowRankEstimates(store, config, plan, ranks))
    return Predictor(WorkShares(plan, ranks), RunningMeans(config.hidden))


def predictor_bytes(store: ModelStore, config: ModelConfig, plan: Plan, calibration: bool) -> int:
    """What the larger part of it, the estimates, will need."""
    return estimate_bytes(store, config, plan) if calibration and store.meta.get("calibration") else 0
