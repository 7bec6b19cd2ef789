"""For halo-mpirun --rejoin: hosts that were left out are looked for while the job goes on without them."""

import json
import threading
import time

from mpirun_hosts import hosts_that_answer

LOOK_EVERY_S = 10.0
AGAIN_S = 60.0  # a host is not taken in more often


class Rejoin:
    """Says which hosts to take in again: those that answer, if a start costs less than it saves."""

    def __init__(self, restarts):
        self._restarts, self._places = restarts, restarts.places
        self._taken_at = {}  # by name
        self._looked_at = time.monotonic()
        self._asking, self._answered = None, frozenset()

    def look(self, began):
        """The names, mostly none; to be called often. `began`: when mpirun was started (time.time())."""
        now = time.monotonic()
        if self._asking:
            if self._asking.is_alive():
                return frozenset()
            self._asking = None
            if self._pays(began):
                self._taken_at |= dict.fromkeys(self._answered, now)
                return self._answered
        elif now - self._looked_at > LOOK_EVERY_S:
            self._looked_at = now
            names = {name for name in self._places.lost if now - self._taken_at.get(name, -AGAIN_S) >= AGAIN_S}
            if names and self._places.ranks_with(names) > self._places.ranks:
                self._asking = threading.Thread(target=self._ask, args=(names,), daemon=True)
                self._asking.start()
        return frozenset()

    def _ask(self, names):
        self._answered = hosts_that_answer(names, self._restarts.agent, self._restarts.marks, lambda: False)

    def _pays(self, began):
        """Whether the tokens still to come will be computed so much faster that a start like the last one is worth it."""
        outlook = read_outlook(self._restarts.checkpoint)
        if not self._answered or not outlook or outlook["first_at"] is None or outlook["first_at"] < began:
            return False
        saved_part = 1 - self._places.ranks / self._places.ranks_with(self._answered)
        return outlook["to_come"] * (outlook["token_s"] or 0.0) * saved_part > outlook["first_at"] - began


def read_outlook(checkpoint):
    """What the program expects: {"to_come": most tokens, "token_s": time of one, "first_at": of its first new one, time.time()}."""
    try:
        return json.loads(checkpoint.read_text())["outlook"]
    except (AttributeError, OSError, ValueError, KeyError, TypeError):
        return None
