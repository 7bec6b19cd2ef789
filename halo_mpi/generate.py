"""`python -m halo_mpi.generate`, under mpirun or alone: a model continues a text, or many."""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from halo_mpi.cli import run_command
from halo_mpi.engine.lookup import AUTO, MOST_GUESSES, Guesser, PassCounts
from halo_mpi.engine.options import OrAuto, RunCommand, RunOptions, run_options
from halo_mpi.engine.parting import Parting, after
from halo_mpi.engine.sampling import Sampling
from halo_mpi.errors import EXIT_TERMINATED, UsageError
from halo_mpi.versions import version_option

if TYPE_CHECKING:
    from halo_mpi.engine.session import Session

EXAMPLES = """\b
Examples:
  halo-mpi generate --model models/smollm2-135m.halo --prompt "Once upon a time"
  launch/halo-mpirun -hostfile hostfiles/pis.txt python -m halo_mpi.generate --model models/smollm2-135m.halo --chat --prompt "Why?"
  launch/halo-mpirun -n 4 python -m halo_mpi.generate --model models/smollm2-135m.halo --prompts in.jsonl --out out.jsonl --resume
"""


@click.command(cls=RunCommand, epilog=EXAMPLES, short_help="Continue a text, or many, on all ranks.")
@run_options
@click.option("--prompt", help="Text to continue.")
@click.option("--prompt-file", type=click.Path(path_type=Path), metavar="FILE", help="Read the text to continue from this UTF-8 file.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='Continue many texts: one {"id": ..., "prompt": ...} a line, with own options.',
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE",
              help="With --prompts: write one result a line, each as soon as it is finished.")  # fmt: skip
@click.option("--resume", is_flag=True, help="With --out: keep the results that are there and skip their prompts.")
@click.option("--chat", is_flag=True, help="Take the prompt as one turn of a conversation, in the model's own template.")
@click.option("--max-tokens", default=128, show_default=True, metavar="N", help="Most tokens to generate.")
@click.option("--max-seconds", type=click.FloatRange(0, min_open=True), metavar="S",
              help="Begin no further token this long after a text's first.")  # fmt: skip
@click.option("--temperature", default=0.0, show_default=True, metavar="T", help="0: always the likeliest token (greedy).")
@click.option("--top-k", default=0, show_default=True, metavar="K", help="Sample among the K likeliest tokens; 0: all.")
@click.option("--top-p", default=1.0, show_default=True, metavar="P",
              help="Sample among the likeliest tokens that together reach this probability.")  # fmt: skip
@click.option("--min-p", default=0.0, show_default=True, metavar="P",
              help="Leave out tokens less likely than this share of the likeliest one.")  # fmt: skip
@click.option("--repetition-penalty", default=1.0, show_default=True, metavar="R",
              help="Above 1: tokens that occurred become less likely.")  # fmt: skip
