"""Where some devices' links are bad: who should have what? python -m bench.unstable [--scene two-bad-of-eight] [--json FILE]

Each run is an `evaluate` over the lab's network: strict over good links first, then strict and relaxed over bad ones, with ways to
place the work: without a calibration, with its predictor and estimates, with what matters least on the bad devices, and so on. Of
strict runs a tenth of the tokens where a part of every layer is there. Everything is judged against one rank alone, f32, on the same
tokens.
"""

import json
import tempfile
from pathlib import Path

import click

from bench.cells import require_lab, run_in_lab, run_locally
from bench.lab.scenario import load_scenario
from bench.modes import Names
from bench.quality import language_reference, scored, scoring
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import conclude, failures, measure
from bench.scenes import SCENARIOS, scenario_of
from bench.shapes import config_of, model_options
from bench.stats import percentile, pooled
from bench.tables import Table, number
from bench.tradeoff import quality
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.records import split_evenly

WAYS = {
    "plain": ("without calibration, even shares", ("--no-calibration", "--placement", "even")),
    "calibrated": ("predictor and estimates", ()),
    "tiers": ("the same, what matters least to the bad devices", ("--placement", "TIERS")),
    "any": ("half an even share of the weights there: groups, whichever come next, no heads", ("--placement", "ANY")),
    "half": ("the same, the groups that matter least", ("--placement", "HALF")),
    "gathered": ("as much there, gathered in whole layers, as few as possible", ("--placement", "GATHERED")),
    "auto": ("placement auto, whose work moves", ("--placement", "auto")),
    "measured": ("the same, with links that are bad already when they are measured", ("--placement", "auto")),
}
RELAXED = ("auto", 8, 0.5)  # deadline in ms, max lag, quality: two of eight devices may be done without
AUTO = ("auto", "measured")
QUICK = ("gathered", *AUTO)  # strict as well
TIMEOUT_S = 600.0


def tiers_of(scene: str) -> list[list[int]]:
    """The root, the workers, and those of them whose links lose more than the others'."""
    hosts = load_scenario(SCENARIOS / f"{scene}.toml").hosts
    loss = [host.loss for host in hosts.values()]
    workers = range(1, len(loss))
    bad = [rank for rank in workers if loss[rank] > min(loss)]
    return [tier for tier in ([0], [rank for rank in workers if rank not in bad], bad) if tier]


def half_of(config: ModelConfig, tiers: list[list[int]]) -> dict:
    """A placement file's content: the last tier holds about half an even share, all of it groups; the others share the rest evenly."""
    *good, bad = tiers
    good, ranks = sum(good, []), sum(map(len, tiers))
    weights = 3 * config.ffn + 2 * (config.heads + config.kv_heads) * config.head_dim  # of a layer, in rows of `hidden`
    each = max(1, round(weights / (2 * ranks) / (3 * config.group_size)))
    heads, groups = [0] * ranks, [0] * ranks
    for counts, count in ((heads, config.heads), (groups, config.groups - each * len(bad))):
        for rank, own in zip(good, split_evenly(count, len(good))):
            counts[rank] = own
    return {"tiers": tiers, "heads": heads, "groups": [each if rank in bad else own for rank, own in enumerate(groups)]}


def name_of(cell: dict) -> str:
    if cell["way"] == "reference":
        return "one rank alone, f32"
    if "deadline" in cell:
        return f"{WAYS[cell['way']][0]}: relaxed, deadline {cell['deadline']} ms, lag {cell['max_lag']}, quality {cell['quality']}"
    return f"{WAYS[cell['way']][0]}: strict{', no bad links' if cell.get('clean') else ''}"


def line_of(run: dict) -> str:
    samples = pooled([run])
    return f"{name_of(run)}: {number(samples.token_ms if samples else None)} ms per token"


def table(content: dict) -> Table:
    settings, runs = content["settings"], [run for run in content["runs"] if run["status"] == "ok"]
    columns = [
        "way and setting",
        "tokens",
        "TPOT mean",
        "p50",
        "sync p99",
        "perplexity",
        "same top-1",
        "deferred",
        "substituted",
        "inexact",
    ]
    drawn = Table(
        f"Bad devices: {settings['scene']}, {settings['model']}, {settings['pace_ms']:g} ms per sync and device", columns
    )
    reference = next((run for run in runs if run["way"] == "reference"), None)
    before = None
    for run in runs:
        samples, ledger = pooled([run]), run["report"]["ledger"]
        judged = quality(run, reference) if reference else None
        if run["way"] != before:
            drawn.ruled.add(len(drawn.rows))
        before, sums = run["way"], max(1, ledger["partial_sums"])
        drawn.rows.append([
            name_of(run), str(len(samples.tpot_ms)), number(samples.token_ms), number(percentile(samples.tpot_ms, 50)),
            number(percentile(samples.sync_ms, 99)), f"{judged[0] - 1:+.2%}" if judged else "-", f"{judged[1]:.1%}" if judged else "-",
            f"{sum(ledger['deferred'].values()) / sums:.1%}", f"{ledger['substituted'] / sums:.1%}", f"{ledger['inexact_importance']:.1%}",
        ])  # fmt: skip
    drawn.notes += ["perplexity, same top-1: against one rank alone, f32, on the same tokens.", *failures(content, name_of)]
    return drawn


