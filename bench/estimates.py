"""What predictor and estimates are worth, by simulated losses: python -m bench.estimates [--model DIR] [--json FILE]

Text streams through a calibrated model once for every way to lose partial sums. Nothing that is lost is ever corrected: it stays
zero, the mean of what came before, or the calibration's estimate. Half of the text is a novel, half Python's language reference;
the calibration saw neither. What lateness costs in the engine, where sums are corrected, `bench.tradeoff` measures.
"""

import click
import numpy as np
import torch

from bench.losses import Simulation, Way, stored_layer
from bench.quality import language_reference
from bench.results import ROOT, Results, run_benchmark, shared_options
from bench.shapes import config_of, model_options
from bench.tables import Table
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.whole import load_trunk
from halo_mpi.model.tokenizer import Tokenizer, TokenizerFiles
from halo_mpi.progress import progress
from halo_mpi.schedule.cost import KINDS
from halo_mpi.schedule.placement import make_plan
from halo_mpi.store.reader import ModelStore
from halo_mpi.wire.messages import Kind

NOVEL = ROOT / "bench" / "texts" / "emma.txt"
LOST, SKIPPED = 0.05, (0.10, 0.25)


def alone(config: ModelConfig, kind: Kind, size: int = 1, but: tuple[int, ...] = ()) -> dict:
    """Units of so many groups or heads in every layer, but in some."""
    count = config.groups if kind == Kind.FFN else config.heads
    units = [list(range(start, min(count, start + size))) for start in range(0, count, size)]
    return {(kind, layer): units for layer in range(config.layers) if layer not in but}


def workers_of(config: ModelConfig, placement: str, ranks: int, found: dict) -> dict:
    """What each worker has, lost together; layers 0 and L-1 are waited for."""
    everything = {"query": set(range(config.heads)), "ffn": set(range(config.groups))}
    plan, units = make_plan(config, placement, [everything] * ranks, found), {}
    for kind, owners in ((Kind.ATTENTION, plan.query), (Kind.FFN, plan.ffn)):
        for layer in range(1, config.layers - 1):
            parts = [np.flatnonzero(owners[layer] == rank).tolist() for rank in range(1, ranks)]
            units[kind, layer] = [part for part in parts if part]
    return units


def ways_of(config: ModelConfig, found: dict) -> list[Way]:
    ends, kv = (0, config.layers - 1), config.heads_per_kv
    groups, heads = alone(config, Kind.FFN), alone(config, Kind.ATTENTION)
    kv_heads = alone(config, Kind.ATTENTION, kv)
    inner = alone(config, Kind.FFN, 1, ends) | alone(config, Kind.ATTENTION, kv, ends)
    ways = [Way("exact", "zero", 0.0, {})]
    for what, units in (("FFN groups", groups), ("KV-head groups", kv_heads), ("single heads", heads)):
        ways += [Way(f"{what}, {filled}", filled, LOST, units) for filled in ("zero", "mean", "estimate")]
    ways += [Way(f"groups and KV-head groups, first and last layer exact, {f}", f, LOST, inner) for f in ("zero", "estimate")]
    for placement in ("even", "auto"):
        units = workers_of(config, placement, 4, found)
        name = "by importance" if placement == "auto" else "even"
        ways.append(Way(f"whole workers of 4 ranks placed {name}, first and last layer exact, estimate", "estimate", LOST, units))
    for share in SKIPPED:
        for chosen in ("any", "static", "predicted"):
            if share * config.groups <= config.groups // 4:
                ways.append(Way(f"{share:.0%} of the FFN skipped, {chosen}", "zero", share, groups, chosen))
    return ways


