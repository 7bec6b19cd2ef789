"""How far the cost model can be trusted: python -m bench.validation [--scenes NAME,...] [--json FILE] [--plot FILE.png]

Each scene of the lab with even shares and with those of `--placement auto`, in time boxes that alternate; nothing moves. Beside the
measured time per token are two predictions: from what the ranks measured at the start of the run with auto, and from the scene's
description, which is how `plan --profile` simulates: what was measured on the clean scene, changed by the numbers in the scene's file.
"""

from pathlib import Path

import click

from bench.cells import require_lab
from bench.lab.scenario import Host, load_scenario
from bench.modes import Names
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import conclude, failures, measure
from bench.scenes import SCENARIOS, run_in_scene
from bench.shapes import config_of, meta_of, model_options
from bench.splits import scheduler_of
from bench.stats import percentile, pooled, token_ms
from bench.tables import Table, number
from halo_mpi.figures import figure, require_matplotlib
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.choice import sizes_of
from halo_mpi.schedule.cost import token_cost
from halo_mpi.schedule.devices import described

CLEAN = "clean-4"
UNDELAYED = (CLEAN, "hot-pi", "loss-2", "loss-5")
SCENES = (*UNDELAYED, "wifi")
PLACEMENTS = ("even", "auto")
SOURCES = ("at the start", "from the description")
CONTEXT = 512
COMPUTING = ("attention_ms", "ffn_ms", "fixed_ms")
TIMES = (*COMPUTING, "link_ms")


def as_described(measured: dict, scene: str) -> dict:
    """A file of devices: what was measured on the clean scene, with what a scene's file says of its hosts."""
    hosts = list(load_scenario(SCENARIOS / f"{scene}.toml").hosts.values())
    devices = [_changed(device, host, rank) for rank, (device, host) in enumerate(zip(measured["devices"], hosts))]
    return {**measured, "devices": devices}


def _changed(device: dict, host: Host, rank: int) -> dict:
    own = {name: value for name, value in device.items() if name not in ("late_rate", "late_ms", "kb_ms")}
    for name in COMPUTING:
        own[name] /= host.slowdown
    if host.rate_mbit:
        own["mbit"] = host.rate_mbit
    if rank:
        own |= {"link_ms": own["link_ms"] + 2 * host.delay_ms, "loss": host.mean_loss}
    return own


def clean_devices(runs: list[dict]) -> dict | None:
    """What was measured on the clean scene: medians over its runs."""
    told = [found for run in runs if run["scene"] == CLEAN and (found := scheduler_of(run))]
    if not told:
        return None
    devices = [
        {**same[0], **{name: percentile([device[name] for device in same], 50) for name in TIMES}}
        for same in zip(*(each["devices"] for each in told))
    ]
    beside = {name: percentile([each[name] for each in told], 50) for name in ("sync_ms", "further_ms", "head_ms")}
    return {"model": told[0]["model"], "devices": devices, **beside}


def predictions(runs: list[dict], scene: str, placement: str, config: ModelConfig, dtype: str) -> dict[str, float]:
    """By source, in ms per token: the medians over the repeats."""
    found: dict[str, list[float]] = {source: [] for source in SOURCES}
    clean = clean_devices(runs)
    for run in runs:
        told = scheduler_of(run) if run["scene"] == scene else None
        if not told:
            continue
        option = told["options"][told["chosen"] if placement == "auto" else "even"]
        found["at the start"].append(option["tpot_ms"])
        if clean:
            cluster = described(as_described(clean, scene), scene, sizes_of(config, dtype), CONTEXT)
            found["from the description"].append(token_cost(cluster, config.layers, option["heads"], option["groups"]).tpot_ms)
    return {source: percentile(values, 50) for source, values in found.items() if values}


def compared(content: dict) -> list[tuple[str, str, list[dict], dict[str, float]]]:
    """Scene, placement, the runs that ended well, and what was predicted of them."""
    settings, runs = content["settings"], [run for run in content["runs"] if run["status"] == "ok"]
    config = ModelConfig.from_dict(settings["config"])
    every = ((scene, placement) for scene in settings["scenes"] for placement in PLACEMENTS)
    return [
        (scene, placement, own, predictions(runs, scene, placement, config, settings["dtype"]))
        for scene, placement in every
        if (own := [run for run in runs if (run["scene"], run["placement"]) == (scene, placement)])
    ]


