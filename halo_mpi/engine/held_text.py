"""The text whose K and V the caches of all ranks hold, so that the next one need not begin anew where it begins alike."""


class HeldText:
    """`tokens`: of the text so far, guesses among them. Their K and V are good for any text with the same beginning."""

    def __init__(self):
        self.tokens: list[int] = []
        self._exact = 0  # of these, from the first on, were computed without estimates

    def compute(self, tokens: list[int], position: int, exact: bool) -> None:
        """These are computed now, at `position`."""
        self.tokens[position:] = tokens
        if exact and position <= self._exact:
            self._exact = position + len(tokens)
        else:
            self._exact = min(self._exact, position)

    def shared(self, tokens: list[int]) -> int:
        """How many of these tokens the exact text begins with."""
        for place, (held, token) in enumerate(zip(self.tokens[: self._exact], tokens)):
            if held != token:
                return place
        return min(self._exact, len(tokens))
