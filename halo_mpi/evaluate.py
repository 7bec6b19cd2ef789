"""`python -m halo_mpi.evaluate`, under mpirun or alone: perplexity of a text, token by token through the same engine as generate."""

import time
from pathlib import Path

import click
import numpy as np

from halo_mpi.cli import run_command
from halo_mpi.engine.options import RunCommand, RunOptions, run_options
from halo_mpi.engine.parting import Parting, after
from halo_mpi.engine.sampling import require_finite
from halo_mpi.errors import HaloError, UsageError
from halo_mpi.versions import version_option

EXAMPLES = """\b
Examples:
  halo-mpi evaluate --model models/smollm2-135m.halo --text book.txt --tokens 2000
  launch/halo-mpirun -n 4 python -m halo_mpi.evaluate --model models/smollm2-135m.halo --text book.txt --sync relaxed --json report.json
"""


@click.command(cls=RunCommand, epilog=EXAMPLES, short_help="Teacher-forced perplexity of a text.")
@run_options
@click.option("--text", type=click.Path(path_type=Path), required=True, metavar="FILE", help="UTF-8 text to score.")
@click.option("--tokens", type=click.IntRange(2), metavar="N", show_default="all", help="Score only the first N tokens.")
@click.option(
    "--context",
    "window",
    default=512,
    show_default=True,
    type=click.IntRange(2),
    metavar="C",
    help="Tokens per window; each window starts afresh.",
)
@click.option("--logprobs", type=click.Path(path_type=Path), metavar="FILE",
              help="Save the log-probability of each scored token, float32, as .npy.")  # fmt: skip
@click.option("--top1", type=click.Path(path_type=Path), metavar="FILE",
              help="Save the likeliest token at each scored position, int32, as .npy.")  # fmt: skip
@version_option
@click.pass_obj
def evaluate(
    comm, run: RunOptions, text: Path, tokens: int | None, window: int, logprobs: Path | None, top1: Path | None
) -> Parting:
    """Teacher-forced perplexity of a text.

    The text is tokenized without special tokens and cut into consecutive windows of --context tokens. The first token of
    a window is not scored.
    """
    from halo_mpi.engine.prompts import read_text
    from halo_mpi.engine.report import make_report, write_report
    from halo_mpi.engine.session import Session
    from halo_mpi.progress import progress

    session = Session(comm, run)

    def read() -> list[int]:
        if window > session.config.context:
            raise UsageError(f"--context {window}: the model's context is {session.config.context}")
        ids = session.tokenizer.encode(read_text(text), special=False)[:tokens]
        if len(ids) < 2:
            raise UsageError(f"{text} has {len(ids)} tokens; at least 2 are needed")
        return ids

    ids = session.on_root(read)
    session.load(window)
    if not session.is_root:
        session.serve()
        session.finish()
        return session.parting
    scores, likeliest, tpot_ms = [], [], []
    session.marks.begin()
    with session.monitor:
        for index in progress(range(len(ids)), len(ids), "evaluating", shown=not run.verbose):
            position = index % window
            if index + 1 == len(ids) or position + 1 == window:
                continue  # nothing is predicted from the last token of a window
            begin = time.perf_counter()
            logits = session.root.step(ids[index], position)
            tpot_ms.append((time.perf_counter() - begin) * 1e3)
            session.token_done()
            scores.append(_log_probability(logits, ids[index + 1]))
            likeliest.append(int(logits.argmax()))
    session.marks.end()
    perplexity = float(np.exp(-np.mean(scores)))
    devices = session.finish()

    def tell() -> None:
        click.echo(f"perplexity {perplexity:.4f} over {len(scores)} scored tokens")
        report = make_report(session, devices, len(ids), [], None, None, tpot_ms, perplexity)
        report["scored_tokens"] = len(scores)
        if logprobs:
            _save(logprobs, np.array(scores, np.float32))
        if top1:
            _save(top1, np.array(likeliest, np.int32))
        if run.report:
            write_report(run.report, report)

    return after(session.parting, tell)


def _log_probability(logits: np.ndarray, token: int) -> float:
    """Log-probability of one token, for logits f32 [V]. Raises HaloError if they are not finite."""
    require_finite(logits)
    shifted = logits.astype(np.float64) - logits.max()
    return float(shifted[token] - np.log(np.exp(shifted).sum()))


def _save(path: Path, values: np.ndarray) -> None:
    try:
        with open(path, "wb") as file:
            np.save(file, values, allow_pickle=False)
    except OSError as error:
        raise HaloError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    run_command(evaluate)
