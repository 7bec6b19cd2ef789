"""Whether two copies of a message are enough for a peer."""

WINDOW = 256  # messages; a peer has 60 a token on a model of 30 layers
MUCH = 0.25  # of them; at 2 % of lost packets no window has so many, at 5 % some, at 10 % nearly all


class Lateness:
    """Counts a peer's messages that came while a copy of the one before was still missing.

    `is_much`: so many were, in some window, that more copies pay. At 5 % of lost packets that makes no difference, at 10 % much.
    """

    def __init__(self):
        self.is_much = False
        self._seen = self._late = 0

    def observe(self, late: bool) -> None:
        """One more message has come, late or not."""
        self._seen += 1
        self._late += late
        if self._seen == WINDOW:
            self.is_much = self.is_much or self._late > MUCH * WINDOW
            self._seen = self._late = 0
