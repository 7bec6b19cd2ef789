"""From a prompt to a finished text on the root: tokens one by one, until the model, a stop text or the limit ends it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from halo_mpi.engine.checkpoint import Checkpoint, Saved
from halo_mpi.engine.ending import Ending
from halo_mpi.engine.lookup import Guesser, PassCounts
from halo_mpi.engine.prompts import Prompt
from halo_mpi.engine.root import Root
from halo_mpi.engine.sampling import Sampler
from halo_mpi.engine.session import Session
from halo_mpi.model.tokenizer import TextStream


@dataclass(slots=True)
class Completion:
    """A text and its times. `tpot_ms` has one sample per token after the first, of those that this run computed; tokens of one pass
    share its time evenly."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"  # or "stop": end-of-text token or a stop text; "terminated": not finished
    ttft_ms: float = 0.0
    tpot_ms: list[float] = field(default_factory=list)
    passes: PassCounts = field(default_factory=PassCounts)


def complete(session: Session, prompt: Prompt, write: Callable[[str], None], checkpoint: Checkpoint, ending: Ending,
             guesser: Guesser, saved: Saved | None = None, max_seconds: float | None = None) -> Completion:  # fmt: skip
    """Continue a prompt on the root; every piece of text that may be shown goes to `write` at once.

    `saved`: what there is of the text already; it is written again, and gone on with. After `max_seconds` since the first token
    no further one is begun, nor once `ending` was asked for. The end-of-text token is no part of the result. With `ignore_eos`
    it is banned, so that `max_tokens` are generated.
    """
    tokenizer, sampling, result = session.tokenizer, prompt.sampling, Completion()
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
    checkpoint.begin(prompt, sampler.random_state, ids, result.ttft_ms, spent_s)

    def reason_to_end() -> str | None:
        if stream.stopped:
            return "stop"
        if len(ids) == sampling.max_tokens or ids and max_seconds is not None and spent_s >= max_seconds:
            return "length"
        return "terminated" if ending.asked else None

    session.marks.phase("prefill")
    following = tokens_after(session.root, prompt.tokens + ids, prompt.longest, sampler, ends, guesser, result.passes)
    computed = False  # whether the caches hold the text
    while (reason := reason_to_end()) is None:
        token, random, took_s = next(following)
        if ids:
            spent_s += took_s
            if computed:
                result.tpot_ms.append(took_s * 1e3)
        else:
            result.ttft_ms = took_s * 1e3
        computed = True
        if token in ends:
            reason = "stop"
            break
        ids.append(token)
        checkpoint.token(token, random, result.ttft_ms, spent_s)
        write(stream.push(token))
        session.token_done()
    rest = stream.finish()
    if not (reason == "terminated" and ending.again):
        write(rest)
    result.text, result.finish_reason = stream.text, reason
    return result


def tokens_after(root: Root, text: list[int], longest: int, sampler: Sampler, ends: set[int], guesser: Guesser,
                 counts: PassCounts) -> Iterator[tuple[int, dict, float]]:  # fmt: skip
    """The tokens that follow a text, each with the sampler's state after it and the seconds that it took, until one `ends` it.

    A pass computes the last token and guesses of those to come. Tokens are chosen one after the other as without guesses, with the same
    draws, as long as the guess of the one before was right.
    """
    text, begin, guesses = list(text), time.perf_counter(), []
    guesser.begin(text)
    counts.prefix = root.held(text)
    logits = [root.prefill(text, counts.prefix)]
    while True:
        chosen = []
        for row, guess in zip(logits, [*guesses, None]):
            token = sampler.pick(row, text)
            text.append(token)
            chosen.append((token, sampler.random_state))
            if token != guess or token in ends:
                break
        now = time.perf_counter()
        counts.accepted += len(chosen) - 1
        if counts.passes:
            guesser.times.add(len(guesses), now - begin)
        if root.on_lossy_links:
            guesser.times.expect_losses()
        guesser.add(text[-len(chosen) :])
        for token, random in chosen:
            yield token, random, (now - begin) / len(chosen)
        begin, guesses = now, guesser.guess(longest - len(text) - 1)
        counts.passes += 1
        counts.proposed += len(guesses)
        logits = root.steps([text[-1], *guesses], len(text) - 1)
