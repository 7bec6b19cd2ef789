"""How long a start takes, phase by phase, and how fast layers are loaded: python -m bench.load [--json FILE] [--plot FILE.png]

From the start of mpirun to the first token, on 1, 2 and 4 ranks of this machine, for weights stored as f32 and as int4, with
the model's files in the page cache (warm) and not (cold: only these files are dropped, which needs no root), and on ranks that play
devices (`--pace-ms`) with disks of their own (`--read-mbps`); loading goes on while the prompt is computed (meanwhile, as the program does
it) or comes first. Then all layers are loaded while nothing computes: each record a chunk of an HDF5 file, its checksum checked; one by
one, and (ahead, as the program does it) with what comes next asked of the kernel before. How far the kernel reads ahead by itself is told.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import click
import numpy as np

from bench.cells import EVEN, run_locally
from halo_mpi.figures import figure, require_matplotlib
from bench.modes import Names, Numbers
from bench.pagecache import drop, resident, warm
from bench.results import ROOT, Results, run_benchmark, shared_options
from bench.rounds import conclude, failures, measure
from bench.shapes import config_of
from bench.tables import Table, number
from halo_mpi.convert import write_model
from halo_mpi.engine.loader import Loader
from halo_mpi.engine.replacer import ROW
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.choice import make_kernel
from halo_mpi.model.kernels.kernel import Kernel
from halo_mpi.model.layer_weights import LayerWeights
from halo_mpi.model.loading import Part, down_dtype, share_parts
from halo_mpi.model.sizes import shape_bytes
from halo_mpi.schedule.residence import reside
from halo_mpi.sources import open_source
from halo_mpi.store.encoding import DTYPES
from halo_mpi.store.reader import ModelStore

SOURCE = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PHASES = ("python", "MPI", "import", "open", "load", "first token")
CACHES = ("warm", "cold")
ASKED = ("one by one", "ahead")
LOADING = {"meanwhile": [], "first": ["--load-first"]}
COLD_ENOUGH = 0.02  # of the pages still in memory; above it the file system cannot be made cold, and the run says so
TIMEOUT_S = 120.0


def source_options(command: Callable) -> Callable:
    """--source and --dtypes, for `stored_as`."""
    source = click.option("--source", type=click.Path(path_type=Path), default=SOURCE,
                          help="GGUF file or folder to convert. [default: the demo model's]")  # fmt: skip
    dtypes = click.option("--dtypes", type=Names(DTYPES), default="f32,int4", show_default=True)
    return source(dtypes(command))


@contextmanager
def stored_as(source: Path, dtypes: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Path]]]:
    """The model's name, and its folders by dtype, beside the source; they are gone afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="halo-bench-", dir=source.parent if source.exists() else None) as name,
        open_source(source) as opened,
    ):
        models = {dtype: Path(name) / f"{dtype}.halo" for dtype in dtypes}
        for dtype, model in models.items():
            write_model(opened, model, dtype, 4)
        yield opened.config.name, models


def prepare(model: Path, cache: str) -> float:
    """Bring the page cache into the state asked for; the share of the model that is in it."""
    (warm if cache == "warm" else drop)(model)
    return round(resident(model), 4)


def device_of(cell: dict) -> dict | None:
    """What ranks play, as halo_mpi/engine/marks.py reads it."""
    if not cell["read_mbps"]:
        return None
    return {"pace_ms": cell["pace_ms"], "slowdown": 1.0, "row_share": ROW, "read_mbps": cell["read_mbps"]}


def run_start(cell: dict, model: Path) -> dict:
    share = prepare(model, cell["cache"])
    program = ["bench.first_token", "--prompt-tokens", cell["prompt"], *EVEN, *LOADING[cell["loading"]], "--model", model]
    run = run_locally(cell["ranks"], program, TIMEOUT_S, device=device_of(cell))
    run["resident"] = share
    if run["status"] == "ok":
        ends = [run["began"], *(run["report"]["ends_s"][phase] for phase in PHASES)]
        run["phases_s"] = {phase: round(end - begin, 4) for phase, begin, end in zip(PHASES, ends, ends[1:])}
        if cell["cache"] == "cold" and share > COLD_ENOUGH:
            run |= {"status": "failed", "error": f"{share:.0%} of the model cannot be dropped from the page cache here"}
    return run


