"""Scaling over ranks, and where the time goes: python -m bench.scaling [--weak] [--cases NAME,...] [--json FILE] [--plot FILE.png]

Strong: the same model on more ranks. Weak: heads and neurons grow with the ranks, each device's work stays. The time per token is split
into the computing of the slowest rank (at the pace of the device that the lab plays) and the rest: messages, waiting, and the root's own
work. Predicted is what the scheduler expects of even shares, from what the ranks measure at the start of a short run of their own.
"""

from dataclasses import dataclass
from pathlib import Path

import click

from bench.cells import generation, require_lab, run_in_lab, run_locally
from halo_mpi.figures import figure, require_matplotlib
from bench.lab.scenario import load_scenario, tomllib
from bench.modes import STRICT, Names, Numbers
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import conclude, failures, measure
from bench.shapes import DEMO, SHAPES, config_of, shape_model, weak_model
from bench.splits import Split, explanation, fitted, planned, scheduler_of, split, weak_explanation
from bench.stats import pairwise, percentile, pooled, token_ms
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
PLANNING = ("--placement", "auto", "--no-moves")  # the ranks measure what they can do, and the report says what is expected
PLANNED_TOKENS = 3


def run_cell(cell: dict, case: Case, model: Path, weak: bool, seconds: float, max_tokens: int, seed: int) -> dict:
    program = generation(model, STRICT, seconds, max_tokens)
    if cell["what"] == "plan":
        program = generation(model, (*STRICT, *PLANNING), seconds, PLANNED_TOKENS)
    timeout_s = 60 + 3 * seconds + 5 * cell["ranks"] + 2 * config_of(model).parameters / LOADED_PER_S
    if case.scenario is None:
        return run_locally(cell["ranks"], program, timeout_s)
    scenario = {**case.scenario, "hosts": cell["ranks"], "pace_ms": case.device_ms / (1 if weak else cell["ranks"])}
    return run_in_lab(scenario, program, timeout_s, seed + cell["repeat"])


def by_case(runs: list[dict], what: str = "run") -> dict[str, dict[int, list[dict]]]:
    """Runs, or plans, by case and by number of ranks."""
    found: dict[str, dict[int, list[dict]]] = {}
    for run in sorted(runs, key=lambda run: run["ranks"]):
        if run.get("what", "run") == what:
            found.setdefault(run["case"], {}).setdefault(run["ranks"], []).append(run)
    return found


def predicted_ms(plans: list[dict]) -> float | None:
    """What the scheduler expected of a token with even shares."""
    told = [found["options"]["even"]["tpot_ms"] for plan in plans if (found := scheduler_of(plan)) and "even" in found["options"]]
    return percentile(told, 50)


def table(content: dict) -> Table:
    columns = ["case", "ranks", "runs", "tokens", "TPOT p50", "mean", "slowest rank computes", "rest", "rest per sync", "speed-up",
               "efficiency", "predicted", "mean / predicted"]  # fmt: skip
    weak = content["settings"].get("weak", False)
    drawn = Table(f"{'Weak' if weak else 'Strong'} scaling, ms per token: {content['settings']['model']}", columns, texts=1)
    plans = by_case(content["runs"], "plan")
    for case, by_ranks in by_case(content["runs"]).items():
        drawn.ruled.add(len(drawn.rows))
        fewest = by_ranks[min(by_ranks)]
        one = split(fewest)
        for ranks, runs in by_ranks.items():
            mine = split(runs)
            if mine is None:
                drawn.rows.append([case, str(ranks), str(len(runs)), *["-"] * 10])
                continue
            tpot_ms = pooled(runs).tpot_ms
            faster = pairwise(fewest, runs, token_ms) if runs is not fewest else None
            efficiency = f"{faster.median * (1 if weak else min(by_ranks) / ranks):.0%}" if faster else "-"
            expected = predicted_ms(plans.get(case, {}).get(ranks, []))
            times = [percentile(tpot_ms, 50), mine.tpot_ms, mine.compute_ms, mine.rest_ms, mine.rest_ms / mine.syncs]
            cells = [case, str(ranks), str(len(runs)), str(len(tpot_ms)), *map(number, times), str(faster) if faster else "-", efficiency]
            drawn.rows.append([*cells, number(expected), f"{mine.tpot_ms / expected:.2f}" if expected else "-"])
            if one and one.ranks == 1 and ranks > 1:
                drawn.notes.append(f"{case}: {(weak_explanation if weak else explanation)(one, mine)}")
        drawn.notes += _line_notes(case, splits_of(by_ranks), sum(plans.get(case, {}).values(), []))
    described = content["settings"]["cases"]
    descriptions = [f"{name}: {text}" for name, text in described.items()]
    drawn.notes = [*descriptions, *drawn.notes, *failures(content, name_of)]
    return drawn


