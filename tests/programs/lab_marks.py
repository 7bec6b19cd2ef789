"""A program that follows the lab's contract of marks: lab_marks.py TOKENS MS_PER_TOKEN

For each token rank 0 asks every worker, which answers with the slowdown that it reads from its pace file.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

WARM_UP = 100  # exchanges before generation
PATIENCE_S = 10

world = MPI.COMM_WORLD
lab = Path(os.environ["HALO_MPI_LAB_DIR"])
tokens, pause_s = int(sys.argv[1]), float(sys.argv[2]) / 1000
(lab / f"rank-{world.rank}.pid").write_text(str(os.getpid()))


def mark(line):
    with open(lab / "progress", "a") as file:
        file.write(line + "\n")


def wait_for(name):
    deadline = time.monotonic() + PATIENCE_S
    while not (lab / name).exists():
        if time.monotonic() > deadline:
            sys.exit(f"no {name}")
        time.sleep(0.005)


def slowdown():
    return json.loads((lab / f"pace-{world.rank}.json").read_text())["slowdown"]


def exchange():
    request, answers = np.zeros(256, np.float32), []
    for worker in range(1, world.size):
        world.Send(request, worker)
    for worker in range(1, world.size):
        answer = np.zeros(256, np.float32)
        world.Recv(answer, worker)
        answers.append(float(answer[0]))
    return answers


if world.rank == 0:
    print(json.dumps({"lab": str(lab)}), flush=True)
    for _ in range(WARM_UP):
        exchange()
    mark("generation-begin")
    wait_for("go")
    mark("phase prefill")
    token_ms, slowdowns = [], []
    for token in range(1, tokens + 1):
        started = time.perf_counter()
        time.sleep(pause_s)
        slowdowns.append(exchange())
        token_ms.append((time.perf_counter() - started) * 1000)
        mark(f"token {token}")
    mark("generation-end")
    wait_for("calm")
    print(json.dumps({"token_ms": token_ms, "slowdowns": slowdowns}), flush=True)
else:
    request = np.zeros(256, np.float32)
    for _ in range(WARM_UP + tokens):
        world.Recv(request, 0)
        world.Send(np.full(256, slowdown(), np.float32), 0)
world.Barrier()
