"""Guesses of the tokens to come from the text itself: what followed its last tokens where they stood before.

A pass of the model over several tokens takes as many syncs as over one, and little more computing. So guesses are computed along with
the last token of the text, and count as far as the model's own choice is the same; its choice after them is one more token. The
text is the one that would be written without guesses. (arXiv 2211.17192 with the text as the draft, known as prompt lookup.)
"""

import math
from dataclasses import dataclass

MOST_GUESSES = 15  # in a pass
AUTO = 8  # of --lookup auto: docs/speed.md has what others take
LONGEST = 4  # tokens that are looked up: with 2 a token costs 4 % more on bench/texts/lookup.jsonl, with 6 or 8 no less
WORTH = 0.1  # chance of being right from which a guess is made; a further row takes 0.08 of the time of a pass that only computes
# Of a guess, by how many tokens were found again, at first. SmolLM2-135M on bench/texts/lookup.jsonl: 0.2 to 0.3, 0.7, 0.9, 0.94.
CHANCE = {1: 0.25, 2: 0.65, 3: 0.85, 4: 0.9}
EXPECTED = 1.0  # guesses that this counts for
FORGOTTEN = 0.03  # of what was seen, in a pass: so even where nothing is ever right, one pass in some tries again


@dataclass(slots=True)
class PassCounts:
    """Passes after the prompt's, guesses that were computed in them, and tokens that they gave beyond one each. `prefix`: tokens of
    the prompt that the caches held."""

    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    prefix: int = 0

    def __add__(self, other: "PassCounts") -> "PassCounts":
        return PassCounts(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def to_dict(self) -> dict:
        tokens = (self.passes + self.accepted) / self.passes if self.passes else None
        return {
            "passes": self.passes,
            "proposed": self.proposed,
            "accepted": self.accepted,
            "tokens_per_pass": tokens and round(tokens, 3),
        }


class Guesser:
    """Guesses at most `most` tokens at a time; 0: never any."""

    def __init__(self, most: int):
        self.most = most
        self._right = dict.fromkeys(CHANCE, 0.0)  # guesses, by how many tokens were found again
        self._made = dict.fromkeys(CHANCE, 0.0)
        self.begin([])

    def begin(self, text: list[int]) -> None:
        """Another text, with its tokens so far."""
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # some tokens -> where the one is that followed them last
        self._found = 0  # tokens, of the last guesses
        self.add(text)

    def add(self, tokens: list[int]) -> None:
        """The text goes on."""
        if not self.most:
            return
        text = self._text
        for token in tokens:
            for length in range(1, min(LONGEST, len(text)) + 1):
                self._after[tuple(text[-length:])] = len(text)
            text.append(token)

    def guess(self, most: int) -> list[int]:
        """The tokens that will probably follow, at most so many; `judge` must be told what became of them."""
        self._found, text, most = 0, self._text, min(most, self.most)
        for length in range(min(LONGEST, len(text)), 0, -1) if most > 0 else ():
            if (start := self._after.get(tuple(text[-length:]))) is not None:
                self._found = length
                count, guesses = min(most, self._worth(length)), text[start : start + most]
                while guesses and len(guesses) < count:  # a text that repeats itself goes on so
                    guesses += guesses
                return guesses[:count]
        return []

    def judge(self, made: int, right: int) -> None:
        """Of the guesses, so many were looked at up to the first wrong one, and so many of these were right."""
        for length in CHANCE:
            self._right[length] *= 1 - FORGOTTEN
            self._made[length] *= 1 - FORGOTTEN
        if made:
            self._right[self._found] += right
            self._made[self._found] += made

    def _worth(self, length: int) -> int:
        """How many guesses are: the last one's chance is that of all before it being right, too."""
        chance = (self._right[length] + CHANCE[length] * EXPECTED) / (self._made[length] + EXPECTED)
        return int(math.log(WORTH) / math.log(min(chance, 0.99)))
