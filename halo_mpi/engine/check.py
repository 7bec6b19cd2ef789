"""`--check`: recompute on the root what was added to the residual stream, and count again."""

import numpy as np

from halo_mpi.engine.ledger import Ledger
from halo_mpi.errors import HaloError

TOLERANCE = 1e-4  # of the largest value; f32 sums in another order differ by far less


class CheckError(HaloError):
    """An invariant does not hold: a defect of this program."""


class Check:
    """Adds up in f64, each once, what the token should consist of: own shares, partial sums that came, estimates that are final."""

    def begin(self, x: np.ndarray) -> None:
        self._sum = x.astype(np.float64)

    def add(self, term: np.ndarray) -> None:
        self._sum += term

    def end(self, x: np.ndarray, ledger: Ledger) -> None:
        """Raises CheckError if x is not the sum, or if not every partial sum that was asked for is in one state."""
        error = np.abs(x - self._sum).max() / max(1.0, np.abs(self._sum).max())
        if not error < TOLERANCE:
            raise CheckError(f"the residual stream is off by {error:.2g} of its largest value; this is a defect, report it")
        if ledger.partial_sums != ledger.asked:
            raise CheckError(
                f"{ledger.asked} partial sums were asked for and {ledger.partial_sums} are accounted for; this is a defect, report it"
            )
