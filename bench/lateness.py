"""What late partial sums cost in quality, and what waiting for some of them saves: python -m bench.lateness [--model DIR] [--json FILE]

Simulated like `bench.estimates`, but what is lost comes late and is corrected then: so many syncs later as the ledger of a relaxed run
over 5 % loss counted. One knob is turned: the price, in even shares of importance, above which a late sum is waited for. The lower it is,
the more of the late sums cost time and the fewer cost quality; the best price is where the curve bends.
"""

import click
import numpy as np
import torch

from bench.estimates import windows_of, workers_of
from bench.losses import Simulation, Way, stored_layer
from bench.results import Results, run_benchmark, shared_options
from bench.shapes import config_of, model_options
from bench.tables import Table
from halo_mpi.model.whole import load_trunk
from halo_mpi.progress import progress
from halo_mpi.store.reader import ModelStore

LATE = 0.075  # of all partial sums: bench/results/tradeoff-calibrated-5.json, max lag 8
LAGS = (0.26, 0.19, 0.16, 0.13, 0.11, 0.08, 0.05, 0.02)  # of these, by syncs: the same
PRICES = (np.inf, 5.0, 3.0, 2.0, 1.5, 1.0, 0.9, 0.7, 0.5)


def table(content: dict) -> Table:
    runs = content["runs"]
    drawn = Table(f"{LATE:.1%} late, up to {len(LAGS)} syncs: {content['settings']['model']}, {content['settings']['tokens']} tokens",
                  ["price, even shares", "waited for, of the late", "perplexity", "against exact"])  # fmt: skip
    exact, most = runs[0], max(run["inexact"] for run in runs)
    for run in runs:
        rise = np.exp(run["loss"] - exact["loss"]) - 1
        drawn.rows.append(
            [
                run["name"],
                f"{1 - run['inexact'] / most:.0%}" if run is not exact else "all",
                f"{np.exp(run['loss']):.3f}",
                f"{rise:+.2%}",
            ]
        )
    return drawn


@click.command(help=__doc__)
@model_options
@click.option("--tokens", type=click.IntRange(2), default=4096, show_default=True)
@click.option("--ranks", type=click.IntRange(2), default=4, show_default=True)
@shared_options("seed", "json")
def main(model, tokens, ranks, seed, out) -> int:
    torch.set_grad_enabled(False)
    config, store = config_of(model), ModelStore(model)
    found = store.meta.get("calibration")
    if not found or not found["sensitivity"]:
        raise click.ClickException(f"{model} is not calibrated with sensitivities; run `halo-mpi calibrate {model}` first")
    windows = windows_of(store, tokens, min(512, config.context))
    units = workers_of(config, "auto", ranks, found)
    ways = [Way("exact", "zero", 0.0, {}), Way("inf, running means", "mean", LATE, units, "any", LAGS)]
    ways += [Way(f"{price:g}", "estimate", LATE, units, "any", LAGS, price) for price in PRICES]
    results = Results("lateness", out, seed, model=config.name, tokens=int(windows.size), ranks=ranks, late=LATE, lags=LAGS)
    simulation = Simulation(config, load_trunk(store, config), windows, ways, seed)
    losses = simulation.run(
        lambda layer: stored_layer(store, config, layer, windows.shape[1]),
        lambda steps: progress(steps, len(steps), "being late"),
    )
    for way, loss, (lost, all_) in zip(ways, losses, simulation.lost):
        results.add({"name": way.name, "inexact": lost / max(1, all_), "loss": float(loss.mean())})
    results.finish()
    table(results.content).print()
    return 0


if __name__ == "__main__":
    run_benchmark(main)
