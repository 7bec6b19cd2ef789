"""From logits to the next token."""

from dataclasses import dataclass

import numpy as np

from halo_mpi.errors import HaloError, UsageError


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
        how, logits = self._sampling, logits.astype(np.float64)
        if how.repetition_penalty != 1:
            seen = np.unique(np.array(text, np.int64))
            logits[seen] = np.where(
                logits[seen] > 0, logits[seen] / how.repetition_penalty, logits[seen] * how.repetition_penalty
            )
        logits[self._banned] = -np.inf
        if how.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")
        if how.top_k:
            order = order[: how.top_k]
        probability = np.exp(np.maximum(logits[order] - logits[order[0]], -1e3 * how.temperature) / how.temperature)
        probability /= probability.sum()
        keep = np.cumsum(probability) - probability < how.top_p  # the first token that reaches top_p stays
        keep &= probability >= how.min_p * probability[0]
        probability = np.where(keep, probability, 0)
        return int(self._random.choice(order, p=probability / probability.sum()))
