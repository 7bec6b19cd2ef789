"""From a prompt to a finished text on the root: tokens one by one, until the model, a stop text or the limit ends it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from halo_mpi.engine.sampling import Sampler, Sampling
from halo_mpi.engine.session import Session
from halo_mpi.model.tokenizer import TextStream


@dataclass(slots=True)
class Completion:
    """A finished text and its times. `tpot_ms` has one sample per token after the first."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"  # or "stop": end-of-text token or a stop text
    ttft_ms: float = 0.0
    tpot_ms: list[float] = field(default_factory=list)


def complete(session: Session, prompt: list[int], sampling: Sampling, write: Callable[[str], None],
             max_seconds: float | None = None) -> Completion:  # fmt: skip
    """Continue `prompt` (token ids) on the root; every piece of text that may be shown goes to `write` at once.

    After `max_seconds` since the first token no further one is begun. The end-of-text token is no part of the
    result. With `ignore_eos` it is banned, so that `max_tokens` are generated.
    """
    root, tokenizer, result = session.root, session.tokenizer, Completion()
    stream = TextStream(tokenizer, sampling.stop)
    ends = set(tokenizer.eos_ids)
    sampler = Sampler(sampling, banned=tuple(ends) if sampling.ignore_eos else ())
    session.marks.phase("prefill")
    begin = time.perf_counter()
    logits = root.prefill(prompt)
    while True:
        token = sampler.pick(logits, prompt + result.token_ids)
        now = time.perf_counter()
        if not result.token_ids:
            result.ttft_ms = (now - begin) * 1e3
        else:
            result.tpot_ms.append((now - begin) * 1e3)
        begin = now
        if token in ends:
            result.finish_reason = "stop"
            break
        result.token_ids.append(token)
        write(stream.push(token))
        session.token_done()
        if stream.stopped:
            result.finish_reason = "stop"
            break
        over = max_seconds is not None and sum(result.tpot_ms) >= max_seconds * 1e3
        if len(result.token_ids) == sampling.max_tokens or over:
            break
        logits = root.step(token, len(prompt) + len(result.token_ids) - 1)
    write(stream.finish())
    result.text = stream.text
    return result
