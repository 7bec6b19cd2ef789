"""Strong scaling over ranks, and where the time goes: python -m bench.scaling [--cases NAME,...] [--json FILE] [--plot FILE.png]

The time per token is split into the computing of the slowest rank (at the pace of the device that the lab plays) and the rest:
messages, waiting, and the root's own work. More devices shorten the first and lengthen the second.
"""

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from bench.cells import generation, require_lab, run_in_lab, run_locally
from halo_mpi.figures import figure, require_matplotlib
from bench.lab.scenario import load_scenario, tomllib
from bench.modes import STRICT, Names, Numbers
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import conclude, failures, measure
from bench.shapes import DEMO, SHAPES, config_of, shape_model
from bench.stats import pairwise, percentile, pooled, samples_of, token_ms
from bench.tables import Table, number
from bench.tpot import LOADED_PER_S


@dataclass(frozen=True, slots=True)
class Case:
    """`scenario`: the lab's values, None without a lab; `device_ms`: the least time of one device alone for a sync."""

    description: str
    scenario: dict | None = None
    device_ms: float = 0.0
    shape: str | None = None


CASES = {
    "local": Case("ranks of this machine, no lab"),
    "wired": Case("ranks as fast as this machine, one host each, on a clean wire", {}),
    "slow-wired": Case("devices that take 2.8 ms for a sync alone, on a clean wire", {}, 2.8),
    "micro-wired": Case("a model so small that a sync takes no time, on a clean wire", {}, 0.0, "micro"),
    "fast-wifi": Case(
        "devices as fast as this machine, 4 ms of WiFi there and back, no losses", {"delay_ms": 2.0, "jitter_ms": 1.0}
    ),
}


def run_cell(cell: dict, case: Case, model: Path, seconds: float, max_tokens: int, seed: int) -> dict:
    program = generation(model, STRICT, seconds, max_tokens)
    timeout_s = 60 + 3 * seconds + 5 * cell["ranks"] + 2 * config_of(model).parameters / LOADED_PER_S
    if case.scenario is None:
        return run_locally(cell["ranks"], program, timeout_s)
    scenario = {**case.scenario, "hosts": cell["ranks"], "pace_ms": case.device_ms / cell["ranks"]}
    return run_in_lab(scenario, program, timeout_s, seed + cell["repeat"])


@dataclass(frozen=True, slots=True)
class Split:
    """Of a time per token in ms: means over the runs of one number of ranks."""

    ranks: int
    tpot_ms: float
    compute_ms: float  # of the slowest rank
    syncs: float  # per token

    @property
    def rest_ms(self) -> float:
        return self.tpot_ms - self.compute_ms


def split(runs: list[dict]) -> Split | None:
    ended = [run for run in runs if run["status"] == "ok" and samples_of(run)]
    if not ended:
        return None
    compute_ms = np.mean([max(device["compute_ms"] for device in run["report"]["devices"]) for run in ended])
    syncs = samples_of(ended[0]).per_token
    return Split(ended[0]["ranks"], float(np.mean([token_ms(run) for run in ended])), float(compute_ms), syncs)


def explanation(one: Split, many: Split) -> str:
    """In a sentence, why so many devices are faster than one, or are not."""
    saved, added = one.compute_ms - many.compute_ms, many.rest_ms - one.rest_ms
    verdict = "beat" if many.tpot_ms < one.tpot_ms else "do not beat"
    return (
        f"{many.ranks} devices {verdict} 1 ({many.tpot_ms:.0f} and {one.tpot_ms:.0f} ms): computing takes {saved:.0f} ms less "
        f"({one.compute_ms:.0f} -> {many.compute_ms:.0f}), the rest {added:.0f} ms more, "
        f"{added / many.syncs:.1f} ms for each of {many.syncs:.0f} syncs"
    )


def by_case(runs: list[dict]) -> dict[str, dict[int, list[dict]]]:
    """Runs by case and by number of ranks."""
    found: dict[str, dict[int, list[dict]]] = {}
    for run in sorted(runs, key=lambda run: run["ranks"]):
        found.setdefault(run["case"], {}).setdefault(run["ranks"], []).append(run)
    return found


