"""How good a layer's fits are on text that they were not fitted to."""

import numpy as np
import torch

from halo_mpi.predict.fits import LowRank
from halo_mpi.predict.moments import apply

LEAST = 4  # the least important 1/4
LEAST_SIZE = 0.1  # of the median |output|: errors where a part says almost nothing count no more than this
TINY = 1e-6


def judge_importance(
    windows: list[tuple[torch.Tensor, torch.Tensor]], weight: torch.Tensor, bias: torch.Tensor, groups: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Rank correlation and recall of windows' (inputs [T, D], sizes [T, G + H]), for groups and for heads."""
    inputs = torch.cat([inputs for inputs, _ in windows])
    actual = torch.cat([sizes for _, sizes in windows])
    predicted = inputs @ weight.T + bias
    parts = (slice(0, groups), slice(groups, None))
    correlation = tuple(rank_correlation(predicted[:, part], actual[:, part]) for part in parts)
    return correlation, tuple(recall_of_least(predicted[:, part], actual[:, part]) for part in parts)


def judge_estimates(
    windows: list[tuple[torch.Tensor, torch.Tensor]], out: torch.Tensor, parts: list[slice], fits: list[LowRank]
) -> tuple[np.ndarray, np.ndarray]:
    """`recovered` and `memory` of each part, from windows' (inputs [T, D], inner [T, K])."""
    recovered, memory = [], []
    tokens = sum(len(inputs) for inputs, _ in windows)
    for part, fit in zip(parts, fits):
        missed = repeated = repeatable = 0.0
        for inputs, inner in windows:
            y = inner[:, part] @ out[:, part].T
            size = y.norm(dim=-1)
            size = size.clamp(min=float(LEAST_SIZE * size.median()) + TINY)
            error = (y - apply(fit, inputs)) / size[:, None]
            missed += float(error.pow(2).sum())
            repeated += float((error[1:] * error[:-1]).sum())
            repeatable += float(error[:-1].pow(2).sum())
        recovered.append(1 - missed / tokens)
        memory.append(repeated / max(repeatable, TINY))
    return np.array(recovered, np.float32), np.array(memory, np.float32)


def rank_correlation(predicted: torch.Tensor, actual: torch.Tensor) -> float:
    """Spearman's, within each token and then the mean; of [T, K] with [T, K]."""
    ranks = [values.argsort(-1).argsort(-1).float() for values in (predicted, actual)]
    one, other = (rank - rank.mean(-1, keepdim=True) for rank in ranks)
    spread = one.norm(dim=-1) * other.norm(dim=-1)
    return float(((one * other).sum(-1) / spread.clamp(min=1e-12)).mean())


def recall_of_least(predicted: torch.Tensor, actual: torch.Tensor) -> float:
    """Which part of each token's least important quarter was predicted to be in it; the mean."""
    count = max(1, predicted.shape[1] // LEAST)
    found, least = (values.topk(count, -1, largest=False)[1] for values in (predicted, actual))
    return float((found[:, :, None] == least[:, None, :]).any(-1).float().mean())
