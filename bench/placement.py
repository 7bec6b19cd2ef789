"""What the scheduler predicts and what comes of it: python -m bench.placement [--scenes NAME,...] [--json FILE]

Each scenario with even shares, with those that `--placement auto` finds, and if wanted with all heads on the root, in time boxes that
alternate; nothing moves. Ideal: shares in exact proportion to what the devices can do, on the same links, by the cost model; whole heads
and groups cannot always have that.
"""

import click

from bench.cells import require_lab
from bench.modes import Names
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import failures, measure
from bench.scenes import SCENARIOS, run_in_scene
from bench.shapes import config_of, model_options
from bench.stats import pairwise, percentile, pooled, token_ms
from bench.tables import Table, number

PLACEMENTS = ("even", "root-attention", "auto")


def name_of(cell: dict) -> str:
    return f"{cell['scene']}, {cell['placement']}, repeat {cell['repeat'] + 1}"


def line_of(run: dict) -> str:
    return f"{name_of(run)}: {number(token_ms(run))} ms per token"


def ideal_ms(scheduler: dict, layers: int) -> float:
    """A token's time if all shares could have any size: those that get one take equally long."""
    syncs = 0.0
    for kind in ("attention_ms", "ffn_ms"):
        before = sorted((device["link_ms"] + device["fixed_ms"], device[kind]) for device in scheduler["devices"])
        equal = []  # with the first, the first two, ...
        for count in range(1, len(before) + 1):
            speed = sum(1 / whole for _, whole in before[:count])
            ms = (1 + sum(start / whole for start, whole in before[:count])) / speed
            equal.append(ms + (scheduler["sync_ms"] + scheduler["further_ms"] * (count - 2) if count > 1 else 0.0))
        syncs += min(equal)
    return layers * syncs + scheduler["head_ms"]


def table(content: dict) -> Table:
    settings = content["settings"]
    columns = ["scenario", "placement", "groups by rank", "tokens", "TPOT p50", "mean", "predicted", "mean / predicted", "ideal",
               "mean / ideal", "time / even"]  # fmt: skip
    drawn = Table(f"Placement: {settings['model']}, {settings['pace_ms']:g} ms per sync and device", columns, texts=3)
    for scene in settings["scenes"]:
        drawn.ruled.add(len(drawn.rows))
        own = [run for run in content["runs"] if run["scene"] == scene and run["status"] == "ok"]
        even, auto = ([run for run in own if run["placement"] == placement] for placement in ("even", "auto"))
        for placement in settings.get("placements", ("even", "auto")):
            runs = [run for run in own if run["placement"] == placement]
            samples = pooled(runs)
            if not samples or not auto:
                drawn.rows.append([scene, placement, "-", "0", *["-"] * 7])
                continue
            told = [run["report"]["scheduler"] for run in auto]
            options = [each["options"][each["chosen"] if placement == "auto" else placement] for each in told]
            predicted = percentile([option["tpot_ms"] for option in options], 50)
            ideal = percentile([ideal_ms(each, settings["layers"]) for each in told], 50)
            ratio = pairwise(runs, even, token_ms) if placement != "even" else None
            shares = " or ".join(sorted({" ".join(map(str, option["groups"])) for option in options}))
            mean = samples.token_ms
            drawn.rows.append([
                scene, placement, shares, str(len(samples.tpot_ms)), number(percentile(samples.tpot_ms, 50)), number(mean),
                number(predicted), f"{mean / predicted:.2f}", number(ideal), f"{mean / ideal:.2f}", str(ratio) if ratio else "-",
            ])  # fmt: skip
    drawn.notes += [
        "predicted, ideal: by the cost model, from what the ranks of `auto` measured at their start; median of the repeats."
    ]
    drawn.notes += failures(content, name_of)
    return drawn


@click.command(help=__doc__)
@model_options
@click.option("--scenes", type=Names(path.stem for path in SCENARIOS.glob("*.toml")), default="clean-4,clean-8,hot-pi,wifi",
              show_default=True)  # fmt: skip
@click.option("--placements", type=Names(PLACEMENTS), default="even,auto", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1), default=6.0, show_default=True, help="Time box of a run.")
@shared_options("pace", "minutes", "seed", "json")
def main(model, scenes, placements, repeats, seconds, pace_ms, minutes, seed, out) -> int:
    require_lab()
    config = config_of(model)
    results = Results("placement", out, seed, model=config.name, layers=config.layers, scenes=scenes, placements=placements,
                      repeats=repeats, seconds=seconds, pace_ms=pace_ms)  # fmt: skip

    def run(cell: dict) -> dict:
        options = ("--placement", cell["placement"], "--no-moves")
        return run_in_scene(model, options, cell["scene"], pace_ms, seconds, seed + cell["repeat"])

    groups = [[{"scene": s, "placement": p, "repeat": r} for p in placements] for r in range(repeats) for s in scenes]
    measure(groups, run, line_of, lambda _: 15 + 1.5 * seconds, minutes, results)
    table(results.content).print()
    return 0 if any(run["status"] == "ok" for run in results.runs) else 1


if __name__ == "__main__":
    run_benchmark(main)
