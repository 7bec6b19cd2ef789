"""Guesses of the tokens to come from the text itself: what followed its last tokens where they stood before.

A pass of the model over several tokens takes as many syncs as over one, and little more computing. So guesses are computed along with
the last token of the text, and count as far as the model's own choice is the same; its choice after them is one more token. The
text is the one that would be written without guesses. (arXiv 2211.17192 with the text as the draft, known as prompt lookup.)
"""

from dataclasses import dataclass

import numpy as np

MOST_GUESSES = 15  # in a pass
AUTO = 8  # of --lookup auto: docs/speed.md has what others take
LONGEST = 4  # tokens that are looked up: with 2 a token costs 4 % more on bench/texts/lookup.jsonl, with 6 or 8 no less
CLEAN = (0.0, 0.1)  # of a pass's time that any guesses take, and each, at first; int4 kernels: 78 us for 1 row, 96 for 4
LOSSY = (1.5, 0.3)  # the same where packets are lost; bench.lookup at 5 %: five take 2.5, eight up to 4.7
EXPECTED_PASSES = 2.0  # that this counts for
WORTH = 1.05  # times as fast as without guesses; for less there are none
OUTLIER = 10  # times the usual pass: longer ones count as this
LEARNED, DOUBTED = 0.1, 0.003  # how fast the usual pass is learned, and what others take forgotten while there are none
# Of a guess, by how many tokens were found again, at first. SmolLM2-135M on bench/texts/lookup.jsonl: 0.2 to 0.3, 0.7, 0.9, 0.94.
CHANCE = {1: 0.25, 2: 0.65, 3: 0.85, 4: 0.9}
EXPECTED = 1.0  # guesses that this counts for
FORGOTTEN = 0.03  # of what was seen, in a pass


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
    """Guesses at most `most` tokens at a time; 0: never any.

    It learns how often it is right from every token, whether it was guessed or would have been; `times`: what that costs.
    """

    def __init__(self, most: int):
        self.most = most
        self.times = PassTimes()
        self._right = dict.fromkeys(CHANCE, 0.0)  # guesses, by how many tokens were found again
        self._seen = dict.fromkeys(CHANCE, 0.0)
        self.begin([])

    def begin(self, text: list[int]) -> None:
        """Another text, with its tokens so far."""
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # some tokens -> where the one is that followed them last
        self._found, self._expected = 0, []  # tokens, and what should follow them
        self.add(text)

    def add(self, tokens: list[int]) -> None:
        """The text goes on."""
        if not self.most:
            return
        self._judge(tokens)
        text = self._text
        for token in tokens:
            for length in range(1, min(LONGEST, len(text)) + 1):
                self._after[tuple(text[-length:])] = len(text)
            text.append(token)

    def guess(self, most: int) -> list[int]:
        """The tokens that will probably follow, at most so many."""
        text, most = self._text, min(most, self.most)
        for length in range(min(LONGEST, len(text)), 0, -1) if most > 0 else ():
            if (start := self._after.get(tuple(text[-length:]))) is not None:
                expected = text[start : start + most]
                while len(expected) < most:  # a text that repeats itself goes on so
                    expected += expected
                self._found, self._expected = length, expected[:most]
                return expected[: min(most, self._worth(length))]
        return []

    def _judge(self, tokens: list[int]) -> None:
        """What was expected, up to the first that is wrong."""
        if not self._found:
            return
        right = 0
        for token, expected in zip(tokens, self._expected):
            if token != expected:
                break
            right += 1
        for length in CHANCE:
            self._right[length] *= 1 - FORGOTTEN
            self._seen[length] *= 1 - FORGOTTEN
        self._right[self._found] += right
        self._seen[self._found] += min(right + 1, len(tokens), len(self._expected))
        self._found = 0

    def _worth(self, length: int) -> int:
        """How many guesses give the most tokens in a time, if each is right as often as those of this length were."""
        chance = (self._right[length] + CHANCE[length] * EXPECTED) / (self._seen[length] + EXPECTED)
        tokens = 1 + np.cumsum([0.0] + [chance**number for number in range(1, self.most + 1)])
        speeds = tokens / self.times.relative(np.arange(self.most + 1))
        return int(np.argmax(speeds)) if speeds.max() > WORTH else 0


class PassTimes:
    """What passes with guesses take, of the time of one without: 1 + step + row x guesses, fitted to the latest ones.

    By slow kernels a row takes more than elsewhere; on lossy links the first one does: with it a message is more than a packet, and is
    not sent twice.
    """

    def __init__(self):
        self._alone_s = 0.0
        self._lossy = False
        self._expect(*CLEAN)

    def _expect(self, step: float, row: float) -> None:
        some = np.arange(1, AUTO + 1)
        self._expected = _sums(some, step + row * some) * EXPECTED_PASSES / AUTO
        self._seen = np.zeros_like(self._expected)

    def expect_losses(self) -> None:
        """Packets are lost, as has been found out just now or before."""
        if not self._lossy:
            self._lossy = True
            self._expect(*LOSSY)

    def add(self, guesses: int, seconds: float) -> None:
        """A pass took so long."""
        alone_s = self._alone_s or seconds
        seconds = min(seconds, OUTLIER * alone_s)
        if not guesses:
            self._alone_s = alone_s + LEARNED * (seconds - alone_s)
            self._seen *= 1 - DOUBTED
        elif self._alone_s:
            self._seen = (1 - FORGOTTEN) * self._seen + _sums(np.array([guesses]), np.array([seconds / alone_s - 1]))

    def relative(self, guesses: np.ndarray) -> np.ndarray:
        """The times of passes with so many guesses each."""
        count, x, xx, y, xy = self._expected + self._seen
        row = max(0.0, (count * xy - x * y) / (count * xx - x * x))
        step = max(0.0, (y - row * x) / count)
        return 1 + (step + row * guesses) * (guesses > 0)


def _sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What a line is fitted by."""
    return np.array([len(x), x.sum(), (x * x).sum(), y.sum(), (x * y).sum()], float)
