"""What a token costs beside the products: python -m bench.overhead [--ranks 1,4] [--against CHECKOUT] [--json FILE]

Local ranks with one thread each, no lab. Two views of the same program:

- from its own reports: the time per token, what the slowest rank computes, and the rest, per sync;
- from the ticks of bench.ticks, in runs of their own: products, glue, wire, waiting, predictor, sampling and text, of the root and of a
  worker. "Overhead per sync" is glue + wire of a token over its syncs. A rank that waits for a core is not counted: these
  parts depend less on the machine's load than the times do.

--against: another checkout of this program (git worktree add ../before REVISION), measured in turns with this one.
"""

import os
import tempfile
from pathlib import Path

import click
import numpy as np

from bench.cells import generation, run_locally
from bench.modes import Numbers
from bench.results import ROOT, Results, run_benchmark, shared_options
from bench.rounds import failures, measure
from bench.scaling import Split, split
from bench.shapes import config_of, model_options
from bench.stats import pairwise, percentile, pooled, token_ms
from bench.tables import Table, number
from bench.ticks import PARTS, parts_of, read_ticks, shown_parts

OPTIONS = ("--sync", "strict", "--threads", "1", "--load-first")
THIS = "this"
OTHER = "against"


def run_cell(cell: dict, model: Path, tree: Path, seconds: float, max_tokens: int) -> dict:
    program, timeout_s = known_to(tree, generation(model, OPTIONS, seconds, max_tokens)), 60 + 3 * seconds + 5 * cell["ranks"]
    before = {"load_average": round(os.getloadavg()[0], 2)}
    if not cell["ticks"]:
        return before | run_locally(cell["ranks"], program, timeout_s, tree)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "ticks.json"
        made = run_locally(cell["ranks"], program, timeout_s, tree, file)
        if made["status"] == "ok":
            taken = read_ticks(file, cell["ranks"], made["report"]["generated_tokens"] - 1)
            made["parts_ms"] = [parts_of(places) for places in taken]
            made["places_ms"] = [{place: round(ms, 4) for place, ms in list(places.items())[:25]} for places in taken]
    return before | made


def known_to(tree: Path, program: list) -> list:
    """The same for a checkout from before there were guesses."""
    if '"--lookup"' in (tree / "halo_mpi" / "generate.py").read_text():
        return program
    at = program.index("--lookup")
    return program[:at] + program[at + 2 :]


def mean_parts(parts: list[dict[str, float]]) -> dict[str, float]:
    """Of several ranks or runs, ms per token, each with the same weight."""
    return {part: float(np.mean([each.get(part, 0.0) for each in parts])) for part in PARTS} if parts else {}


def overhead_us(parts: dict[str, float], syncs: float) -> float | None:
    """Glue and wire of one sync, in microseconds; `parts` in ms per token."""
    return (parts["glue"] + parts["wire"]) * 1e3 / syncs if parts and syncs else None


def by_cell(runs: list[dict]) -> dict[tuple[int, str], list[dict]]:
    """Runs that ended well by ranks and checkout."""
    found: dict[tuple[int, str], list[dict]] = {}
    for run in sorted(runs, key=lambda run: (run["ranks"], run["tree"] != OTHER)):
        if run["status"] == "ok":
            found.setdefault((run["ranks"], run["tree"]), []).append(run)
    return found


def table(content: dict) -> Table:
    columns = ["ranks", "git", "kernel", "runs", "TPOT p50", "mean", "slowest computes", "rest", "rest per sync, us",
               "overhead per sync, us: root", "worker", "time / against"]  # fmt: skip
    drawn = Table(f"What a token costs beside the products, ms: {content['settings']['model']}", columns, texts=3)
    cells = by_cell(content["runs"])
    for (ranks, tree), runs in cells.items():
        timed, ticked = [run for run in runs if not run["ticks"]], [run for run in runs if run["ticks"]]
        found = split(timed)
        if found is None:
            continue
        report, p50 = timed[0]["report"], percentile(pooled(timed).tpot_ms, 50)
        root, worker = (mean_parts(parts) for parts in root_and_workers(ticked))
        others = [run for run in cells.get((ranks, OTHER), []) if not run["ticks"]] if tree == THIS else []
        ratio = pairwise(timed, others, token_ms)
        drawn.rows.append([str(ranks), str(report["git"]), report["kernel"], str(len(timed)), *_times(found, p50),
                           *(number(overhead_us(parts, found.syncs)) for parts in (root, worker)),
                           str(ratio) if ratio else "-"])  # fmt: skip
        for who, parts in (("root", root), ("a worker", worker)):
            if parts:
                drawn.notes.append(f"{ranks} ranks, {report['git']}, {who}: {shown_parts(parts)}")
    loads = [run["load_average"] for run in content["runs"]]
    drawn.notes += [f"Load average before the runs: {min(loads):.1f} .. {max(loads):.1f}."] if loads else []
    drawn.notes += failures(content, name_of)
    return drawn


def _times(found: Split, p50: float) -> list[str]:
    return [*map(number, (p50, found.tpot_ms, found.compute_ms, found.rest_ms, found.rest_ms / found.syncs * 1e3))]


def root_and_workers(ticked: list[dict]) -> tuple[list[dict], list[dict]]:
    """The parts of the root, and of all workers, in some runs under ticks."""
    parts = [run["parts_ms"] for run in ticked]
    return [ranks[0] for ranks in parts], [rank for ranks in parts for rank in ranks[1:]]


def name_of(cell: dict) -> str:
    return f"{cell['ranks']} ranks, {cell['tree']}, repeat {cell['repeat'] + 1}" + (", under ticks" if cell["ticks"] else "")


def line_of(run: dict) -> str:
    return f"{name_of(run)}: {number(token_ms(run))} ms per token"


@click.command(help=__doc__)
@model_options
@click.option("--ranks", type=Numbers(int, 1, 64), default="1,4", show_default=True)
@click.option("--against", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Another checkout.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Each with one run more under ticks.")
@click.option(
    "--seconds", type=click.FloatRange(0.1), default=4.0, show_default=True, help="Time box of a run, after its first token."
)
@click.option("--max-tokens", type=click.IntRange(3), default=200, show_default=True, help="Most tokens of a run.")
@shared_options("minutes", "seed", "json")
def main(model, ranks, against, repeats, seconds, max_tokens, minutes, seed, out) -> int:
    trees = ({OTHER: against.resolve()} if against else {}) | {THIS: ROOT}
    settings = {"model": config_of(model).name, "ranks": ranks, "repeats": repeats, "seconds": seconds, "max_tokens": max_tokens}
    results = Results("overhead", out, seed, **settings)
    groups = [
        [{"ranks": n, "tree": tree, "ticks": ticks, "repeat": repeat} for ticks in (False, True) for tree in trees]
        for repeat in range(repeats)
        for n in ranks
    ]

    def run(cell: dict) -> dict:
        return run_cell(cell, model, trees[cell["tree"]], seconds, max_tokens)

    measure(groups, run, line_of, lambda cell: 5 + cell["ranks"] + 1.5 * seconds, minutes, results)
    table(results.content).print()
    return 0 if by_cell(results.runs) else 1


if __name__ == "__main__":
    run_benchmark(main)