def table(content: dict) -> Table:
    columns = [
        "case",
        "ranks",
        "runs",
        "tokens",
        "TPOT p50",
        "mean",
        "slowest rank computes",
        "rest",
        "rest per sync",
        "speed-up",
        "efficiency",
    ]
    drawn = Table(f"Strong scaling, ms per token: {content['settings']['model']}", columns, texts=1)
    for case, by_ranks in by_case(content["runs"]).items():
        drawn.ruled.add(len(drawn.rows))
        fewest = by_ranks[min(by_ranks)]
        one = split(fewest)
        for ranks, runs in by_ranks.items():
            mine = split(runs)
            if mine is None:
                drawn.rows.append([case, str(ranks), str(len(runs)), *["-"] * 8])
                continue
            tpot_ms = pooled(runs).tpot_ms
            faster = pairwise(fewest, runs, token_ms) if runs is not fewest else None
            efficiency = f"{faster.median * min(by_ranks) / ranks:.0%}" if faster else "-"
            times = [percentile(tpot_ms, 50), mine.tpot_ms, mine.compute_ms, mine.rest_ms, mine.rest_ms / mine.syncs]
            cells = [case, str(ranks), str(len(runs)), str(len(tpot_ms)), *map(number, times)]
            drawn.rows.append([*cells, str(faster) if faster else "-", efficiency])
            if one and one.ranks == 1 and ranks > 1:
                drawn.notes.append(f"{case}: {explanation(one, mine)}")
    described = content["settings"]["cases"]
    descriptions = [f"{name}: {text}" for name, text in described.items()]
    drawn.notes = [*descriptions, *drawn.notes, *failures(content, name_of)]
    return drawn


def plot(content: dict, path: Path) -> None:
    """A bar per number of ranks: computing of the slowest rank, and the rest on top of it."""
    cases = by_case(content["runs"])
    splits = {case: [s for s in map(split, by_ranks.values()) if s] for case, by_ranks in cases.items()}
    splits = {case: found for case, found in splits.items() if found}
    if not splits:
        return
    with figure(path, len(splits), 4.0) as panels:
        for panel, (case, found) in zip(panels, splits.items()):
            names = [str(s.ranks) for s in found]
            compute = [s.compute_ms for s in found]
            panel.bar(names, compute, label="slowest rank computes")
            panel.bar(names, [max(0.0, s.rest_ms) for s in found], bottom=compute, label="rest")
            panel.set(title=case, xlabel="ranks", ylabel="ms per token")
        panels[0].legend(fontsize="small")


def name_of(cell: dict) -> str:
    return f"{cell['case']}, {cell['ranks']} ranks, repeat {cell['repeat'] + 1}"


def line_of(run: dict) -> str:
    return f"{name_of(run)}: {number(token_ms(run))} ms per token"


@click.command(help=__doc__)
@click.option(
    "--cases",
    type=Names(CASES),
    help="[default: local, or what --lab describes]  " + "; ".join(f"{n}: {c.description}" for n, c in CASES.items()),
)
@click.option(
    "--lab", type=click.Path(path_type=Path, exists=True), help="A case of its own: this scenario, with as many hosts as ranks."
)
@click.option(
    "--device-ms",
    type=click.FloatRange(0),
    default=2.8,
    show_default=True,
    help="With --lab: least time of one device alone for a sync.",
)
@click.option("--model", type=click.Path(path_type=Path), default=DEMO, help="[default: the demo model]")
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Random weights of this shape instead; made once, in models/.")
@click.option("--ranks", type=Numbers(int, 1, 64), default="1,2,4,8", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0.1), default=4.0, show_default=True, help="Time box of a run, after its first token."
)
@click.option("--max-tokens", type=click.IntRange(3), default=400, show_default=True, help="Most tokens of a run.")
@shared_options("minutes", "seed", "json", "plot")
def main(cases, lab, device_ms, model, shape, ranks, repeats, seconds, max_tokens, minutes, seed, out, png) -> int:
    require_matplotlib(png)
    chosen = {name: CASES[name] for name in cases or (() if lab else ("local",))}
    if lab:
        load_scenario(lab)  # its errors name file and key
        description = f"{lab.name}, devices that take {device_ms:g} ms for a sync alone"
        chosen[lab.stem] = Case(description, tomllib.loads(lab.read_text()), device_ms)
    if any(case.scenario is not None for case in chosen.values()):
        require_lab()
    model = (shape_model(shape) if shape else model).resolve()
    models = {name: shape_model(case.shape) if case.shape else model for name, case in chosen.items()}
    settings = {"model": config_of(model).name, "ranks": ranks, "repeats": repeats, "seconds": seconds,
                "cases": {name: case.description for name, case in chosen.items()},
                "device_ms": {name: case.device_ms for name, case in chosen.items()}}  # fmt: skip
    results = Results("scaling", out, seed, **settings)
    groups = [[{"case": name, "ranks": n, "repeat": r} for n in ranks] for name in chosen for r in range(repeats)]

    def run(cell: dict) -> dict:
        return run_cell(cell, chosen[cell["case"]], models[cell["case"]], seconds, max_tokens, seed)

    measure(groups, run, line_of, lambda cell: 4 + cell["ranks"] + 1.5 * seconds, minutes, results)
    return conclude(results, table, plot, png)


if __name__ == "__main__":
    run_benchmark(main)
