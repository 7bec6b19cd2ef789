"""Run under mpirun: the logits that the engine computes for given token ids, saved by the root.

    logits.py JOBS.json [option ...]     JOBS.json: [{"model": DIR, "ids": [...], "out": FILE.npz}, ...]; options of `generate`

Each file gets `steps` f32 [T, V], every token computed on its own, and `prefill` f32 [V], after all of them at once.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from halo_mpi.engine.launch import run_distributed
from halo_mpi.engine.options import RunOptions, run_options
from halo_mpi.engine.session import Session
from tests.mpi import EVEN

JOBS = json.loads(Path(sys.argv[1]).read_text())


@click.command()
@run_options
@click.pass_obj
def logits(comm, run: RunOptions) -> None:
    for job in JOBS:
        session = Session(comm, replace(run, model=Path(job["model"])))
        session.load(len(job["ids"]))
        if session.is_root:
            steps = np.stack([session.root.step(token, position) for position, token in enumerate(job["ids"])])
            np.savez(job["out"], steps=steps, prefill=session.root.prefill(job["ids"]))
            session.finish()
        else:
            session.serve()
            session.finish()


if __name__ == "__main__":
    run_distributed(logits, ["--model", ".", "--wire", "f32", *EVEN, *sys.argv[2:]])
