"""Time against quality: python -m bench.tradeoff [--json FILE] [--plot FILE.png]

The figure of the project. At each loss rate: strict modes as points (their quality does not depend on the network), and relaxed
runs over deadline and max lag, each `evaluate` over the lab's network, so that one run gives both its time per token and its
perplexity. Everything is compared with one rank alone, f32, on the same tokens.
"""

import tempfile
from pathlib import Path

import click
import numpy as np

from bench.cells import require_lab, run_in_lab, run_locally
from halo_mpi.figures import figure, require_matplotlib
from bench.modes import MODES, Numbers
from bench.quality import language_reference, scored, scoring
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import conclude, failures, measure
from bench.shapes import config_of, model_options
from bench.stats import percentile, pooled
from bench.tables import Table, number
from bench.tpot import Box

EXACT = ("strict", "strict-tuned", "repair-f32", "repair", "twice-f32", "twice")
CLEAN = ("twice-f32", "twice")  # at 0 %: what times are compared with
WIRES = ("f16", "q8")
CURVE = (("auto", 2, 0.3), ("auto", 8, 0.3), ("1", 8, 0.6))  # deadline in ms, max lag, quality
OTHERS = {
    "relaxed-once": 300,
    "relaxed-f32": 300,
    "relaxed-f32-soon": 300,
    "relaxed-old": 300,
    "repair-old": 100,
    "twice-old": 200,
    "halo": 150,
}  # at the long loss; tokens
EXACT_TOKENS = 400  # at most, in a time box
TIMEOUT_S = 900.0
TICKS_MS = (50, 100, 200, 400, 1000, 2000, 4000, 10000)
COLORS = [f"C{number}" for number in range(10)] + ["black", "gold", "navy", "lime"]


def cells(losses: tuple[float, ...], ranks: int, tokens: int, long_loss: float, long_tokens: int) -> list[list[dict]]:
    """The references first, then loss by loss, the one with the long runs first."""
    alone = [{"mode": "reference", "wire": "f32", "loss": None, "ranks": 1, "tokens": max(tokens, long_tokens)}]
    wires = [{"mode": "reference", "wire": wire, "loss": None, "ranks": ranks, "tokens": tokens} for wire in WIRES]
    groups = [alone, wires]
    for loss in sorted(losses, key=lambda loss: loss != long_loss):
        of_loss = {"loss": loss, "ranks": ranks}
        exact = [{"mode": mode, **of_loss, "tokens": 0, "repeat": 0} for mode in EXACT if loss or mode != "strict-tuned"]
        others = [{"mode": mode, **of_loss, "tokens": OTHERS[mode]} for mode in OTHERS if loss == long_loss]
        curve = CURVE if loss else CURVE[1:2]
        count = long_tokens if loss == long_loss else tokens
        points = [
            {"mode": "relaxed", **of_loss, "deadline": d, "max_lag": lag, "quality": q, "tokens": count} for d, lag, q in curve
        ]
        groups += [exact, points, others]
    return groups


def run_cell(cell: dict, model: Path, text: Path, context: int, pace_ms: float, seconds: float, seed: int) -> dict:
    if cell["mode"] in EXACT:
        return Box(model, seconds, pace_ms, EXACT_TOKENS, seed).run(cell)
    if cell["mode"] == "reference":
        program = scoring(model, ("--sync", "strict", "--wire", cell["wire"]), text, cell["tokens"], context)
        return scored(program, lambda command: run_locally(cell["ranks"], command, TIMEOUT_S))
    mode = MODES[cell["mode"]]
    options = mode.options
    if "deadline" in cell:
        options += ("--deadline-ms", cell["deadline"], "--max-lag", str(cell["max_lag"]), "--quality", str(cell["quality"]))
    scenario = {"hosts": cell["ranks"], "loss": cell["loss"] / 100, "pace_ms": pace_ms, **mode.scenario}
    program = scoring(model, options, text, cell["tokens"], context)
    return scored(program, lambda command: run_in_lab(scenario, command, TIMEOUT_S, seed))