def all_layers(store: ModelStore, config: ModelConfig) -> tuple[Kernel, list[LayerWeights], list[Part]]:
    """A kernel of one thread, all heads and groups of the model without room yet, and what they are read in."""
    kernel = make_kernel("auto", config, store.meta["dtype"], 1, down_dtype=down_dtype(store))
    everything = ([list(range(count))] * config.layers for count in (config.heads, config.groups))
    return kernel, *share_parts(store, kernel, *everything)


def run_reading(cell: dict, model: Path) -> dict:
    """How long the loader takes for all layers, and how many bytes it reads."""
    share, began, sizes = prepare(model, cell["cache"]), time.perf_counter(), []
    store, config = ModelStore(model, lambda begin, size: sizes.append(size)), config_of(model)
    parts = all_layers(store, config)[2]
    if cell["asked"] == "one by one":
        parts = [replace(part, expect=lambda: None) for part in parts]
    loader = Loader(parts, reside([shape_bytes(part.shapes) for part in parts], None))
    loader.load()
    loader.close()
    store.close()
    cold = cell["cache"] == "warm" or share <= COLD_ENOUGH
    error = None if cold else f"{share:.0%} of the model cannot be dropped from the page cache here"
    return {
        "status": "ok" if cold else "failed",
        "error": error,
        "wall_s": time.perf_counter() - began,
        "read_bytes": sum(sizes),
        "read_s": loader.read_s,
        "resident": share,
    }


def speed_mb_s(run: dict) -> float:
    return run["read_bytes"] / run["read_s"] / 1e6


