"""Sums over tokens that a least-squares fit needs, and the fit.

Whatever calibration fits is linear in a layer's input, so first and second moments suffice: memory does not grow with the
text, and the ranks' sums add up.
"""

from dataclasses import dataclass

import numpy as np
import torch

from halo_mpi.predict.fits import LowRank
from halo_mpi.wire.exchange import add_up


class Moments:
    """Weighted moments of inputs x [T, D] and targets z [T, K], in float64: 8 (D + K + 1) (D + 1) bytes."""

    def __init__(self, inputs: int, targets: int):
        self.weight = torch.zeros(1, dtype=torch.float64)
        self.x = torch.zeros(inputs, dtype=torch.float64)
        self.z = torch.zeros(targets, dtype=torch.float64)
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.xz = torch.zeros(inputs, targets, dtype=torch.float64)

    def add(self, x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Count tokens: x f32 [T, D], z f32 [T, K], weight f32 [T] or None for 1."""
        weighted = x if weight is None else x * weight[:, None]
        self.weight += len(x) if weight is None else weight.sum()
        self.x += weighted.sum(0)
        self.z += z.sum(0) if weight is None else weight @ z
        self.xx += weighted.T @ x
        self.xz += weighted.T @ z

    def add_up(self, comm) -> None:
        """Add the sums of all ranks on the root (collective)."""
        for sums in (self.weight, self.x, self.z, self.xx, self.xz):
            add_up(comm, sums.numpy())

    def solve(self, ridge: float) -> "Fit":
        """The weighted least-squares fit of z by an affine map of x; `ridge` times the inputs' mean variance is added to theirs.

        Raises ValueError if there is nothing to fit.
        """
        if self.weight <= 0:
            raise ValueError("no tokens were counted")
        mean_x, mean_z = self.x / self.weight, self.z / self.weight
        covariance = self.xx / self.weight - torch.outer(mean_x, mean_x)
        covariance += torch.eye(len(mean_x), dtype=torch.float64) * (ridge * covariance.diagonal().mean() + 1e-12)
        factor = torch.linalg.cholesky(covariance)
        coefficients = torch.cholesky_solve(self.xz / self.weight - torch.outer(mean_x, mean_z), factor)
        return Fit(mean_x.float(), mean_z.float(), factor.float(), coefficients.float())


@dataclass(frozen=True, slots=True)
class Fit:
    """z is about mean_z + (x - mean_x) coefficients; `factor`: Cholesky's, of the inputs' covariance."""

    mean_x: torch.Tensor  # f32 [D]
    mean_z: torch.Tensor  # f32 [K]
    factor: torch.Tensor  # f32 [D, D]
    coefficients: torch.Tensor  # f32 [D, K]

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """[T, K] for x [T, D]."""
        return (x - self.mean_x) @ self.coefficients + self.mean_z

    def low_rank(self, targets: slice, out: torch.Tensor, rank: int) -> LowRank:
        """The best map of that rank from x to y = z[targets] out', out f32 [D, K'], for inputs with this covariance.

        Reduced-rank regression: the singular value decomposition of factor' coefficients out', whose rank is at most K', so
        that it is done on the K' x K' core between two QR decompositions.
        """
        map_ = self.coefficients[:, targets]  # [D, K']
        left, right = torch.linalg.qr(self.factor.T @ map_)[1], torch.linalg.qr(out)
        directions = torch.linalg.svd(left @ right[1].T)[2][:rank]
        outward = directions @ right[0].T  # [rank, D], orthonormal
        inward = (map_ @ (out.T @ outward.T)).T  # [rank, D]
        bias = out @ self.mean_z[targets] - outward.T @ (inward @ self.mean_x)
        balance = (inward.abs().amax(1, keepdim=True) / outward.abs().amax(1, keepdim=True)).clamp(min=1e-12).sqrt()
        inward, outward = inward / balance, outward * balance  # both in the range that 8 bits with an f16 scale keep
        padding = ((0, rank - len(inward)), (0, 0))
        return LowRank(np.pad(inward.numpy(), padding), np.pad(outward.numpy(), padding), bias.numpy())


def apply(fit: LowRank, x: torch.Tensor) -> torch.Tensor:
    """y, f32 [T, D], for x, f32 [T, D]."""
    inward, outward, bias = (torch.from_numpy(array) for array in (fit.inward, fit.outward, fit.bias))
    return torch.addmm(bias, x @ inward.T, outward)