def quality(run: dict, reference: dict) -> tuple[float, float] | None:
    """Perplexity as a multiple of the reference's on the same tokens, and how often the likeliest token is the same."""
    if run.get("logprobs") is None or reference.get("logprobs") is None:
        return None
    count = min(len(run["logprobs"]), len(reference["logprobs"]))
    mine, other = np.array(run["logprobs"][:count]), np.array(reference["logprobs"][:count])
    same = np.mean(np.array(run["top1"][:count]) == np.array(reference["top1"][:count]))
    return float(np.exp(other.mean() - mine.mean())), float(same)


def name_of(cell: dict) -> str:
    if cell["mode"] == "reference":
        return f"strict, {cell['wire']}, {cell['ranks']} local rank" + ("s" if cell["ranks"] > 1 else "")
    settings = f" {cell['deadline']} ms, lag {cell['max_lag']}, quality {cell['quality']}" if "deadline" in cell else ""
    return f"{cell['mode']}{settings}, loss {cell['loss']:g} %"


def line_of(run: dict) -> str:
    samples = pooled([run])
    return f"{name_of(run)}: {number(samples.token_ms if samples else None)} ms per token"


def wire_of(mode: str) -> str:
    """Of an exact mode: strict is as good as its wire format, whatever the loss."""
    options = MODES[mode].options
    return options[options.index("--wire") + 1] if "--wire" in options else "f16"


def points(content: dict) -> list[dict]:
    """Per run of a lab that ended well: mode, loss, name, ms (mean and p50 of a token), perplexity ratio, top-1 agreement."""
    runs = [run for run in content["runs"] if run["status"] == "ok"]
    references = {run["wire"]: run for run in runs if run["mode"] == "reference"}
    if "f32" not in references:
        return []
    found = []
    for run in runs:
        samples = pooled([run])
        judged = references.get(wire_of(run["mode"])) if run["mode"] in EXACT else run
        if not samples or not judged:
            continue
        ledger = run["report"]["ledger"]
        ratio = quality(judged, references["f32"])
        late = {
            "deferred": sum(ledger["deferred"].values()) / max(1, ledger["partial_sums"]),
            "inexact": ledger["inexact_importance"],
        }
        times = {
            "mean_ms": samples.token_ms,
            "p50_ms": percentile(samples.tpot_ms, 50),
            "sync_p99_ms": percentile(samples.sync_ms, 99),
        }
        found.append({"run": run, "name": name_of(run), "tokens": len(samples.tpot_ms), "ratio": ratio, **late, **times})
    return found


def table(content: dict) -> Table:
    settings = content["settings"]
    title = (
        f"Time against quality: {settings['model']}, {settings['ranks']} ranks, {settings['pace_ms']:g} ms per sync and device"
    )
    columns = [
        "what",
        "tokens",
        "TPOT mean",
        "p50",
        "sync p99",
        "against clean",
        "perplexity",
        "same top-1",
        "deferred",
        "inexact",
    ]
    drawn = Table(title, columns)
    found = points(content)
    clean = {wire_of(p["run"]["mode"]): p["mean_ms"] for p in found if p["run"]["mode"] in CLEAN and p["run"]["loss"] == 0}
    loss = None
    for point in sorted(found, key=lambda point: point["run"]["loss"] or -1):
        run, ratio = point["run"], point["ratio"]
        if run["loss"] != loss:
            loss = run["loss"]
            drawn.ruled.add(len(drawn.rows))
        base = None if run["mode"] == "reference" else clean.get(run["report"]["sync"]["wire"])
        drawn.rows.append([
            point["name"], str(point["tokens"]), number(point["mean_ms"]), number(point["p50_ms"]), number(point["sync_p99_ms"]),
            f"x {point['mean_ms'] / base:.2f}" if base else "-", f"{ratio[0] - 1:+.2%}" if ratio else "-",
            f"{ratio[1]:.1%}" if ratio else "-", f"{point['deferred']:.1%}", f"{point['inexact']:.1%}",
        ])  # fmt: skip
    drawn.notes += [
        "against clean: mean time per token over that of strict, sent twice, with the same wire format at 0 %.",
        "perplexity, same top-1: against one rank alone, f32, on the same tokens. Exact modes: their wire format's, at any loss.",
        *failures(content, name_of),
    ]
    return drawn