@click.option("--seed", type=int, metavar="S", show_default="a new one, told in the report",
              help="Same seed, ranks and placement, and --no-moves: same text.")  # fmt: skip
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option(
    "--lookup", type=OrAuto(click.IntRange(0, MOST_GUESSES)), default="auto", show_default=True, metavar="auto|K",
    help="Guess up to K tokens from what followed the same words before, in prompt or text, and compute them along with the last one: "
         "several tokens for the syncs of one where the text repeats itself, and the same text. Fewer where fewer pay, which is learned. "
         "--sync strict only; 0: off. "
         f"auto: {AUTO} in strict mode with compiled kernels, else 0.",
)  # fmt: skip
@click.option("--ignore-eos", is_flag=True, help="Never choose the end-of-text token, so that --max-tokens are generated.")
@click.option(
    "--checkpoint", "kept_in", type=click.Path(path_type=Path), metavar="FILE", envvar="HALO_MPI_CHECKPOINT", show_envvar=True,
    help="Keep the text under way in this file, at every token, until it is finished. If it is there, the same command shows what "
         "there was of the text and goes on with it: after a failure, a SIGTERM, or when a batch system starts the job again.",
)  # fmt: skip
@version_option
@click.pass_obj
def generate(comm, run: RunOptions, prompt: str | None, prompt_file: Path | None, prompts: Path | None, out: Path | None, resume: bool,
             chat: bool, max_seconds: float | None, seed: int | None, lookup: int | None, kept_in: Path | None,
             **options) -> Parting:  # fmt: skip
    """Continue a text with a model whose weights are spread over the ranks.

    The text goes to standard output as it is written, everything else to standard error. SIGTERM and SIGUSR1 end the run after the
    token under way, with exit code 143; mpirun passes SIGUSR1 on to the ranks.
    """
    from halo_mpi.engine import prompts as reading
    from halo_mpi.engine.agreement import complain, together
    from halo_mpi.engine.checkpoint import Checkpoint, Saved, read_checkpoint
    from halo_mpi.engine.ending import in_order, left_to_the_root
    from halo_mpi.engine.session import Session
    from halo_mpi.engine.shown import SHOWN, Shown
    from halo_mpi.engine.text import complete

    def check() -> Sampling:
        if sum(source is not None for source in (prompt, prompt_file, prompts)) != 1:
            raise UsageError("give exactly one of --prompt, --prompt-file and --prompts")
        if (prompts is None) != (out is None) or (resume and out is None):
            raise UsageError("--prompts and --out go together, and --resume goes with them")
        if lookup and run.sync.mode == "relaxed":
            raise UsageError(
                "--lookup works with --sync strict only: what is late cannot be estimated for guesses; leave one of them out"
            )
        return Sampling(seed=secrets.randbits(32) if seed is None else seed, **options)

    sampling = together(comm, check)
    session = Session(comm, run)

    def read() -> tuple[list, reading.ResultFile | None, Saved | None, int]:
        saved = read_checkpoint(kept_in) if kept_in else None
        usual = replace(sampling, seed=saved.seed) if saved and seed is None else sampling
        if prompts is not None:
            texts = reading.read_prompts(prompts, session.tokenizer, usual, chat)
        else:
            text = reading.read_text(prompt_file) if prompt_file else prompt
            texts = [reading.encode_prompt(session.tokenizer, text, usual, chat)]
        reading.check_context(texts, session.config.context)
        results = reading.ResultFile(out, resume or SHOWN in os.environ, prompts) if out else None
        done = results.done if results else set()
        if saved and not saved.belongs(kept_in, session.store.version, texts, done):
            saved = None
        return [text for text in texts if text.id not in done], results, saved, usual.seed

    texts, results, saved, seed = session.on_root(read) or ([], None, None, None)
    session.load(max((text.longest for text in texts), default=1))
    if not session.is_root:
        with left_to_the_root():
            session.serve()
        session.finish()
        return session.parting

    to_come = sum(text.sampling.max_tokens for text in texts)
    checkpoint = Checkpoint(kept_in, session.store.version, seed, session.warn, to_come)
    if lookup is None:  # other kernels round a row among others differently
        lookup = AUTO if run.sync.mode == "strict" and session.kernel.name == "llvm" else 0
    completions, guesser = [], Guesser(lookup)
    show = _hide if results else session.monitor.above(Shown().show)
    session.marks.begin()
    with in_order() as ending, session.monitor:
        for text in texts:
            begun = saved if saved and saved.id == text.id else None
            completion = complete(session, text, show, checkpoint, ending, guesser, begun, max_seconds)
            completions.append(completion)
            if completion.finish_reason == "terminated":
                break
            if results:
                mean = sum(completion.tpot_ms) / len(completion.tpot_ms) if completion.tpot_ms else None
                fields = ("text", "token_ids", "finish_reason", "ttft_ms")
                results.write({"id": text.id} | {name: getattr(completion, name) for name in fields} | {"tpot_ms": mean})
        terminated = any(completion.finish_reason == "terminated" for completion in completions)
        if not (terminated and ending.again):
            show("\n")
    if terminated and ending.again:
        session.finish()
        return replace(session.parting, exit_code=EXIT_TERMINATED)
    session.marks.end()
    devices = session.finish()
    parting = after(session.parting, lambda: _tell(session, devices, texts, completions, seed, lookup, bool(results)))
    if terminated:
        complain("terminated" + (f"; the same command goes on with the text in {kept_in}" if kept_in else ""))
        return replace(parting, exit_code=EXIT_TERMINATED)
    checkpoint.remove()
    return parting


def _tell(session: Session, devices: list[dict], texts: list, completions: list, seed: int, lookup: int, many: bool) -> None:
    """Say on standard error, and in the report, what came of the run."""
    from halo_mpi.engine.report import make_report, write_report

    token_ids = [token for completion in completions for token in completion.token_ids]
    tpot_ms = [sample for completion in completions for sample in completion.tpot_ms]
    first = completions[0] if completions else None
    report = make_report(session, devices, sum(len(text.tokens) for text in texts), token_ids, None if many or not first else first.text,
                         first and first.ttft_ms, tpot_ms)  # fmt: skip
    report["seed"] = seed
    report["lookup"] = sum((completion.passes for completion in completions), PassCounts()).to_dict() if lookup else None
    report["prefix_tokens"] = [completion.passes.prefix for completion in completions]
    reasons = {completion.finish_reason for completion in completions}
    report["finish_reason"] = "terminated" if "terminated" in reasons else None if many or not first else first.finish_reason
    _summarize(report, len(completions))
    if session.run.report:
        write_report(session.run.report, report)


def _hide(text: str) -> None:
    pass


def _summarize(report: dict, texts: int) -> None:
    many = f"{texts} texts, " if texts != 1 else ""
    tpot = report["tpot_ms"]["p50"]
    speed = f", time per token {tpot:.1f} ms (median)" if tpot else ""
    passes = report["lookup"]
    if passes and passes["passes"]:
        speed += f", {passes['tokens_per_pass']:.2f} tokens per pass"
    first = f", first token after {report['ttft_ms']:.0f} ms" if report["ttft_ms"] is not None and texts == 1 else ""
    click.echo(
        f"{many}{report['prompt_tokens']} prompt tokens, {report['generated_tokens']} generated on {report['ranks']} ranks{first}{speed}",
        err=True,
    )


if __name__ == "__main__":
    run_command(generate)
