"""The texts that bench.rank measures, the same for us and for a peer."""

import json
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.quality import language_reference
from halo_mpi.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Case:
    """A text: at most so many tokens of prompt, then so many generated. What counts is TTFT if `prefill`, else the median TPOT."""

    prompt: int
    tokens: int
    prefill: bool = False

    def value(self, run: dict, name: str) -> float | None:
        found = (run.get("cases") or {}).get(name)
        if not found:
            return None
        return found["ttft_ms"] if self.prefill else float(np.median(found["tpot_ms"][1:]))  # the first is warm-up


CASES = {
    "warm-up": Case(64, 16),
    "decode": Case(16, 65),
    "prefill-512": Case(512, 1, prefill=True),
    "decode-2000": Case(1984, 33),
}
WARM_UP = "warm-up"
SPARE = 16  # positions of the peer's context beyond the longest case


def fit_prompt(tokenizer: Tokenizer, text: str, tokens: int) -> tuple[str, list[int]]:
    """The longest beginning of the text, cut between words, that has at most so many tokens, and their ids."""
    words = text.split(" ")[: tokens + 1]

    def ids(count: int) -> list[int]:
        return tokenizer.encode(" ".join(words[:count]))

    count = max(1, bisect_right(range(1, len(words) + 1), tokens, key=lambda count: len(ids(count))))
    return " ".join(words[:count]), ids(count)


class Texts:
    """The prompts of the cases, as a file for generate and as token ids for the peer."""

    def __init__(self, tokenizer: Tokenizer, cases: tuple[str, ...], folder: Path):
        self.file, text = folder / "prompts.jsonl", language_reference()
        self.banned, self.cases = list(tokenizer.eos_ids), {name: CASES[name] for name in (WARM_UP, *cases)}
        prompts = {name: fit_prompt(tokenizer, text, case.prompt) for name, case in self.cases.items()}
        self.ids = {name: ids for name, (_, ids) in prompts.items()}
        lines = [{"id": name, "prompt": prompts[name][0], "max_tokens": case.tokens} for name, case in self.cases.items()]
        self.file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    @property
    def longest(self) -> int:
        return max(len(self.ids[name]) + case.tokens for name, case in self.cases.items())
