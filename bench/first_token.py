"""When each phase of a start ends, up to the first token: mpirun -n RANKS python -m bench.first_token --model DIR --json FILE

The same session as generate's. Times are of rank 0, in seconds since the epoch, so that what started mpirun can subtract.
"""

import json
import time

ENDS_S = {"python": time.time()}

import click  # noqa: E402
from mpi4py import MPI  # noqa: E402, F401

ENDS_S["MPI"] = time.time()

from halo_mpi.engine.launch import run_distributed  # noqa: E402
from halo_mpi.engine.options import run_options  # noqa: E402
from halo_mpi.engine.session import Session  # noqa: E402

ENDS_S["import"] = time.time()
PROMPT = "Once upon a time"  # again and again
BESIDE = 60  # tokens that the context has beside the prompt


@click.command()
@click.option("--prompt-tokens", type=click.IntRange(1), default=4, show_default=True)
@run_options
@click.pass_obj
def first_token(comm, run, prompt_tokens) -> None:
    """Start, compute one token, and say when what was done."""
    session = Session(comm, run)
    prompt = session.on_root(lambda: session.tokenizer.encode(" ".join([PROMPT] * prompt_tokens))[:prompt_tokens])
    ENDS_S["open"] = time.time()
    session.load(BESIDE + prompt_tokens)
    ENDS_S["load"] = time.time()
    if not session.is_root:
        session.serve()
        session.finish()
        return
    session.root.prefill(prompt)
    ENDS_S["first token"] = time.time()
    session.finish()
    run.report.write_text(json.dumps({"ranks": comm.size, "ends_s": ENDS_S}))


if __name__ == "__main__":
    run_distributed(first_token)
