"""How fast this machine reads memory: python -m bench.bandwidth [--processes N]

Each process reads an array much larger than any cache, from end to end, by one thread. The best of some turns counts, since
whatever else runs can only take bandwidth away.
"""

import os
import subprocess
import sys
import time

import click

MEGABYTES = 512
TURNS = 8


def read_gbps(megabytes: int = MEGABYTES, turns: int = TURNS) -> float:
    """GB/s of one thread, in this process. NumPy must not have been imported with more threads."""
    import numpy as np

    values = np.ones(megabytes * 250_000, np.float32)
    times = []
    for _ in range(turns):
        for read in (lambda: values @ values, values.max):  # one of the two may be bound by arithmetics
            begin = time.perf_counter()
            read()
            times.append(time.perf_counter() - begin)
    return values.nbytes / min(times) / 1e9


def measured_gbps(processes: int = 1) -> float:
    """The sum over so many fresh processes that read at once, with one thread each."""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-c", "from bench.bandwidth import read_gbps; print(read_gbps())"]
    readers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(float(reader.communicate()[0]) for reader in readers)


@click.command(help=__doc__)
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True)
def main(processes: int) -> None:
    click.echo(f"{measured_gbps(processes):.1f} GB/s read by {processes} processes, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
