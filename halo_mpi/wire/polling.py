"""Waiting for messages without keeping a core busy: test, then a short sleep.

With more ranks than cores a spinning rank takes the core from the one it waits for (five times slower, measured); with the
kernel's default timer slack a sleep of 50 us takes 100.
"""

import ctypes
import time

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
    """Sleeps between two tests of a request: short ones while messages are expected soon, longer ones in a long silence."""

    def __init__(self):
        self._since = time.perf_counter()

    def heard(self) -> None:
        self._since = time.perf_counter()

    def sleep(self) -> None:
        silent = time.perf_counter() - self._since
        time.sleep(SHORT_S if silent < PATIENCE_S else LONG_S)