def starts(content: dict) -> dict[tuple, list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for run in content["runs"]:
        if run["what"] == "start":
            found.setdefault((run["dtype"], disk_of(run), run["prompt"], run["ranks"], run["loading"]), []).append(run)
    return found


def readahead_kb(path: Path) -> int | None:
    """What the kernel reads ahead by itself on this file's disk; None if it does not tell."""
    number = path.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    for disk in (device, device.parent):  # of a partition
        with suppress(OSError, ValueError):
            return int((disk / "queue" / "read_ahead_kb").read_text())
    return None


def disk_of(cell: dict) -> str:
    """Where weights come from."""
    return f"{cell['read_mbps']:g} MB/s, device" if cell.get("read_mbps") else cell["cache"]


def medians(runs: list[dict]) -> dict[str, float]:
    """Of each phase in seconds, and of the whole; empty if no run ended well."""
    ended = [run["phases_s"] for run in runs if run["status"] == "ok"]
    if not ended:
        return {}
    total = {"all": float(np.median([sum(phases.values()) for phases in ended]))}
    return {phase: float(np.median([phases[phase] for phases in ended])) for phase in PHASES} | total


def table(content: dict) -> Table:
    columns = ["dtype", "disk", "loading", "prompt", "ranks", "runs", *(f"{phase} s" for phase in PHASES), "all s", "least .. most"]
    drawn = Table("From mpirun to the first token, medians of the phases (rank 0)", columns, texts=3)
    for (dtype, disk, prompt, ranks, loading), runs in starts(content).items():
        typical = medians(runs)
        totals = [sum(run["phases_s"].values()) for run in runs if run["status"] == "ok"]
        spread = f"{min(totals):.2f} .. {max(totals):.2f}" if totals else "-"
        times = [number(typical.get(phase), 2) for phase in (*PHASES, "all")]
        drawn.rows.append([dtype, disk, loading, str(prompt), str(ranks), str(len(runs)), *times, spread])
    drawn.notes.append(
        "python: mpirun starts the ranks; MPI: MPI_Init; open: compare digests, tokenizer; load: plan, read and decode the "
        "vocabulary and, with loading first, the share, which else is read until the first token"
    )
    ahead_kb = content["settings"]["readahead_kb"]
    drawn.notes.append(f"the kernel's readahead here: {'unknown' if ahead_kb is None else f'{ahead_kb} KB'}")
    read: dict[tuple, list[dict]] = {}
    for run in content["runs"]:
        if run["what"] == "reading" and run["status"] == "ok":
            read.setdefault((run["dtype"], run["cache"], run["asked"]), []).append(run)
    for (dtype, cache, asked), runs in read.items():
        speeds = [speed_mb_s(run) for run in runs]
        drawn.notes.append(
            f"loading all layers, {dtype}, {cache}, {asked}: {runs[0]['read_bytes'] / 1e6:.0f} MB at {np.median(speeds):.0f} MB/s "
            f"({min(speeds):.0f} .. {max(speeds):.0f})"
        )
    drawn.notes += failures(content, name_of)
    return drawn


def plot(content: dict, path: Path) -> None:
    """A bar per start, a colour per phase."""
    found = {key: medians(runs) for key, runs in starts(content).items()}
    found = {key: phases for key, phases in found.items() if phases}
    if not found:
        return
    with figure(path, 1, 7.0) as (panel,):
        names = [", ".join(map(str, key)) for key in found]
        left = np.zeros(len(found))
        for phase in PHASES:
            widths = np.array([phases[phase] for phases in found.values()])
            panel.barh(names, widths, left=left, label=phase)
            left += widths
        panel.invert_yaxis()
        panel.set(xlabel="seconds", ylabel="dtype, disk, prompt, ranks, loading")
        panel.legend(fontsize="small")


def name_of(cell: dict) -> str:
    start = cell["what"] == "start"
    how = f"{cell['prompt']} tokens, {cell['ranks']} ranks, loading {cell['loading']}" if start else cell["asked"]
    return f"{cell['what']} {cell['dtype']}, {disk_of(cell)}, {how}, repeat {cell['repeat'] + 1}"


def line_of(run: dict) -> str:
    return f"{name_of(run)}: " + (
        f"{speed_mb_s(run):.0f} MB/s" if "read_bytes" in run else f"{sum(run.get('phases_s', {}).values()):.2f} s"
    )


@click.command(help=__doc__)
@source_options
@click.option("--ranks", type=Numbers(int, 1, 64), default="1,2,4", show_default=True)
@click.option("--read-mbps", type=Numbers(float, 1, 1e5), default="90", show_default=True, help="Disks of devices.")
@click.option("--prompt-tokens", type=Numbers(int, 1, 4000), default="4", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@shared_options("pace", "minutes", "json", "plot", minutes=15)
def main(source, dtypes, ranks, read_mbps, prompt_tokens, repeats, pace_ms, minutes, out, png) -> int:
    require_matplotlib(png)
    with stored_as(source, dtypes) as (shape, models):
        settings = {"ranks": ranks, "dtypes": dtypes, "read_mbps": read_mbps, "prompt_tokens": prompt_tokens, "repeats": repeats}
        results = Results("load", out, 0, model=shape, pace_ms=pace_ms, readahead_kb=readahead_kb(source), **settings)
        disks = [*((cache, None) for cache in CACHES), *(("cold", mbps) for mbps in read_mbps)]
        groups = []
        for repeat in range(repeats):
            kinds = [{"dtype": dtype, "cache": cache, "repeat": repeat} for dtype in dtypes for cache in CACHES]
            groups.append([{"what": "reading", **kind, "asked": asked} for kind in kinds for asked in ASKED])
            groups += [
                [{"what": "start", "dtype": dtype, "cache": cache, "read_mbps": mbps, "pace_ms": pace_ms, "repeat": repeat,
                  "prompt": prompt, "ranks": n, "loading": loading} for loading in LOADING]
                for dtype, (cache, mbps), prompt, n in product(dtypes, disks, prompt_tokens, ranks)
            ]  # fmt: skip

        def run(cell: dict) -> dict:
            return (run_start if cell["what"] == "start" else run_reading)(cell, models[cell["dtype"]])

        measure(groups, run, line_of, lambda cell: 4 + cell.get("ranks", 0), minutes, results)
    return conclude(results, table, plot, png)


if __name__ == "__main__":
    run_benchmark(main)
