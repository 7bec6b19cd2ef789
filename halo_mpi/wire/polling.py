"""Waiting for messages: test, give the core away; after a while, test and sleep.

Giving the core away (sched_yield) for a millisecond before the first sleep takes a sync with 0.3 ms of work from 0.60 to
0.34 ms on 2 ranks, from 1.20 to 0.78 on 4 and from 2.44 to 2.12 on 8, all on 2 cores (bench/polling.py).
"""

import ctypes
import os
import time

YIELD_S = 1e-3  # after the last message or request
SHORT_S = 50e-6
LONG_S = 1e-3  # between prompts; 2.8 % of a core
PATIENCE_S = 0.05  # silence after which the long sleep is used
PR_SET_TIMERSLACK = 29


def sharpen_timers() -> None:
    """Ask Linux for sleeps of the length asked for (1 ns of slack instead of 50 us); elsewhere do nothing."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    except (AttributeError, OSError):
        pass


class Waiter:
    """What to do between two tests of a request, by how long nothing was heard."""

    def __init__(self, yield_s: float = YIELD_S):
        self._yield_s = yield_s
        self._since = time.perf_counter()

    def now(self) -> float:
        """Seconds on a clock that never goes back."""
        return time.perf_counter()

    def heard(self) -> None:
        """Something came, or was sent and will be answered soon."""
        self._since = time.perf_counter()

    def wait(self) -> None:
        """Let others run for a moment."""
        silent = time.perf_counter() - self._since
        if silent < self._yield_s:
            os.sched_yield()
        else:
            time.sleep(SHORT_S if silent < PATIENCE_S else LONG_S)
