"""The order of an FFN's neurons: the important ones first, so that a group is wholly important or wholly not.

Neurons are sorted in units. With units of 32 the 4-bit and 8-bit blocks of the down projection, which run along the neurons,
move as they are and nothing is rounded again. A last, shorter unit stays where it is.
"""

import numpy as np
import torch

from halo_mpi.model.layer_weights import LayerWeights


def order_of(importance: np.ndarray, unit: int) -> np.ndarray:
    """Units by falling importance, int [units], of neurons' importance [F]."""
    whole = len(importance) // unit
    sums = importance[: whole * unit].reshape(whole, unit).sum(1)
    rest = [whole] * (len(importance) > whole * unit)
    return np.concatenate((np.argsort(-sums, kind="stable"), rest)).astype(np.int64)


def neurons(order: np.ndarray, unit: int, count: int) -> np.ndarray:
    """The neurons in the units' order, int [F]."""
    return np.concatenate([np.arange(own * unit, min(count, (own + 1) * unit)) for own in order])


def put_in_order(weights: LayerWeights, order: np.ndarray, unit: int) -> None:
    """Sort a whole layer's neurons."""
    count = weights.down.shape[1]
    chosen = torch.from_numpy(neurons(order, unit, count))
    both = torch.cat((chosen, chosen + count))
    weights.gate_up, weights.down = weights.gate_up[both], weights.down[:, chosen]
    if weights.gate_up_bias is not None:
        weights.gate_up_bias = weights.gate_up_bias[both]
