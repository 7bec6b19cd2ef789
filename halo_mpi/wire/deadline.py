"""When an answer is late: learned from how long a worker's answers took.

An answer is late when it has taken longer than the worker's usual time and some margin. To go on without it pays only
where late answers cost time. In the fault-free case they do not: a busy machine's hiccups are as rare as they are short,
and waiting them out keeps every token exact. So the deadline is short only while the time lost after it is more than
`WORTH` of a sync, and `PATIENT_S` otherwise.
"""

import numpy as np

WINDOW = 256  # answers; two per layer and token, so some tokens
AGAIN = 16  # answers between two looks at the window
MARGIN_S = 1e-3
SPREADS = 3.0  # times the distance between the median and the third quartile
WORTH = 0.04
FORGIVEN = 2  # the worst answers in the window: one hiccup of 40 ms is not a lossy link
ENOUGH = 64  # answers before a deadline is short, or a mean is known
PATIENT_S = 0.025
OUTAGE_S = 0.25
FIRST_S = 0.05  # before anything is known


class Deadline:
    """The deadline of one worker's answers. `fixed_s`: after the root's own share is done; None: learned."""

    def __init__(self, fixed_s: float | None):
        self._fixed_s = fixed_s
        self._latencies = np.zeros(WINDOW)
        self._count = 0
        self._usual_s, self._mean_s, self._allowed_s = 0.0, 0.0, FIRST_S

    @property
    def usual_s(self) -> float:
        """The median of the recent answers' times, from the request on."""
        return self._usual_s

    @property
    def mean_s(self) -> float:
        """Their mean, once there are enough to tell a slow worker from one stall; 0 before."""
        return self._mean_s

    def observe(self, latency_s: float) -> None:
        """An answer came `latency_s` after its request. An outage tells nothing of the usual time."""
        if latency_s > OUTAGE_S:
            return
        self._latencies[self._count % WINDOW] = latency_s
        self._count += 1
        if self._count % AGAIN == 0:
            self._learn()

    def at(self, asked: float, own_done: float) -> float:
        """Until when to wait for an answer asked for at `asked`, if the root's own share was done at `own_done`."""
        if self._fixed_s is not None:
            return own_done + self._fixed_s
        return max(asked + self._allowed_s, own_done)

    def _learn(self) -> None:
        recent = self._latencies[: min(self._count, WINDOW)]
        self._mean_s = float(recent.mean()) if len(recent) >= ENOUGH else 0.0
        self._usual_s, quartile = np.percentile(recent, (50, 75)).tolist()
        short_s = self._usual_s + MARGIN_S + SPREADS * (quartile - self._usual_s)
        lost_s = np.sort(np.maximum(recent - short_s, 0))[:-FORGIVEN].sum() / len(recent)
        pays = len(recent) >= ENOUGH and lost_s > WORTH * self._usual_s
        self._allowed_s = short_s if pays else max(short_s, PATIENT_S)