def windows_of(store: ModelStore, tokens: int, length: int) -> np.ndarray:
    """Half a novel, half a reference, [windows, length], as many of each; fewer if the novel is too short."""
    tokenizer = Tokenizer(TokenizerFiles.from_dict(store.meta["tokenizer"]))
    count = max(1, tokens // (2 * length))
    texts = (NOVEL.read_text(), language_reference())
    ids = [tokenizer.encode(text[: 8 * count * length], special=False)[: count * length] for text in texts]
    cut = [np.array(own, np.int32)[: len(own) // length * length].reshape(-1, length) for own in ids]
    return np.concatenate([own[: min(map(len, cut))] for own in cut])


def table(content: dict) -> Table:
    runs = {run["name"]: run for run in content["runs"]}
    exact = runs["exact"]
    drawn = Table(f"Lost for good: {content['settings']['model']}, {content['settings']['tokens']} tokens",
                  ["what is lost", "lost", "perplexity: novel", "reference", "both", "against exact", "estimates recover"])  # fmt: skip
    for name, run in runs.items():
        zero = runs.get(name.replace(", estimate", ", zero"))
        rise = run["loss"] - exact["loss"]
        recovered = "-"
        if name.endswith(", estimate") and zero and zero is not run:
            recovered = f"{1 - rise / (zero['loss'] - exact['loss']):.0%}"
        perplexity = [f"{np.exp(run[key]):.2f}" for key in ("loss_novel", "loss_reference", "loss")]
        drawn.rows.append([name, f"{run['lost']:.1%}", *perplexity, f"{np.exp(rise) - 1:+.1%}", recovered])
    for kind, name in ((Kind.FFN, "groups"), (Kind.ATTENTION, "heads")):
        by_window = np.array(content["importance"][kind.name])  # [windows, 2]
        novel, reference = np.split(by_window, 2)
        parts = [f"{both:.2f} ({one:.2f} novel, {other:.2f} reference)" for both, one, other in
                 zip(by_window.mean(0), novel.mean(0), reference.mean(0))]  # fmt: skip
        drawn.notes.append(
            f"importance of {name}, predicted a layer ahead: rank correlation {parts[0]}, recall of the least quarter {parts[1]}"
        )
    drawn.notes.append(
        "lost: of the partial sums that may be lost. recover: part of the rise of the loss, in nats, that zero brings."
    )
    return drawn


@click.command(help=__doc__)
@model_options
@click.option("--tokens", type=click.IntRange(2), default=20000, show_default=True)
@click.option("--context", type=click.IntRange(2), default=512, show_default=True, help="Tokens per window.")
@click.option("--only", default="", help="Only ways whose names contain this.")
@shared_options("seed", "json")
def main(model, tokens, context, only, seed, out) -> int:
    torch.set_grad_enabled(False)
    config = config_of(model)
    store = ModelStore(model)
    found = store.meta.get("calibration")
    if not found:
        raise click.ClickException(f"{model} is not calibrated; run `halo-mpi calibrate {model}` first")
    windows = windows_of(store, tokens, min(context, config.context))
    ways = [way for way in ways_of(config, found) if only in way.name or way.name == "exact"]
    results = Results("estimates", out, seed, model=config.name, tokens=int(windows.size), calibration_tokens=found["tokens"])
    simulation = Simulation(config, load_trunk(store, config), windows, ways, seed)
    losses = simulation.run(
        lambda layer: stored_layer(store, config, layer, windows.shape[1]), lambda steps: progress(steps, len(steps), "losing")
    )
    half = losses.shape[1] // 2
    for way, loss, (lost, all_) in zip(ways, losses, simulation.lost):
        parts = {"loss": loss.mean(), "loss_novel": loss[:half].mean(), "loss_reference": loss[half:].mean()}
        results.add({"name": way.name, "lost": lost / max(1, all_), **{key: float(value) for key, value in parts.items()}})
    results.content["importance"] = {kind.name: np.mean(simulation.judged[kind], axis=1).tolist() for kind in KINDS}
    results.finish()
    table(results.content).print()
    return 0


if __name__ == "__main__":
    run_benchmark(main)
