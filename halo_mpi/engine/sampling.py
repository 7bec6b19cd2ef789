"""From logits to the next token."""

from dataclasses import dataclass

import numpy as np

from halo_mpi.errors import HaloError, UsageError


FIRST = 256  # tokens that are sorted, and more only if these do not reach top_p


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when a text ends. Temperature 0 is greedy; 0 switches top_k and min_p off, 1 top_p."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        limits = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < np.inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < np.inf, "above 0"),
            "seed": (self.seed >= 0, "0 or more"),
            "stop": (all(self.stop), "not empty"),
        }
        for name, (valid, rule) in limits.items():
            if not valid:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {rule}")


def require_finite(logits: np.ndarray) -> None:
    """Raise HaloError if the model's logits are not finite."""
    if not np.isfinite(logits).all():
        raise HaloError("the model's logits are not finite; check the model with `halo-mpi inspect --verify`, or use --wire f32")


class Sampler:
    """Chooses tokens for one text; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling, banned: tuple[int, ...] = ()):
        self._sampling = sampling
        self._banned = list(banned)
        self._random = np.random.default_rng(sampling.seed)

    @property
    def random_state(self) -> dict:
        """What, set again, makes the same draws follow: whole numbers and names, as JSON holds them."""
        return self._random.bit_generator.state

    @random_state.setter
    def random_state(self, state: dict) -> None:
        self._random.bit_generator.state = state

    def pick(self, logits: np.ndarray, text: list[int]) -> int:
        """The next token id, for logits f32 [V] and the ids so far (prompt included), which the repetition penalty looks at.

        Order: repetition penalty (arXiv 1909.05858), temperature, top-k, top-p (arXiv 1904.09751), min-p (arXiv
        2407.01082). Raises HaloError if the logits are not finite.
        """
        require_finite(logits)
        how = self._sampling
        if how.temperature == 0 and how.repetition_penalty == 1 and (best := int(logits.argmax())) not in self._banned:
            return best
        logits = logits.astype(np.float64)
        if how.repetition_penalty != 1:
            seen = np.unique(np.array(text, np.int64))
            logits[seen] = np.where(
                logits[seen] > 0, logits[seen] / how.repetition_penalty, logits[seen] * how.repetition_penalty
            )
        logits[self._banned] = -np.inf
        if how.temperature == 0:
            return int(logits.argmax())
        best = logits.max()
        if how.top_k and how.top_k < len(logits):
            least = np.partition(logits, -how.top_k)[-how.top_k]
            rest = np.flatnonzero(logits == least)[how.top_k - np.count_nonzero(logits > least) :]  # of equals the first stay
            logits[logits < least], logits[rest] = -np.inf, -np.inf
        probability = np.exp(np.maximum(logits - best, -1e3 * how.temperature) / how.temperature)
        beyond = self._beyond(probability, how.top_p) if how.top_p < 1 else []
        probability[probability < how.min_p] = 0  # the best one's is 1
        probability[beyond] = 0
        ends = np.cumsum(probability)
        drawn = np.searchsorted(ends, self._random.random() * ends[-1], side="right")
        return int(min(drawn, np.flatnonzero(probability)[-1]))  # the product may be rounded up

    @staticmethod
    def _beyond(probability: np.ndarray, top_p: float) -> np.ndarray:
        """The tokens behind those that reach `top_p` of all, by probability; the first that reaches it is not one of them."""
        wanted, count = top_p * probability.sum(), FIRST
        while True:
            count = min(count, len(probability))
            likely = np.argpartition(-probability, count - 1)[:count] if count < len(probability) else np.arange(count)
            order = likely[np.lexsort((likely, -probability[likely]))]
            before = np.cumsum(probability[order]) - probability[order]
            if before[-1] >= wanted or count == len(probability):
                behind = np.ones(len(probability), bool)
                behind[order[before < wanted]] = False
                return np.flatnonzero(behind)
            count *= 8
