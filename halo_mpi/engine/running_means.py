"""What the root puts in for a late partial sum of a model that is not calibrated: a running mean of those that came."""

import numpy as np

from halo_mpi.schedule.placement import Plan, changed_keys
from halo_mpi.wire.messages import Kind

MEMORY = 64  # answers that the mean looks back on
ATTENTION_LAST = 0.6  # of the last answer's distance from the mean to keep; for the FFN it would be harmful


class RunningMeans:
    """Means of the partial sums of every (kind, layer, worker), f32 [D] each; zero before the first. Has the methods of
    `LowRankEstimates`."""

    def __init__(self, width: int, plan: Plan):
        self._plan = plan
        self._zero = np.zeros(width, np.float32)
        self._means: dict[tuple, np.ndarray] = {}
        self._counts: dict[tuple, int] = {}
        self._last: dict[tuple, np.ndarray] = {}

    def load(self, plan: Plan) -> None:
        """There is nothing to read."""

    def follow(self, plan: Plan) -> None:
        """What is known of parts that another plan changes is known no more."""
        for key in changed_keys(self._plan, plan):
            for known in (self._means, self._counts, self._last):
                known.pop(key, None)
        self._plan = plan

    def begin_text(self) -> None:
        """A new text changes nothing."""

    def observe(self, key: tuple[Kind, int, int], position: int, x: np.ndarray, y: np.ndarray) -> None:
        """The answer y, f32 [T, D], came."""
        count = min(self._counts.get(key, 0) + len(y), MEMORY)
        new = y[0] if len(y) == 1 else y.mean(0)
        mean = self._means.get(key)
        if mean is None:
            self._means[key] = new.copy()
        else:
            mean += (new - mean) * np.float32(min(1.0, len(y) / count))
        self._counts[key] = count
        if key[0] == Kind.ATTENTION:
            self._last[key] = y[-1].copy()  # not a view of a whole prompt's

    def estimate(self, key: tuple[Kind, int, int], position: int, x: np.ndarray) -> np.ndarray:
        """The answer as it probably is: f32 [D]."""
        mean, last = self._means.get(key, self._zero), self._last.get(key)
        return mean.copy() if last is None else mean + np.float32(ATTENTION_LAST) * (last - mean)
