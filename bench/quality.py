"""What a mode costs in quality under loss: python -m bench.quality [--json FILE] [--plot FILE.png]

`halo_mpi.evaluate` scores a text token by token over the lab's network. Every run is compared with the first one, strict
without loss: perplexity, how often the likeliest token is the same, and how far the log-probabilities are apart. The text is
Python's own language reference, from pydoc_data, unless --text is given.
"""

import pydoc_data.topics
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from bench.cells import EVEN, require_lab, run_in_lab
from halo_mpi.figures import figure, require_matplotlib
from bench.modes import ENGINE_MODES, MODES, Names, Numbers
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import conclude, failures, measure
from bench.shapes import config_of, model_options
from bench.stats import percentile
from bench.tables import Table, number


def language_reference() -> str:
    """A text that is there wherever Python is."""
    return "\n\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))


def cells(modes: tuple[str, ...], losses: tuple[float, ...]) -> list[dict]:
    """The reference, strict without loss, comes first whatever was asked for."""
    asked = [{"mode": mode, "loss": loss} for loss in losses for mode in modes]
    reference = {"mode": "strict", "loss": 0.0}
    return [reference, *(cell for cell in asked if cell != reference)]


def run_cell(cell: dict, model: Path, text: Path, ranks: int, tokens: int, context: int, pace_ms: float, timeout_s: float,
             seed: int) -> dict:  # fmt: skip
    mode = MODES[cell["mode"]]
    scenario = {"hosts": ranks, "loss": cell["loss"] / 100, "pace_ms": pace_ms, **mode.scenario}
    program = scoring(model, mode.options, text, tokens, context)
    return scored(program, lambda command: run_in_lab(scenario, command, timeout_s, seed))


def scoring(model: Path, options: tuple[str, ...], text: Path, tokens: int, context: int) -> list:
    """`evaluate` of the first tokens of a text."""
    program = ["halo_mpi.evaluate", *EVEN, "--model", model, *options, "--text", text, "--tokens", tokens]
    return [*program, "--context", context, "--samples"]


def scored(program: list, start: Callable[[list], dict]) -> dict:
    """What became of a program of `scoring`, with `logprobs` and `top1` of every scored token."""
    with tempfile.TemporaryDirectory(prefix="halo-bench-") as name:
        files = {"logprobs": Path(name) / "logprobs.npy", "top1": Path(name) / "top1.npy"}
        run = start([*program, "--logprobs", files["logprobs"], "--top1", files["top1"]])
        for key, path in files.items():
            run[key] = np.load(path).astype(float).round(5).tolist() if path.exists() else None
    return run


def compared(run: dict, reference: dict) -> dict | None:
    """A run's quality beside the reference's; None if either is missing."""
    if run["status"] != "ok" or reference["status"] != "ok":
        return None
    distance = np.abs(np.array(run["logprobs"]) - np.array(reference["logprobs"]))
    return {
        "perplexity": run["report"]["perplexity"],
        "ratio": run["report"]["perplexity"] / reference["report"]["perplexity"],
        "top1": float(np.mean(np.array(run["top1"]) == np.array(reference["top1"]))),
        "mean_distance": float(distance.mean()),
        "max_distance": float(distance.max()),
    }


def table(content: dict) -> Table:
    settings, runs = content["settings"], content["runs"]
    columns = ["loss", "mode", "perplexity", "against strict", "same top-1", "mean |d logprob|", "max", "TPOT p50 ms", "inexact"]
    title = f"Quality under loss: {settings['model']}, {settings['ranks']} ranks, {settings['tokens']} tokens"
    drawn = Table(title, columns, texts=2)
    for run in runs:
        quality = compared(run, runs[0])
        if quality is None:
            drawn.rows.append([f"{run['loss']:g} %", run["mode"], run["status"], *["-"] * 6])
            continue
        tpot_ms = run["report"]["samples"]["tpot_ms"]
        drawn.rows.append(
            [
                f"{run['loss']:g} %",
                run["mode"],
                f"{quality['perplexity']:.4f}",
                f"{quality['ratio'] - 1:+.3%}",
                f"{quality['top1']:.2%}",
                f"{quality['mean_distance']:.5f}",
                f"{quality['max_distance']:.5f}",
                number(percentile(tpot_ms, 50)),
                f"{run['report']['ledger']['inexact_importance']:.2%}",
            ]
        )
    drawn.notes.append("against strict: the first row, without loss. inexact: the ledger's mean share of importance.")
    drawn.notes += failures(content, name_of) + wrong(content)
    return drawn


