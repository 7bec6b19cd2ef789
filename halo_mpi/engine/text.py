"""From a prompt to a finished text on the root: tokens one by one, until the model, a stop text or the limit ends it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from halo_mpi.engine.checkpoint import Checkpoint, Saved
from halo_mpi.engine.ending import Ending
from halo_mpi.engine.prompts import Prompt
from halo_mpi.engine.sampling import Sampler
from halo_mpi.engine.session import Session
from halo_mpi.model.tokenizer import TextStream


@dataclass(slots=True)
class Completion:
    """A text and its times. `tpot_ms` has one sample per token after the first, of those that this run computed."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"  # or "stop": end-of-text token or a stop text; "terminated": not finished
    ttft_ms: float = 0.0
    tpot_ms: list[float] = field(default_factory=list)


def complete(session: Session, prompt: Prompt, write: Callable[[str], None], checkpoint: Checkpoint, ending: Ending,
             saved: Saved | None = None, max_seconds: float | None = None) -> Completion:  # fmt: skip
    """Continue a prompt on the root; every piece of text that may be shown goes to `write` at once.

    `saved`: what there is of the text already; it is written again, and gone on with. After `max_seconds` since the first token
    no further one is begun, nor once `ending` was asked for. The end-of-text token is no part of the result. With `ignore_eos`
    it is banned, so that `max_tokens` are generated.
    """
    root, tokenizer, sampling, result = session.root, session.tokenizer, prompt.sampling, Completion()
    stream = TextStream(tokenizer, sampling.stop)
    ends = set(tokenizer.eos_ids)
    sampler = Sampler(sampling, banned=tuple(ends) if sampling.ignore_eos else ())
    ids, spent_s = result.token_ids, 0.0  # since the first token
    if saved:
        sampler.random_state, result.ttft_ms, spent_s = saved.random, saved.ttft_ms, saved.spent_s
        ids += saved.token_ids
        for token in ids:
            write(stream.push(token))
        session.resumed(len(ids))
    checkpoint.begin(prompt, sampler, ids, result.ttft_ms, spent_s)

    def reason_to_end() -> str | None:
        if stream.stopped:
            return "stop"
        if len(ids) == sampling.max_tokens or ids and max_seconds is not None and spent_s >= max_seconds:
            return "length"
        return "terminated" if ending.asked else None

    session.marks.phase("prefill")
    begin, computed = time.perf_counter(), False  # whether the caches hold the text
    while (reason := reason_to_end()) is None:
        text = prompt.tokens + ids
        logits = root.step(text[-1], len(text) - 1) if computed else root.prefill(text)
        token = sampler.pick(logits, text)
        now = time.perf_counter()
        if ids:
            spent_s += now - begin
            if computed:
                result.tpot_ms.append((now - begin) * 1e3)
        else:
            result.ttft_ms = (now - begin) * 1e3
        begin, computed = now, True
        if token in ends:
            reason = "stop"
            break
        ids.append(token)
        checkpoint.token(token, sampler, result.ttft_ms, spent_s)
        write(stream.push(token))
        session.token_done()
    rest = stream.finish()
    if not (reason == "terminated" and ending.again):
        write(rest)
    result.text, result.finish_reason = stream.text, reason
    return result