@click.command(help=__doc__)
@model_options
@click.option("--scene", type=click.Choice(sorted(path.stem for path in SCENARIOS.glob("*.toml"))), default="two-bad-of-eight",
              show_default=True)  # fmt: skip
@click.option("--ways", type=Names(WAYS), default=",".join(WAYS), show_default=True)
@click.option("--memory", help="Of each device, as of generate, where placement is auto: so little that the bad ones are needed.")
@click.option("--read-mbps", type=click.FloatRange(0, min_open=True), help="MB/s that each device's disk gives at most, as from a folder "
              "on the network.")  # fmt: skip
@click.option("--sync", "syncs", type=Names(("strict", "relaxed")), default="strict,relaxed", show_default=True, help="Over the bad links.")
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True, help="Rounds, each of all ways.")
@click.option("--tokens", type=click.IntRange(2), default=300, show_default=True, help="Tokens of text in a run.")
@click.option("--context", type=click.IntRange(2), default=512, show_default=True, help="Tokens per window.")
@shared_options("pace", "minutes", "seed", "json", minutes=40)
def main(model, scene, ways, memory, read_mbps, syncs, repeats, tokens, context, pace_ms, minutes, seed, out) -> int:
    require_lab()
    config = config_of(model)
    context = min(context, config.context)
    scenario = scenario_of(scene, pace_ms) | ({"read_mbps": read_mbps} if read_mbps else {})
    results = Results("unstable", out, seed, model=config.name, scene=scene, tokens=tokens, context=context, memory=memory,
                      read_mbps=read_mbps, syncs=syncs, pace_ms=pace_ms)  # fmt: skip
    relaxed = dict(zip(("deadline", "max_lag", "quality"), RELAXED))
    groups = [[{"way": "reference"}]]
    for repeat in range(repeats):
        groups.append([{"way": way, "clean": True, "repeat": repeat} for way in ways[:1]])
        groups += [[{"way": way, **(relaxed if sync == "relaxed" else {}), "repeat": repeat} for sync in syncs] for way in ways]
    with tempfile.TemporaryDirectory(prefix="halo-bench-") as name:
        text, tiers = Path(name) / "text", tiers_of(scene)
        text.write_text(language_reference())
        half = half_of(config, tiers)
        contents = {
            "TIERS": {"tiers": tiers},
            "ANY": {counts: half[counts] for counts in ("heads", "groups")},
            "HALF": half,
            "GATHERED": {**half, "gathered": tiers[-1]},
        }
        files = {key: Path(name) / f"{key.lower()}.json" for key in contents}
        for key, path in files.items():
            path.write_text(json.dumps(contents[key]))

        def run(cell: dict) -> dict:
            if cell["way"] == "reference":
                program = scoring(model, ("--wire", "f32"), text, tokens, context)
                return scored(program, lambda command: run_locally(1, command, TIMEOUT_S))
            options, strict = ("--sync", "strict"), "deadline" not in cell
            if not strict:
                options = ("--sync", "relaxed", "--deadline-ms", cell["deadline"], "--max-lag", str(cell["max_lag"]),
                           "--quality", str(cell["quality"]))  # fmt: skip
            chosen = [str(files.get(option, option)) for option in WAYS[cell["way"]][1]]
            if memory and cell["way"] in AUTO:
                chosen += ["--memory", memory]
            slow = strict and not cell.get("clean") and cell["way"] not in QUICK
            program = scoring(model, (*options, *chosen), text, max(2, tokens // 10) if slow else tokens, context)
            over = {**scenario, "host": {}} if cell.get("clean") else scenario
            if cell["way"] == "measured":
                over = {**over, "loss_during": "measuring"}
            return scored(program, lambda command: run_in_lab(over, command, TIMEOUT_S, seed))

        measure(groups, run, line_of, lambda cell: 30 + 0.3 * tokens, minutes, results)
    return conclude(results, table, lambda content, path: None, None)


if __name__ == "__main__":
    run_benchmark(main)
