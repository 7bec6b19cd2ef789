"""Time per output token, mode x loss x ranks: python -m bench.tpot [--json FILE] [--plot FILE.png]

Every run is the real program under mpirun in a lab whose devices take at least --pace-ms for an even share of a sync. Modes
alternate (A B A B ...) within each number of ranks and loss, and are compared pairwise, within a repeat.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from bench.cells import generation, require_lab, run_in_lab
from halo_mpi.figures import figure, require_matplotlib
from bench.modes import MODES, Names, Numbers
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import conclude, failures, measure
from bench.shapes import config_of, model_options
from bench.stats import identities, p99_name, pairwise, percentile, pooled, token_ms
from bench.tables import Table, number

MAIN_TABLE = ("strict", "strict-tuned", "allreduce", "one", "one-unpaced")  # 23 minutes with the default options, quiet machine
SPARE_TOKENS = 8  # of the context, for the prompt
PATIENCE_S = 30.0  # beyond the box, for the token that is under way
LOADED_PER_S = 2e7  # parameters, at least: the TinyLlama shape is loaded in 25 s by 4 ranks on 2 busy cores
START_S = (2.0, 1.0)  # to start, load and end: 4 s on 4 ranks, 8 s on 8, on 2 quiet cores; and so much per rank


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. A group is what alternates: the modes of one number of ranks and one loss, in one repeat."""

    modes: tuple[str, ...]
    losses: tuple[float, ...]
    ranks: tuple[int, ...]
    repeats: int

    def groups(self) -> Iterator[list[dict]]:
        """One repeat of everything after the other, so that too little time costs repeats and not cells.

        What runs alone knows no loss: it is in the group of the first loss only.
        """
        for repeat in range(self.repeats):
            for ranks in self.ranks:
                for loss in self.losses:
                    cells = [{"mode": mode, "ranks": ranks, "loss": loss, "repeat": repeat} for mode in self.modes]
                    yield [{**c, "loss": None} if MODES[c["mode"]].alone else c for c in cells if self._wanted(c)]

    def _wanted(self, cell: dict) -> bool:
        mode = MODES[cell["mode"]]
        first_ranks = mode.paced or cell["ranks"] == self.ranks[0]
        return not mode.alone or (cell["loss"] == self.losses[0] and first_ranks)


@dataclass(frozen=True, slots=True)
class Box:
    """How each cell is run."""

    model: Path
    seconds: float
    pace_ms: float
    max_tokens: int
    seed: int

    def run(self, cell: dict) -> dict:
        mode, hosts = MODES[cell["mode"]], 1 if MODES[cell["mode"]].alone else cell["ranks"]
        pace_ms = self.pace_ms * cell["ranks"] / hosts if mode.paced else 0.0
        scenario = {"hosts": hosts, "loss": (cell["loss"] or 0.0) / 100, "pace_ms": pace_ms, **mode.scenario}
        config = config_of(self.model)
        if mode.program == "bench.allreduce":
            program = [mode.program, "--hidden", config.hidden, "--syncs", 2 * config.layers]
            program += ["--seconds", self.seconds, "--patience", PATIENCE_S]
        else:
            program = generation(self.model, mode.options, self.seconds, self.max_tokens)
        timeout_s = 2 * self.seconds + 2 * PATIENCE_S + 3 * cell["ranks"] + config.parameters / LOADED_PER_S
        return {"pace_ms": pace_ms, **run_in_lab(scenario, program, timeout_s, self.seed + cell["repeat"])}


def expected_s(cell: dict, seconds: float) -> float:
    hosts = 1 if MODES[cell["mode"]].alone else cell["ranks"]
    return START_S[0] + START_S[1] * hosts + 1.5 * seconds


def name_of(cell: dict) -> str:
    loss = "" if cell["loss"] is None else f", loss {cell['loss']:g} %"
    return f"{cell['ranks']} ranks{loss}, {cell['mode']}, repeat {cell['repeat'] + 1}"


def line_of(run: dict) -> str:
    return f"{name_of(run)}: {number(token_ms(run))} ms per token"


def sections(runs: list[dict]) -> dict[tuple, dict[str, list[dict]]]:
    """Runs by (ranks, loss), then by mode, in the order of the table; loss None: alone."""
    found: dict[tuple, dict[str, list[dict]]] = {}
    for run in sorted(runs, key=lambda run: (run["ranks"], run["loss"] is None, run["loss"] or 0)):
        found.setdefault((run["ranks"], run["loss"]), {}).setdefault(run["mode"], []).append(run)
    return found


def table(content: dict) -> Table:
    settings, parts = content["settings"], sections(content["runs"])
    first = settings["modes"][0]
    columns = [
        "ranks",
        "loss",
        "mode",
        "runs",
        "tokens",
        "TPOT p50",
        "TPOT p99",
        "mean",
        "sync p50",
        "sync p99",
        "2L x mean sync",
    ]
    title = f"Time per output token in ms: {settings['model']}, {settings['pace_ms']:g} ms per sync and device"
    drawn = Table(title, [*columns, f"time / {first}"], texts=3)
    for (ranks, loss), by_mode in parts.items():
        drawn.ruled.add(len(drawn.rows))
        others = by_mode.get(first) or next((part.get(first, []) for (r, _), part in parts.items() if r == ranks), [])
        for mode, own in by_mode.items():
            drawn.rows.append(_row(ranks, loss, mode, own, others, first))
    drawn.notes += [f"{name}: {MODES[name].description}" for name in settings["modes"] if name in MODES]
    drawn.notes += _notes(content)
    return drawn


