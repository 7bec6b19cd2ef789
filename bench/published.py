"""What others measured on real boards beside what `plan --profile` says of them: python -m bench.published [--json FILE]

distributed-llama (C++, a mesh of all boards, weights in Q40) on Raspberry Pis behind a gigabit switch. A profile's speed is that of one
such board; what is checked are more boards. The simulated program is this one, whose int4 takes 11 % more bytes than Q40.
"""

import click

from bench.results import Results, run_benchmark, shared_options
from bench.tables import Table, number
from halo_mpi.model.kernels.choice import sizes_of
from halo_mpi.model.shapes import SHAPES
from halo_mpi.schedule.profiles import PROFILES, README
from halo_mpi.schedule.sweep import sweep

CONTEXT = 2048
PUBLISHED_MS = {  # by profile and shape: of a token, on so many boards
    ("pi4", "llama-2-7b"): {1: 1312.50, 2: 793.69, 4: 494.00, 8: 588.19},
    ("pi4", "llama-2-13b"): {2: 1497.19, 4: 848.19, 8: 1114.88},
    ("pi4", "llama-2-70b"): {8: 4842.81},
    ("pi5", "llama-2-7b"): {1: 441.09, 2: 341.46, 4: 219.08},
}


def rows() -> list[dict]:
    found = []
    for (profile, shape), by_count in PUBLISHED_MS.items():
        points = sweep(PROFILES[profile], list(by_count), [0.0], sizes_of(SHAPES[shape], "int4"), CONTEXT)
        found += [
            {"profile": profile, "shape": shape, "boards": point.count, "published_ms": by_count[point.count],
             "simulated_ms": point.tpot_ms}
            for point in points  # fmt: skip
        ]
    return found


def table(content: dict) -> Table:
    columns = ["profile", "shape", "boards", "published, ms per token", "simulated", "simulated / published"]
    drawn = Table("Published times of another program, and simulated ones of this", columns, texts=2)
    for row in content["runs"]:
        simulated = row["simulated_ms"]
        ratio = f"{simulated / row['published_ms']:.2f}" if simulated else "does not fit"
        drawn.rows.append([row["profile"], row["shape"], str(row["boards"]), number(row["published_ms"]), number(simulated), ratio])
    drawn.notes = [f"published: {README}; nothing here was measured by this project"]
    return drawn


@click.command(help=__doc__)
@shared_options("json")
def main(out) -> int:
    results = Results("published", out, 0)
    for row in rows():
        results.add(row)
    results.finish()
    table(results.content).print()
    return 0


if __name__ == "__main__":
    run_benchmark(main)
