"""What calibration finds out about a layer."""

from dataclasses import dataclass

import numpy as np


SINKS = 1  # tokens at the start of a text: attention sinks, a hundred times larger than others; nothing is fitted to or estimated of them


@dataclass(frozen=True, slots=True)
class LowRank:
    """y is about bias + outward' (inward x)."""

    inward: np.ndarray  # f32 [rank, D]
    outward: np.ndarray  # f32 [rank, D]
    bias: np.ndarray  # f32 [D]


@dataclass(slots=True)
class Judged:
    """Held out. `correlation`: of predicted with actual sizes, by rank; `recall`: of the least important quarter; groups, heads.

    `recovered`: the share of |output|^2 that an estimate explains, of tokens that count alike. `memory`: how much of an
    estimate's error is that of the token before.
    """

    correlation: tuple[float, float]
    recall: tuple[float, float]
    groups_recovered: np.ndarray  # f32 [G]
    groups_memory: np.ndarray  # f32 [G]
    heads_recovered: np.ndarray  # f32 [H]
    heads_memory: np.ndarray  # f32 [H]


@dataclass(slots=True)
class LayerFit:
    """All that is found out about one layer; G groups in their new order, H heads."""

    order: np.ndarray  # int [units], the FFN's units of neurons by falling importance
    groups: list[LowRank]
    heads: list[LowRank]
    weight: np.ndarray  # f32 [G + H, D], and
    bias: np.ndarray  # f32 [G + H]: log |output| of groups, then heads, from the inputs one layer before
    importance: np.ndarray  # f32 [G + H]: mean |output|, as a share of the groups' sum, or of the heads'
    judged: Judged
