"""An independent implementation to compare with: transformers, on the same weights."""

from pathlib import Path

import numpy as np
import torch
import transformers


class Reference:
    """A model of transformers in f32, loaded from the same GGUF file."""

    def __init__(self, gguf: Path):
        folder, name = gguf.parent, gguf.name
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, ids: list[int]) -> np.ndarray:
        """f32 [T, V]."""
        return self.model(torch.tensor([ids])).logits[0].numpy()

    @torch.no_grad()
    def greedy(self, prompt: list[int], tokens: int, banned: int) -> tuple[list[int], list[float]]:
        """The likeliest continuation and, for each of its tokens, by how much its logit leads the second."""
        ids, margins, cache = [], [], None
        step = torch.tensor([prompt])
        for _ in range(tokens):
            output = self.model(step, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[0, -1].clone()
            logits[banned] = -torch.inf
            best = torch.topk(logits, 2)
            ids.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            step = best.indices[:1][None]
        return ids, margins

    @torch.no_grad()
    def perplexity(self, ids: list[int], window: int) -> float:
        """Windows of `window` tokens, each afresh; the first token of each is not scored."""
        losses = []
        for start in range(0, len(ids), window):
            part = torch.tensor([ids[start : start + window]])
            if part.shape[1] > 1:
                logits = self.model(part).logits[0, :-1].double()
                losses.append(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="none"))
        return float(torch.cat(losses).mean().exp())


def same_until_uncertain(ids: list[int], expected: list[int], margins: list[float], limit: float = 1e-3) -> bool:
    """Whether the ids agree up to the first place where the reference itself cannot tell (top-2 margin below `limit`)."""
    certain = next((place for place, margin in enumerate(margins) if margin < limit), len(margins))
    return ids[:certain] == expected[:certain] and certain >= len(expected) // 2
