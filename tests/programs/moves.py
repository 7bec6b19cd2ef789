"""Run under mpirun: logits of given token ids, while every head and group moves to any rank again and again.

    moves.py JOB.json [option ...]     JOB.json: {"model": DIR, "ids": [...], "out": FILE.npz}; options of `generate`

The file gets `steps` f32 [T, V] and `moves`, how often the plan changed.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from halo_mpi.engine.launch import run_distributed
from halo_mpi.engine.options import RunOptions, run_options
from halo_mpi.engine.session import Session
from halo_mpi.schedule.placement import Plan

JOB = json.loads(Path(sys.argv[1]).read_text())


@click.command()
@run_options
@click.pass_obj
def moves(comm, run: RunOptions) -> None:
    session = Session(comm, replace(run, model=Path(JOB["model"])))
    session.load(len(JOB["ids"]))
    if not session.is_root:
        session.serve()
        session.finish()
        return
    root, config, random, steps, changed = session.root, session.config, np.random.default_rng(3), [], set()
    root.replacer = None  # nobody else moves anything
    session.marks.begin()
    for position, token in enumerate(JOB["ids"]):
        if root.mover.idle:
            some = random.integers(1, comm.size + 1)
            plan = Plan("any", *(random.integers(0, some, (config.layers, count)) for count in (config.heads, config.groups)))
            root.mover.aim_at(plan)
        steps.append(root.step(token, position))
        changed.add(root.mover.number)
        time.sleep(0.002)  # for the threads that load
    session.marks.end()
    np.savez(JOB["out"], steps=np.stack(steps), moves=len(changed) - 1)
    session.finish()


if __name__ == "__main__":
    run_distributed(moves, ["--model", ".", "--wire", "f32", "--placement", "auto", *sys.argv[2:]])
