"""Strict and relaxed in the scenarios of bench/scenarios: python -m bench.scenes [--scenes NAME,...] [--json FILE]

Bursts, delay and jitter, a slow device, bad devices, a link that flaps: each scenario by each mode, in time boxes that alternate.
"""

from pathlib import Path

import click

from bench.cells import generation, require_lab, run_in_lab
from bench.lab.scenario import tomllib
from bench.modes import ENGINE_MODES, MODES, Names
from bench.results import ROOT, Results, run_benchmark, shared_options
from bench.rounds import failures, measure
from bench.shapes import config_of, model_options
from bench.stats import identities, p99_name, pairwise, percentile, pooled, token_ms
from bench.tables import Table, number

SCENARIOS = ROOT / "bench" / "scenarios"
SCENES = ("clean-4", "bursts", "wifi", "hot-pi", "flapping", "two-bad-of-eight")
DEFAULT_MODES = ("strict", "repair", "twice", "relaxed")
PATIENCE_S = 40.0
MAX_TOKENS = 800


def scenario_of(scene: str, pace_ms: float) -> dict:
    """The scenario file's values, at the devices' pace where it sets none."""
    return {"pace_ms": pace_ms, **tomllib.loads((SCENARIOS / f"{scene}.toml").read_text())}


def run_in_scene(model: Path, options: tuple[str, ...], scene: str, pace_ms: float, seconds: float, seed: int, **keys) -> dict:
    """`generate` in a time box, in a scenario; `keys`: of the scenario, on top of the file's."""
    program = generation(model, options, seconds, MAX_TOKENS)
    return run_in_lab({**scenario_of(scene, pace_ms), **keys}, program, 2 * seconds + 2 * PATIENCE_S, seed)


def name_of(cell: dict) -> str:
    return f"{cell['scene']}, {cell['mode']}, repeat {cell['repeat'] + 1}"


def line_of(run: dict) -> str:
    return f"{name_of(run)}: {number(token_ms(run))} ms per token"


def table(content: dict) -> Table:
    settings = content["settings"]
    modes, first = settings["modes"], settings["modes"][0]
    columns = ["scenario", "mode", "tokens", "TPOT p50", "mean", "sync p50", "sync p99", f"time / {first}", "late", "deferred",
               "substituted", "inexact"]  # fmt: skip
    drawn = Table(f"Scenarios: {settings['model']}, {settings['pace_ms']:g} ms per sync and device", columns, texts=2)
    for scene in settings["scenes"]:
        drawn.ruled.add(len(drawn.rows))
        of_scene = [run for run in content["runs"] if run["scene"] == scene]
        for mode in modes:
            own = [run for run in of_scene if run["mode"] == mode and run["status"] == "ok"]
            others = [run for run in of_scene if run["mode"] == first and run["status"] == "ok"]
            samples = pooled(own)
            if not samples:
                drawn.rows.append([scene, mode, "0", *["-"] * 9])
                continue
            ledgers = [run["report"]["ledger"] for run in own]
            sums = sum(ledger["partial_sums"] for ledger in ledgers) or 1
            late = sum(ledger["partial_sums"] - ledger["on_time"] for ledger in ledgers) / sums
            deferred = sum(sum(ledger["deferred"].values()) for ledger in ledgers) / sums
            substituted = sum(ledger["substituted"] for ledger in ledgers) / sums
            inexact = sum(ledger["inexact_importance"] for ledger in ledgers) / len(ledgers)
            ratio = pairwise(own, others, token_ms) if mode != first else None
            drawn.rows.append([
                scene, mode, str(len(samples.tpot_ms)), number(percentile(samples.tpot_ms, 50)), number(samples.token_ms),
                number(percentile(samples.sync_ms, 50)), f"{number(percentile(samples.sync_ms, 99))} ({p99_name(len(samples.sync_ms))})",
                str(ratio) if ratio else "-", *(f"{share:.2%}" for share in (late, deferred, substituted, inexact)),
            ])  # fmt: skip
    drawn.notes += [f"{mode}: {MODES[mode].description}" for mode in modes]
    drawn.notes += failures(content, name_of) + [
        f"token ids, strict or nothing late: {identity}" for identity in identities(content["runs"])
    ]
    return drawn


@click.command(help=__doc__)
@model_options
@click.option("--scenes", type=Names(path.stem for path in SCENARIOS.glob("*.toml")), default=",".join(SCENES), show_default=True)
@click.option("--modes", type=Names(ENGINE_MODES), default=",".join(DEFAULT_MODES), show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1), default=8.0, show_default=True, help="Time box of a run.")
@shared_options("pace", "minutes", "seed", "json")
def main(model, scenes, modes, repeats, seconds, pace_ms, minutes, seed, out) -> int:
    require_lab()
    results = Results("scenes", out, seed, model=config_of(model).name, scenes=scenes, modes=modes, repeats=repeats, seconds=seconds,
                      pace_ms=pace_ms)  # fmt: skip

    def run(cell: dict) -> dict:
        mode = MODES[cell["mode"]]
        return run_in_scene(model, mode.options, cell["scene"], pace_ms, seconds, seed + cell["repeat"], **mode.scenario)

    groups = [[{"scene": s, "mode": m, "repeat": r} for m in modes] for r in range(repeats) for s in scenes]
    measure(groups, run, line_of, lambda _: 15 + 1.5 * seconds, minutes, results)
    table(results.content).print()
    same = all(identity.same for identity in identities(results.runs))
    return 0 if same and any(run["status"] == "ok" for run in results.runs) else 1


if __name__ == "__main__":
    run_benchmark(main)