def splits_of(by_ranks: dict[int, list[dict]]) -> list[Split]:
    return [found for found in map(split, by_ranks.values()) if found]


def _line_notes(case: str, splits: list[Split], plans: list[dict]) -> list[str]:
    line, expected = fitted(splits) if splits else None, planned(plans)
    if line is None:
        return []
    off = "" if line.off_ms is None else f", off by {line.off_ms:.1f} ms per token at most"
    note = f"{case}, fit: a sync of n ranks takes {line.first_ms:.2f} + {line.further_ms:.2f} x (n - 2) ms beside the longest share{off}"
    return [note + (f"; measured at the start: {expected.first_ms:.2f} + {expected.further_ms:.2f} x (n - 2)" if expected else "")]


def plot(content: dict, path: Path) -> None:
    """A bar per number of ranks: computing of the slowest rank, and the rest on top of it; a mark where it was predicted to end."""
    cases, plans = by_case(content["runs"]), by_case(content["runs"], "plan")
    splits = {case: found for case, by_ranks in cases.items() if (found := splits_of(by_ranks))}
    if not splits:
        return
    with figure(path, len(splits), 4.0) as panels:
        for panel, (case, found) in zip(panels, splits.items()):
            names = [str(s.ranks) for s in found]
            compute = [s.compute_ms for s in found]
            panel.bar(names, compute, label="slowest rank computes")
            panel.bar(names, [max(0.0, s.rest_ms) for s in found], bottom=compute, label="rest")
            expected = {str(ranks): ms for ranks, own in plans.get(case, {}).items() if (ms := predicted_ms(own))}
            if expected:
                panel.plot([name for name in names if name in expected], [expected[name] for name in names if name in expected], "k_",
                           markersize=24, label="predicted")  # fmt: skip
            highest = max([s.tpot_ms for s in found] + list(expected.values()))
            panel.set(title=case, xlabel="ranks", ylabel="ms per token", ylim=(0, 1.35 * highest))
        panels[0].legend(fontsize="small", markerscale=0.5)


def name_of(cell: dict) -> str:
    which = "plan" if cell.get("what") == "plan" else "repeat"
    return f"{cell['case']}, {cell['ranks']} ranks, {which} {cell['repeat'] + 1}"


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
@click.option("--weak", is_flag=True, help="Random weights whose width grows with the ranks, in place of one model; made once, in models/.")
@click.option("--predict/--no-predict", default=True, show_default=True, help="Ask the scheduler what it expects, in a run of its own.")
@click.option("--ranks", type=Numbers(int, 1, 64), default="1,2,4,8", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0.1), default=4.0, show_default=True, help="Time box of a run, after its first token."
)
@click.option("--max-tokens", type=click.IntRange(3), default=400, show_default=True, help="Most tokens of a run.")
@shared_options("minutes", "seed", "json", "plot")
def main(cases, lab, device_ms, model, shape, weak, predict, ranks, repeats, seconds, max_tokens, minutes, seed, out, png) -> int:
    require_matplotlib(png)
    if weak and shape:
        raise click.ClickException("--weak has shapes of its own; leave --shape out")
    chosen = {name: CASES[name] for name in cases or (() if lab else ("local",))}
    if lab:
        load_scenario(lab)  # its errors name file and key
        description = f"{lab.name}, devices that take {device_ms:g} ms for a sync alone"
        chosen[lab.stem] = Case(description, tomllib.loads(lab.read_text()), device_ms)
    if any(case.scenario is not None for case in chosen.values()):
        require_lab()
    model = (shape_model(shape) if shape else model).resolve()
    models = {(name, n): weak_model(n) if weak else shape_model(case.shape) if case.shape else model
              for name, case in chosen.items() for n in ranks}  # fmt: skip
    name = "heads and neurons grow with the ranks" if weak else config_of(model).name
    settings = {"model": name, "weak": weak, "ranks": ranks, "repeats": repeats, "seconds": seconds,
                "cases": {name: case.description for name, case in chosen.items()},
                "device_ms": {name: case.device_ms for name, case in chosen.items()}}  # fmt: skip
    results = Results("scaling", out, seed, **settings)
    groups = [
        [{"case": name, "ranks": n, "repeat": r, "what": "run"} for n in ranks]
        + [{"case": name, "ranks": n, "repeat": r, "what": "plan"} for n in ranks if predict and n > 1]
        for name in chosen
        for r in range(repeats)
    ]

    def run(cell: dict) -> dict:
        return run_cell(cell, chosen[cell["case"]], models[cell["case"], cell["ranks"]], weak, seconds, max_tokens, seed)

    measure(groups, run, line_of, lambda cell: 4 + cell["ranks"] + 1.5 * seconds, minutes, results)
    return conclude(results, table, plot, png)


if __name__ == "__main__":
    run_benchmark(main)
