"""Whether MPI_Comm_spawn can replace a lost rank, in a lab: python -m bench.spawn spare|same|cut-off [TRIES]

Rank 2 of 4 is killed; the others shrink and spawn on a spare host, on the dead rank's, or on the spare while rank 3 is cut off. A line a
try: the seconds, and how mpirun ended (137: not by itself).
"""

import os
import subprocess
import sys
import time
from tempfile import TemporaryFile
from threading import Timer

from bench.lab.lab import Lab
from bench.lab.launch import environment, launch_line
from bench.lab.scenario import Host, Scenario

RANKS, DEAD, LIMIT_S = 4, 2, 15
PLACES = {"spare": "pi5", "same": f"pi{DEAD + 1}", "cut-off": "pi5"}


def survive(comm, new: bool, host: str, step: list[str]) -> None:
    begin = time.perf_counter()
    Timer(LIMIT_S, lambda: (os.write(1, f"{step[-1]} did not end in {LIMIT_S} s\n".encode()), os._exit(1))).start()
    if not new:
        comm.allgather(open(f"{os.environ['READY']}-{comm.rank}", "w").close())  # everybody knows everybody
        time.sleep(1.0)  # in which a host may be cut off
        if comm.rank == DEAD:
            os.kill(os.getpid(), 9)
        begin = time.perf_counter()
        comm = comm.Shrink()
        step.append(f"shrink {time.perf_counter() - begin:.2f} s, spawn")
        comm = comm.Spawn(sys.executable, ["-m", "bench.spawn", "rank", host], info=MPI.Info.Create({"host": host}))
    os.write(1, f"{comm.Merge(new).allreduce(1)} ranks: {step[-1]} ended at {time.perf_counter() - begin:.2f} s\n".encode())
    time.sleep(0.5)
    os._exit(0)  # after a failure MPI_Finalize would hang


def attempt(where: str) -> str:
    with Lab(Scenario("spawn", {f"pi{number}": Host() for number in range(1, RANKS + 2)})) as lab, TemporaryFile("w+") as told:
        line = launch_line(lab, "mpirun", [], True) + ["python", "-m", "bench.spawn", "rank", PLACES[where]]
        command = f"exec timeout -sKILL {LIMIT_S + 5} {' '.join(line)}".replace(f" -n {RANKS + 1} ", f" -n {RANKS} ")
        variables = {**environment(), "READY": str(lab.marks / "of")}
        mpirun = subprocess.Popen([lab.agent, "pi1", command], env=variables, stdout=told, stderr=told)
        while mpirun.poll() is None and len(list(lab.marks.iterdir())) < RANKS:
            time.sleep(0.01)
        lab.conditions.black_holes |= {"pi4"} if where == "cut-off" else set()
        lab.apply()
        code, _ = mpirun.wait(), told.seek(0)
        lines = [line.strip() for line in told if line.endswith((" s\n", "filled.\n", "fault\n"))]
        return f"{' '.join(lines[:1])}; mpirun ended with {code}"


if __name__ == "__main__" and sys.argv[1] == "rank":
    from mpi4py import MPI

    parent = MPI.Comm.Get_parent()
    survive(parent or MPI.COMM_WORLD, bool(parent), sys.argv[2], ["shrink"])
elif __name__ == "__main__":
    print(*(attempt(sys.argv[1]) for _ in range(int([*sys.argv, 7][2]))), sep="\n")