def table(content: dict) -> Table:
    settings = content["settings"]
    beside = [word for source in SOURCES for word in (source, "mean / that")]
    columns = ["scene", "shares", "groups by rank", "tokens", "TPOT p50", "mean", *beside]
    drawn = Table(f"Predicted and measured: {settings['model']}, {settings['pace_ms']:g} ms per sync and device", columns, texts=3)
    ratios: dict[str, list[float]] = {source: [] for source in SOURCES}
    for scene, placement, runs, predicted in compared(content):
        samples = pooled(runs)
        cells = [scene, placement, " or ".join(sorted({groups_of(run) for run in runs})), str(len(samples.tpot_ms)),
                 number(percentile(samples.tpot_ms, 50)), number(samples.token_ms)]  # fmt: skip
        for source in SOURCES:
            ratio = samples.token_ms / predicted[source] if source in predicted else None
            cells += [number(predicted.get(source)), "-" if ratio is None else f"{ratio:.2f}"]
            ratios[source] += [] if ratio is None else [ratio]
        drawn.rows.append(cells)
    drawn.notes = [
        f"{source}: measured is {min(values):.2f} to {max(values):.2f} times predicted, median {percentile(values, 50):.2f}"
        for source, values in ratios.items()
        if values
    ]
    drawn.notes += [*_of_the_program(content["runs"]), *failures(content, name_of)]
    return drawn


def _of_the_program(runs: list[dict]) -> list[str]:
    """What `halo_mpi/schedule/profiles.py` takes for the program itself, where the scene adds no delay."""
    told = [found for run in runs if run["scene"] in UNDELAYED and (found := scheduler_of(run))]
    if not told:
        return []
    links = [device["link_ms"] for each in told for device in each["devices"][1:]]
    sync_ms, further_ms = ([each[name] for each in told] for name in ("sync_ms", "further_ms"))
    medians = ", ".join(f"{name} {percentile(of, 50):.2f}" for name, of in (("link", links), ("sync", sync_ms), ("further", further_ms)))
    return [f"the program itself, ms, measured at the start where nothing is delayed, medians of {len(told)} runs: {medians}"]


def groups_of(run: dict) -> str:
    return " ".join(str(round(device["groups"] / run["layers"])) for device in run["report"]["devices"])


def plot(content: dict, path: Path) -> None:
    """Measured against predicted; on the line they are the same."""
    every = compared(content)
    if not every:
        return
    with figure(path, 1, 6.0) as (panel,):
        for source, mark in zip(SOURCES, "ox"):
            points = [(predicted[source], pooled(runs).token_ms) for _, _, runs, predicted in every if source in predicted]
            if points:
                panel.plot(*zip(*points), mark, label=f"predicted {source}")
        ends = [limit for limits in (panel.get_xlim(), panel.get_ylim()) for limit in limits]
        panel.plot([min(ends), max(ends)], [min(ends), max(ends)], "k:", linewidth=1)
        panel.set(xlabel="predicted, ms per token", ylabel="measured, ms per token")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")


def name_of(cell: dict) -> str:
    return f"{cell['scene']}, {cell['placement']}, repeat {cell['repeat'] + 1}"


def line_of(run: dict) -> str:
    return f"{name_of(run)}: {number(token_ms(run))} ms per token"


@click.command(help=__doc__)
@model_options
@click.option("--scenes", type=Names(path.stem for path in SCENARIOS.glob("*.toml")), default=",".join(SCENES), show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Time box of a run.")
@shared_options("pace", "minutes", "seed", "json", "plot")
def main(model, scenes, repeats, seconds, pace_ms, minutes, seed, out, png) -> int:
    require_matplotlib(png)
    require_lab()
    config = config_of(model)
    results = Results("validation", out, seed, model=config.name, config=config.to_dict(), dtype=meta_of(model)["dtype"], scenes=scenes,
                      repeats=repeats, seconds=seconds, pace_ms=pace_ms)  # fmt: skip

    def run(cell: dict) -> dict:
        options = ("--placement", cell["placement"], "--no-moves")
        return {"layers": config.layers, **run_in_scene(model, options, cell["scene"], pace_ms, seconds, seed + cell["repeat"])}

    groups = [[{"scene": s, "placement": p, "repeat": r} for p in PLACEMENTS] for r in range(repeats) for s in scenes]
    measure(groups, run, line_of, lambda _: 8 + 1.5 * seconds, minutes, results)
    return conclude(results, table, plot, png)


if __name__ == "__main__":
    run_benchmark(main)
