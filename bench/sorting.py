"""Sorting an FFN by single neurons or by blocks of 32: python -m bench.sorting [--model DIR] [--json FILE]

Single neurons separate the important from the unimportant better, but tear the 4-bit blocks of the down projection, which run along
the neurons, and have them rounded again. Both are calibrated on the same text and judged by the same losses.
"""

import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from mpi4py import MPI

from bench.estimates import alone, windows_of
from bench.losses import Layer, Simulation, Way
from bench.results import Results, run_benchmark, shared_options
from bench.shapes import config_of, model_options
from bench.tables import Table
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.whole import load_trunk
from halo_mpi.model.tokenizer import Tokenizer, TokenizerFiles
from halo_mpi.engine.calibration import WIDTH
from halo_mpi.predict.progress_files import ProgressFiles
from halo_mpi.predict.sorting import put_in_order
from halo_mpi.predict.texts import SHIPPED, windows
from halo_mpi.predict.walk import Walk
from halo_mpi.progress import progress
from halo_mpi.store.encoding import BLOCK, quantize
from halo_mpi.store.reader import ModelStore
from halo_mpi.wire.messages import Kind

UNITS = (BLOCK, 1)


def ways_of(config: ModelConfig) -> list[Way]:
    groups = alone(config, Kind.FFN)
    return [
        Way("exact", "zero", 0.0, {}),
        Way("5 % of the groups lost, zero", "zero", 0.05, groups),
        Way("5 % of the groups lost, estimate", "estimate", 0.05, groups),
        Way("10 % of the FFN skipped, static", "zero", 0.1, groups, "static"),
        Way("10 % of the FFN skipped, predicted", "zero", 0.1, groups, "predicted"),
    ]


def sorted_layer(walk: Walk, files: ProgressFiles, layer: int, unit: int, length: int, rounded: str | None) -> Layer:
    """A layer with its neurons in the order that was found; `rounded`: down's new encoding."""
    share, fit = walk.share(layer, length), files.load_fit(layer)
    weights = share.layers[0]
    put_in_order(weights, fit.order, unit)
    if rounded:
        weights.down = torch.from_numpy(quantize(weights.down.numpy(), rounded).dequantize())
    memory = {Kind.FFN: fit.judged.groups_memory.tolist(), Kind.ATTENTION: fit.judged.heads_memory.tolist()}
    estimates = {Kind.FFN: fit.groups, Kind.ATTENTION: fit.heads}
    return Layer(share, estimates, memory, torch.from_numpy(fit.weight), torch.from_numpy(fit.bias),
                 dict.fromkeys(Kind, 1.0))  # fmt: skip


def table(content: dict) -> Table:
    names = list(content["runs"][0]["losses"])
    drawn = Table(f"Perplexity by how neurons are sorted: {content['settings']['model']}", ["sorted by", "down", *names], texts=2)
    for run in content["runs"]:
        drawn.rows.append(
            [f"{run['unit']}", run["rounded"] or "as it was", *(f"{np.exp(run['losses'].get(n, np.nan)):.2f}" for n in names)]
        )
    return drawn


@click.command(help=__doc__)
@model_options
@click.option("--calibration-tokens", type=click.IntRange(1024), default=16000, show_default=True)
@click.option("--tokens", type=click.IntRange(1024), default=8000, show_default=True, help="To judge by.")
@shared_options("json")
def main(model, calibration_tokens, tokens, out) -> int:
    torch.set_grad_enabled(False)
    config, store = config_of(model), ModelStore(model)
    trunk = load_trunk(store, config)
    ids = windows(
        {path.name: path.read_text() for path in SHIPPED},
        Tokenizer(TokenizerFiles.from_dict(store.meta["tokenizer"])),
        calibration_tokens,
        512,
    )
    judged = windows_of(store, tokens, 512)
    walk = Walk(MPI.COMM_SELF, store, config, trunk, ids)
    results = Results("sorting", out, 0, model=config.name, tokens=int(judged.size), calibration_tokens=int(ids.size))
    with tempfile.TemporaryDirectory(prefix="halo-bench-") as name:
        for unit in UNITS:
            files = ProgressFiles(Path(name) / f"{unit}" / "model", "", 0)
            files.begin()
            for _ in progress(walk.fit(files, WIDTH, unit), config.layers, f"calibrating, {unit}"):
                pass
            for rounded in (None,) if unit == BLOCK else (None, "int8", "int4"):
                ways = ways_of(config)[: 1 if rounded else None]
                losses = Simulation(config, trunk, judged, ways).run(
                    lambda layer: sorted_layer(walk, files, layer, unit, judged.shape[1], rounded),
                    lambda steps: progress(steps, len(steps), "losing"),
                )
                found = {way.name: float(loss.mean()) for way, loss in zip(ways, losses)}
                results.add({"unit": unit, "rounded": rounded, "losses": found})
    results.finish()
    table(results.content).print()
    return 0


if __name__ == "__main__":
    run_benchmark(main)