def _row(ranks: int, loss: float | None, mode: str, own: list[dict], others: list[dict], first: str) -> list[str]:
    ended = [run["status"] for run in own if run["status"] != "ok"]
    samples = pooled(own)
    runs = f"{len(own)}" + "".join(f", {ended.count(status)} {status}" for status in sorted(set(ended)))
    cells = [str(ranks), "alone" if loss is None else f"{loss:g} %", mode, runs]
    if samples is None:
        return cells + ["0"] + ["-"] * 7
    tpot, sync = samples.tpot_ms, samples.sync_ms
    ratio = None if mode == first else pairwise(own, others, token_ms)
    return cells + [
        f"{len(tpot)}" + ("" if samples.warm else " *"),
        number(percentile(tpot, 50)),
        f"{number(percentile(tpot, 99))} ({p99_name(len(tpot))})" if tpot else "-",
        number(sum(tpot) / len(tpot)) if tpot else "-",
        number(percentile(sync, 50)),
        f"{number(percentile(sync, 99))} ({p99_name(len(sync))})" if sync else "-",
        f"~{number(samples.estimate_ms)}",
        str(ratio) if ratio else "-",
    ]


def _notes(content: dict) -> list[str]:
    runs = content["runs"]
    notes = [
        "p99 of fewer than 100 samples is their maximum, and says so. ~ is an estimate from the syncs, without head and sampling.",
        f"time / {content['settings']['modes'][0]}: mean time per token, pairwise within a repeat, median (least .. most); "
        "of what runs alone, against the least loss.",
    ]
    if any((samples := pooled([run])) and not samples.warm for run in runs):
        notes.append("* a run had no token beyond the warm-up, which therefore counts")
    notes += failures(content, name_of)
    return notes + [f"token ids, strict or nothing late: {identity}" for identity in identities(runs)]


def plot(content: dict, path: Path) -> None:
    """TPOT against loss, a panel per number of ranks; p50 thick, p99 thin, one device alone dotted."""
    parts, settings = sections(content["runs"]), content["settings"]
    ranks_shown = sorted({ranks for ranks, loss in parts if loss is not None})
    if not ranks_shown:
        return
    with figure(path, len(ranks_shown)) as panels:
        for panel, ranks in zip(panels, ranks_shown):
            colors = {}
            for mode in settings["modes"]:
                points = [(loss, pooled(by_mode[mode])) for (r, loss), by_mode in parts.items() if r == ranks and mode in by_mode]
                points = [(loss, samples.tpot_ms) for loss, samples in points if samples and samples.tpot_ms]
                color = colors.setdefault(mode, f"C{len(colors)}")
                if points and points[0][0] is None:
                    panel.axhline(percentile(points[0][1], 50), color=color, linestyle=":", label=mode)
                elif points:
                    losses = [loss for loss, _ in points]
                    panel.plot(losses, [percentile(ms, 50) for _, ms in points], "o-", color=color, linewidth=2, label=mode)
                    panel.plot(losses, [percentile(ms, 99) for _, ms in points], "-", color=color, linewidth=0.7)
            panel.set(title=f"{ranks} ranks", xlabel="packets lost, %", ylabel="ms per token (thin: p99)", yscale="log")
            panel.grid(alpha=0.3)
        panels[0].legend(fontsize="small")


@click.command(help=__doc__)
@model_options
@click.option("--modes", type=Names(MODES), default=",".join(MAIN_TABLE), show_default=True, help=f"Of {', '.join(MODES)}.")
@click.option("--losses", type=Numbers(float, 0, 99), default="0,1,2,5,10", show_default=True, help="Per cent of the packets.")
@click.option("--ranks", type=Numbers(int, 2, 64), default="4,8", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Time box of a run, after its first token."
)
@click.option("--max-tokens", type=click.IntRange(3), default=400, show_default=True, help="Most tokens of a run.")
@shared_options("pace", "minutes", "seed", "json", "plot")
def main(model, modes, losses, ranks, repeats, seconds, pace_ms, max_tokens, minutes, seed, out, png) -> int:
    require_matplotlib(png)
    require_lab()
    config = config_of(model)
    max_tokens = min(max_tokens, config.context - SPARE_TOKENS)
    settings = {"model": config.name, "layers": config.layers, "modes": modes, "losses": losses, "ranks": ranks, "repeats": repeats,
                "seconds": seconds, "pace_ms": pace_ms, "max_tokens": max_tokens, "minutes": minutes}  # fmt: skip
    results = Results("tpot", out, seed, **settings)
    box = Box(model, seconds, pace_ms, max_tokens, seed)
    groups = Plan(modes, losses, ranks, repeats).groups()
    measure(groups, box.run, line_of, lambda cell: expected_s(cell, seconds), minutes, results)
    code = conclude(results, table, plot, png)
    return code if all(identity.same for identity in identities(results.runs)) else 1


if __name__ == "__main__":
    run_benchmark(main)