def plot(content: dict, path: Path) -> None:
    """Perplexity against time per token, a panel per loss rate; relaxed settings joined in the order of time."""
    found = [point for point in points(content) if point["run"]["loss"] and point["ratio"]]
    losses = sorted({point["run"]["loss"] for point in found})
    if not losses:
        return
    times = [point["mean_ms"] for point in found]
    limits = 0.9 * min(times), 1.1 * max(times)
    ticks = [tick for tick in TICKS_MS if limits[0] <= tick <= limits[1]]
    with figure(path, len(losses), 4.4) as panels:
        for panel, loss in zip(panels, losses):
            for index, mode in enumerate((*EXACT, "relaxed", *OTHERS)):
                own = sorted(
                    (p for p in found if p["run"]["loss"] == loss and p["run"]["mode"] == mode), key=lambda p: p["mean_ms"]
                )
                costs = [max(100 * (point["ratio"][0] - 1), 0.01) for point in own]
                style = "o-" if mode == "relaxed" else "s" if mode in EXACT else "^"
                panel.plot([point["mean_ms"] for point in own], costs, style, color=COLORS[index % len(COLORS)], label=mode)
            panel.set(title=f"{loss:g} % of the packets lost", xlabel="ms per token", xscale="log", yscale="log", xlim=limits)
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.set_xticks([], minor=True)
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("perplexity above the exact one, % (0.01: none)")
        panels[0].legend(fontsize="small")


@click.command(help=__doc__)
@model_options
@click.option("--losses", type=Numbers(float, 0, 99), default="0,1,2,5,10", show_default=True, help="Per cent of the packets.")
@click.option("--ranks", type=click.IntRange(2, 64), default=4, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=300, show_default=True, help="Tokens of text in a relaxed run.")
@click.option("--long-loss", type=float, default=5.0, show_default=True, help="The loss whose relaxed runs are long.")
@click.option("--long-tokens", type=click.IntRange(2), default=2050, show_default=True, help="Their tokens.")
@click.option("--context", type=click.IntRange(2), default=512, show_default=True, help="Tokens per window.")
@click.option("--seconds", type=click.FloatRange(0.1), default=8.0, show_default=True, help="Time box of a strict run.")
@shared_options("pace", "minutes", "seed", "json", "plot", minutes=60)
def main(model, losses, ranks, tokens, long_loss, long_tokens, context, seconds, pace_ms, minutes, seed, out, png) -> int:
    require_matplotlib(png)
    require_lab()
    config = config_of(model)
    context = min(context, config.context)
    settings = {"model": config.name, "losses": losses, "ranks": ranks, "tokens": tokens, "long_loss": long_loss,
                "long_tokens": long_tokens, "context": context, "pace_ms": pace_ms, "seconds": seconds}  # fmt: skip
    results = Results("tradeoff", out, seed, **settings)
    with tempfile.TemporaryDirectory(prefix="halo-bench-") as name:
        text = Path(name) / "text"
        text.write_text(language_reference())
        measure(
            cells(losses, ranks, tokens, long_loss, long_tokens),
            lambda cell: run_cell(cell, model, text, context, pace_ms, seconds, seed),
            line_of,
            lambda cell: 10 + 0.2 * cell["tokens"] + 2 * seconds * (cell["tokens"] == 0),
            minutes,
            results,
        )
    return conclude(results, table, plot, png)


if __name__ == "__main__":
    run_benchmark(main)