def wrong(content: dict) -> list[str]:
    """Exact modes whose log-probabilities are not those of the first exact run with the same wire format and placement."""
    found, references = [], {}
    for run in content["runs"]:
        if run["status"] == "ok" and run["mode"] in MODES and MODES[run["mode"]].exact:
            reference = references.setdefault((run["report"]["sync"]["wire"], run["report"]["placement"]), run)
            distance = compared(run, reference)["max_distance"]
            if distance:
                found.append(f"WRONG: {name_of(run)} is exact, but differs from {name_of(reference)} by {distance:.5f}")
    return found


def plot(content: dict, path: Path) -> None:
    """Perplexity and time per token against loss; then one against the other."""
    runs = [run for run in content["runs"] if compared(run, content["runs"][0])]
    if not runs:
        return
    with figure(path, 3, 4.2) as panels:
        for index, mode in enumerate(dict.fromkeys(run["mode"] for run in runs)):
            own = sorted((run for run in runs if run["mode"] == mode), key=lambda run: run["loss"])
            losses = [run["loss"] for run in own]
            perplexity = [run["report"]["perplexity"] for run in own]
            times = [percentile(run["report"]["samples"]["tpot_ms"], 50) for run in own]
            for panel, x, y in zip(panels, (losses, losses, times), (perplexity, times, perplexity)):
                panel.plot(x, y, "o-", color=f"C{index}", label=mode)
        for panel, x, y in zip(
            panels, ("packets lost, %",) * 2 + ("ms per token",), ("perplexity", "ms per token", "perplexity")
        ):
            panel.set(xlabel=x, ylabel=y)
            panel.grid(alpha=0.3)
        panels[0].legend(fontsize="small")


def name_of(cell: dict) -> str:
    return f"{cell['mode']}, loss {cell['loss']:g} %"


def line_of(run: dict) -> str:
    perplexity = run["report"]["perplexity"] if run["report"] else None
    return f"{name_of(run)}: perplexity {number(perplexity, 4)}"


@click.command(help=__doc__)
@model_options
@click.option("--modes", type=Names(ENGINE_MODES), default=",".join(ENGINE_MODES), show_default=True)
@click.option("--losses", type=Numbers(float, 0, 99), default="0,2,5", show_default=True, help="Per cent of the packets.")
@click.option("--ranks", type=click.IntRange(2, 64), default=4, show_default=True)
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="UTF-8 text to score.")
@click.option("--tokens", type=click.IntRange(2), default=150, show_default=True, help="Tokens of text.")
@click.option("--context", type=click.IntRange(2), default=512, show_default=True, help="Tokens per window.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(1), default=400.0, show_default=True, help="Seconds for one run.")
@shared_options("pace", "minutes", "seed", "json", "plot")
def main(model, modes, losses, ranks, text, tokens, context, pace_ms, timeout_s, minutes, seed, out, png) -> int:
    require_matplotlib(png)
    require_lab()
    config = config_of(model)
    context = min(context, config.context)
    settings = {"model": config.name, "modes": modes, "losses": losses, "ranks": ranks, "text": text.name if text else "pydoc_data",
                "tokens": tokens, "context": context, "pace_ms": pace_ms}  # fmt: skip
    results = Results("quality", out, seed, **settings)
    with tempfile.TemporaryDirectory(prefix="halo-bench-") as name:
        file = text.resolve() if text else Path(name) / "text"
        if not text:
            file.write_text(language_reference())

        def run(cell: dict) -> dict:
            return run_cell(cell, model, file, ranks, tokens, context, pace_ms, timeout_s, seed)

        measure([[cell] for cell in cells(modes, losses)], run, line_of, lambda _: 20 + 0.3 * tokens, minutes, results)
    code = conclude(results, table, plot, png)
    return 1 if wrong(results.content) else code


if __name__ == "__main__":
    run_benchmark(main)
