"""All results as one page: python -m bench.report [RESULTS.json ...] --out DIR

Writes DIR/report.md with a section per file, its table and its figure. Without names: all of bench/results.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from bench import boards, budget, estimates, exactness, fault_schedules, faults, load, moving, overhead, placement, published, quality
from bench import rank, reader, scaling, scenes, solver, sorting, stress, tpot, tradeoff, unstable, validation
from bench.results import ROOT, run_benchmark
from bench.tables import Table, number
from halo_mpi.figures import figure, require_matplotlib

RESULTS = ROOT / "bench" / "results"
PAGE = "report.md"


@dataclass(frozen=True, slots=True)
class Kind:
    """How a result of one kind is shown. `plot(content, path)` may draw nothing, and then leaves no file."""

    title: str
    table: Callable[[dict], Table]
    plot: Callable[[dict, Path], None] | None = None


def dtypes_table(content: dict) -> Table:
    drawn = Table(
        f"Storage dtypes of {content['source']}, {content['tokens']} tokens", ["form", "MB", "perplexity", "against f32"]
    )
    exact = content["results"]["f32"]["perplexity"]
    for form, found in content["results"].items():
        against = f"{found['perplexity'] / exact - 1:+.3%}"
        drawn.rows.append([form, number(found["bytes"] / 1e6), f"{found['perplexity']:.4f}", against])
    return drawn


def dtypes_plot(content: dict, path: Path) -> None:
    with figure(path, 1, 6.0) as (panel,):
        for form, found in content["results"].items():
            panel.plot(found["bytes"] / 1e6, found["perplexity"], "o", label=form)
        panel.set(xlabel="MB", ylabel="perplexity")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")


def run_table(content: dict) -> Table:
    """Of one report of generate."""
    sync = content["sync"]
    drawn = Table(f"A run of generate: {content['model']['name']}", ["", "value"])
    tpot_ms, sync_ms = content["tpot_ms"], content["sync_ms"]
    drawn.rows += [
        ["ranks, sync, wire", f"{content['ranks']}, {sync['mode']}, {sync['wire']}"],
        ["tokens generated", str(content["generated_tokens"])],
        ["time to first token, ms", number(content["ttft_ms"])],
        ["time per token, ms: p50, p99, max", ", ".join(number(tpot_ms[name]) for name in ("p50", "p99", "max"))],
        ["time per sync, ms: p50, p99, max", ", ".join(number(sync_ms[name]) for name in ("p50", "p99", "max"))],
        ["slowest rank computes, ms per token", number(max(device["compute_ms"] for device in content["devices"]))],
    ]
    return drawn


KINDS = {
    "tpot": Kind("Time per output token", tpot.table, tpot.plot),
    "quality": Kind("Quality under loss", quality.table, quality.plot),
    "tradeoff": Kind("Time against quality", tradeoff.table, tradeoff.plot),
    "scenes": Kind("Scenarios", scenes.table),
    "stress": Kind("Stress", stress.table),
    "unstable": Kind("Bad devices", unstable.table),
    "placement": Kind("Placement", placement.table),
    "solver": Kind("Looking for shares", solver.table),
    "moving": Kind("Moving work", moving.table),
    "faults": Kind("Faults", faults.table),
    "fault_schedules": Kind("Random faults", fault_schedules.table),
    "estimates": Kind("Lost for good: what estimates are worth", estimates.table),
    "sorting": Kind("Sorting by neurons or by blocks", sorting.table),
    "scaling": Kind("Scaling", scaling.table, scaling.plot),
    "validation": Kind("Predicted and measured", validation.table, validation.plot),
    "boards": Kind("More boards, simulated", boards.table, boards.plot),
    "published": Kind("Published and simulated", published.table),
    "rank": Kind("One rank", rank.table),
    "overhead": Kind("What a token costs beside the products", overhead.table),
    "exactness": Kind("Rounding of kernels", exactness.table),
    "load": Kind("Start-up and loading", load.table, load.plot),
    "budget": Kind("Less memory than weights", budget.table),
    "reader": Kind("A thread that reads weights beside the token loop", reader.table),
    "dtypes": Kind("Storage dtypes", dtypes_table, dtypes_plot),
    "run": Kind("A single run", run_table),
}


def kind_of(content: dict) -> Kind | None:
    """Benchmarks say what they are; the older files are known by their fields."""
    if content.get("benchmark") in KINDS:
        return KINDS[content["benchmark"]]
    if {"results", "source", "tokens"} <= content.keys():
        return KINDS["dtypes"]
    if {"tpot_ms", "sync_ms", "devices", "ranks"} <= content.keys():
        return KINDS["run"]
    return None


def read(path: Path) -> dict:
    """Raises ClickException if the file is not a JSON object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise click.ClickException(f"{path}: not a result of a benchmark")
    return content


def origin(content: dict) -> str:
    """Where a result comes from, in a line."""
    machine = content.get("machine")
    if isinstance(machine, dict):
        machine = ", ".join(f"{key} {value}" for key, value in machine.items())
    load = content.get("load_average") or {}
    parts = [f"git {content.get('git')}", str(machine), content.get("date"), content.get("command") and f"`{content['command']}`"]
    if load.get("start") and load.get("end"):
        parts.append(f"load average {load['start'][0]:.1f} at the start, {load['end'][0]:.1f} at the end")
    return "; ".join(part for part in parts if part)


def section(path: Path, content: dict, out: Path) -> str:
    kind = kind_of(content)
    if kind is None:
        return f"## {path.name}\n\nNo result of a benchmark that this page knows.\n"
    lines = [f"## {kind.title} ({path.name})", "", f"From {origin(content)}.", "", kind.table(content).markdown()]
    image = out / f"{path.stem}.png"
    if kind.plot:
        image.unlink(missing_ok=True)
        kind.plot(content, image)
        if image.exists():
            lines += [f"![{kind.title}]({image.name})", ""]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("results", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the page and its figures.")
def main(results: tuple[Path, ...], out: Path) -> None:
    require_matplotlib(out)
    paths = results or tuple(path for path in sorted(RESULTS.glob("*.json")) if not path.name.endswith(".lab.json"))
    if not paths:
        raise click.ClickException(f"there are no results in {RESULTS}")
    contents = [(path, read(path)) for path in paths]
    try:
        out.mkdir(parents=True, exist_ok=True)
        page = "\n".join(["# Results", "", *(section(path, content, out) for path, content in contents)])
        (out / PAGE).write_text(page)
    except OSError as error:
        raise click.ClickException(f"cannot write in {out}: {error.strerror}") from None
    click.echo(f"{out / PAGE}: {len(paths)} results")


if __name__ == "__main__":
    run_benchmark(main)
