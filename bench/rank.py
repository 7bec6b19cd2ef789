"""One rank, one thread: python -m bench.rank [--gguf FILE --peer-python PATH] [--dtypes ...] [--kernels ...] [--json FILE]

Time per token and time to the first one, of the real program, against what the memory can give: MBU (model bandwidth utilization) is
the bytes that a token needs (weights as stored, K and V as f16) per time and read bandwidth. With --peer-python, an interpreter that
has llama-cpp-python, llama.cpp runs on the same GGUF, the same token ids and one thread too, in turns with us, with flash
attention and without; the better of the two counts in each case.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import h5py
import numpy as np

from bench.bandwidth import measured_gbps
from bench.cells import GENERATE, run_locally
from bench.modes import Names
from bench.opponent import Opponent
from bench.rank_cases import CASES, SPARE, WARM_UP, Texts
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import failures, measure
from bench.shapes import config_of, meta_of, model_options
from bench.stats import pairwise
from bench.tables import Table, number
from bench.ticks import parts_of, read_ticks, shown_parts
from halo_mpi.convert import write_model
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.choice import KERNELS
from halo_mpi.model.tokenizer import Tokenizer, TokenizerFiles
from halo_mpi.sources import open_source
from halo_mpi.store.encoding import DTYPES

F16 = 2  # bytes
PROFILED_TOKENS = 300


def stored_bytes(model: Path) -> int:
    """What a token reads of a model's files: all records of the layers and of the head, once, though shards share KV heads."""
    records: dict[tuple[str, int], int] = {}
    for path in model.iterdir():
        with h5py.File(path, "r", locking=False) as file:
            for table in {"query", "kv", "ffn", "head" if "head" in file else "embedding"} & file.keys():
                layers, _, size = file[table]["records"].shape
                records |= {(table, int(entry)): layers * size for entry in file[table]["index"]}
    return sum(records.values())


def cached_bytes(config: ModelConfig, position: float) -> float:
    return 2 * F16 * config.layers * config.kv_heads * config.head_dim * position


def mbu(nbytes: float, token_ms: float, gbps: float) -> float:
    return nbytes / (token_ms / 1e3) / (gbps * 1e9)


def program_of(model: Path, kernel: str) -> list:
    kernels = [] if kernel == "auto" else ["--kernel", kernel]
    return [*GENERATE, "--model", model, "--threads", 1, "--ignore-eos", "--load-first", "--samples", *kernels]


def run_ours(model: Path, kernel: str, texts: Texts, timeout_s: float) -> dict:
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out.jsonl"
        made = run_locally(1, [*program_of(model, kernel), "--prompts", texts.file, "--out", out], timeout_s)
        report = made.pop("report")
        if made["status"] != "ok":
            return made
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    device = report["devices"][0]
    facts = {"git": report["git"], "kernel_used": report["kernel"], "weights_bytes": device["weights_bytes"]}
    facts |= {"rss_bytes": device["rss_bytes"], "load_s": report["load_s"]}
    return made | facts | {"cases": cases_of(lines, report["samples"]["tpot_ms"])}


def cases_of(lines: list[dict], tpot_ms: list[float]) -> dict:
    """By text, from the result file of generate and the times of all its tokens, which follow one another."""
    found, at = {}, 0
    for line in lines:
        times = max(0, len(line["token_ids"]) - 1)
        found[line["id"]] = {"ttft_ms": line["ttft_ms"], "tpot_ms": tpot_ms[at : at + times], "token_ids": line["token_ids"]}
        at += times
    return {name: case for name, case in found.items() if name != WARM_UP}


def run_profiled(model: Path, kernel: str, timeout_s: float) -> dict:
    """One long text under the ticks of bench.ticks: the share of each part in a token, and the places that take most."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "ticks.json"
        program = [*program_of(model, kernel), "--prompt", "The", "--max-tokens", PROFILED_TOKENS]
        made = run_locally(1, program, timeout_s, ticks=file)
        report = made.pop("report")
        if made["status"] != "ok":
            return made
        (taken,) = read_ticks(file, 1, report["generated_tokens"] - 1)
    places = {place: round(ms, 4) for place, ms in list(taken.items())[:25]}
    return made | {
        "kernel_used": report["kernel"],
        "tpot_ms": report["tpot_ms"],
        "parts_ms": parts_of(taken),
        "places_ms": places,
    }


def name_of(cell: dict) -> str:
    if cell["who"] == "ours":
        return f"{cell['dtype']}, kernel {cell['kernel']}" + (", profiled" if cell.get("profiled") else "")
    return {"memory": "read bandwidth", "peer": f"llama.cpp, flash attention {'on' if cell.get('flash') else 'off'}"}[cell["who"]]


def line_of(run: dict) -> str:
    times = ", ".join(f"{name} {number(CASES[name].value(run, name))} ms" for name in run.get("cases") or {})
    return f"{name_of(run)}: {times or number(run.get('gbps'))}"


def table(content: dict) -> Table:
    settings, runs = content["settings"], [run for run in content["runs"] if run["status"] == "ok"]
    columns = ["case", "who", "runs", "prompt", "ms", "least .. most", "fastest token", "MB per token", "MBU", "time / llama.cpp"]
    drawn = Table(f"One rank, one thread: {settings['model']}", columns, texts=2)
    gbps = [run["gbps"] for run in runs if run["who"] == "memory"]
    for name in settings["cases"]:
        drawn.ruled.add(len(drawn.rows))
        rows = {name_of(run): [] for run in runs if run["who"] != "memory" and not run.get("profiled")}
        for run in runs:
            if CASES[name].value(run, name) is not None:
                rows[name_of(run)].append(run)
        best = best_peer([found for found in rows.values() if found and found[0]["who"] == "peer"], name)
        drawn.rows += [_row(name, who, found, best, gbps, settings) for who, found in rows.items() if found]
    drawn.notes.append("ms: time to the first token where the case is a prefill, else median time per token; median of the runs.")
    if gbps:
        drawn.notes.append(f"Read bandwidth of one thread: {np.median(gbps):.1f} GB/s ({min(gbps):.1f} .. {max(gbps):.1f}).")
    loads = [run["load_average"] for run in runs]
    if loads:
        drawn.notes.append(f"Load average before the runs: {min(loads):.1f} .. {max(loads):.1f}.")
    for run in runs:
        if run.get("profiled"):
            ms = run["tpot_ms"]["p50"]
            drawn.notes.append(
                f"{name_of(run)} ({run['kernel_used']}), {number(ms)} ms per token: {shown_parts(run['parts_ms'])}"
            )
    if settings["peer"]:
        drawn.notes.append(f"llama.cpp as in llama-cpp-python {settings['peer']['version']}: {settings['peer']['system']}")
    drawn.notes += failures(content, name_of)
    return drawn


def best_peer(found: list[list[dict]], name: str) -> list[dict]:
    """The runs of the setting with the least median; none without a peer."""
    return min(found, key=lambda runs: np.median([CASES[name].value(run, name) for run in runs]), default=[])


def _row(name: str, who: str, runs: list[dict], best: list[dict], gbps: list[float], settings: dict) -> list[str]:
    case, prompt = CASES[name], settings["prompt_tokens"][name]
    values = [case.value(run, name) for run in runs]
    ms, nbytes = float(np.median(values)), None
    if not case.prefill:
        needed = settings["needed_bytes"]
        nbytes = needed["peer" if runs[0]["who"] == "peer" else runs[0]["dtype"]] + needed["position"] * (
            prompt + case.tokens / 2
        )
    ratio = pairwise(runs, best, lambda run: case.value(run, name)) if best and runs[0]["who"] == "ours" else None
    used = f" ({runs[0]['kernel_used']})" if runs[0].get("kernel") == "auto" else ""
    fastest = None if case.prefill else min(min(run["cases"][name]["tpot_ms"]) for run in runs)
    cells = [
        name,
        who + used,
        str(len(runs)),
        str(prompt),
        number(ms),
        f"{number(min(values))} .. {number(max(values))}",
        number(fastest),
    ]
    cells += [number(nbytes / 1e6), f"{mbu(nbytes, ms, float(np.median(gbps))):.0%}" if gbps else "-"] if nbytes else ["-", "-"]
    return [*cells, str(ratio) if ratio else "best" if runs is best else "-"]


@click.command(help=__doc__)
@model_options
@click.option(
    "--gguf",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What MODEL was made of, for the peer and --dtypes.",
)
@click.option("--dtypes", type=Names(DTYPES), help="Convert --gguf to these, instead of --model.")
@click.option("--kernels", type=Names(KERNELS), default="auto", show_default=True)
@click.option(
    "--cases",
    type=Names([name for name in CASES if name != WARM_UP]),
    default="decode,prefill-512,decode-2000",
    show_default=True,
)
@click.option("--peer-python", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Has llama-cpp-python.")
@click.option(
    "--profile/--no-profile", default=True, show_default=True, help="Also where a token's time goes, in one run more each."
)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--timeout-s", type=click.FloatRange(1), default=300.0, show_default=True, help="Of a run.")
@shared_options("minutes", "seed", "json")
def main(model, gguf, dtypes, kernels, cases, peer_python, profile, repeats, timeout_s, minutes, seed, out) -> int:
    if (dtypes or peer_python) and not gguf:
        raise click.UsageError("--dtypes and --peer-python need --gguf")
    with tempfile.TemporaryDirectory(prefix="halo-rank-") as name:
        folder, meta = Path(name), meta_of(model)
        models, config = {meta["dtype"]: model}, config_of(model)
        if dtypes:
            models = {dtype: converted(gguf, folder, dtype) for dtype in dtypes}
        texts = Texts(Tokenizer(TokenizerFiles.from_dict(meta["tokenizer"])), cases, folder)
        with Opponent(peer_python, gguf, texts.longest + SPARE) as peer:
            needed = {dtype: stored_bytes(path) for dtype, path in models.items()} | {"position": cached_bytes(config, 1)}
            settings = {"model": config.name, "cases": cases, "repeats": repeats, "peer": peer.facts,
                        "needed_bytes": needed | ({"peer": peer.facts["weights_bytes"]} if peer.facts else {}),
                        "prompt_tokens": {name: len(texts.ids[name]) for name in cases}}  # fmt: skip
            results = Results("rank", out, seed, **settings)
            cells = [{"who": "ours", "dtype": dtype, "kernel": kernel} for dtype in models for kernel in kernels]
            others = [{"who": "peer", "flash": flash} for flash in (False, True)] if peer.facts else []
            groups = [[{**cell, "repeat": r} for cell in [{"who": "memory"}, *cells, *others]] for r in range(repeats)]
            groups += [[{**cell, "repeat": 0, "profiled": True} for cell in cells]] if profile else []

            def run(cell: dict) -> dict:
                before = {"load_average": round(os.getloadavg()[0], 2)}
                if cell["who"] == "ours" and cell.get("profiled"):
                    return before | run_profiled(models[cell["dtype"]], cell["kernel"], timeout_s)
                if cell["who"] == "ours":
                    return before | run_ours(models[cell["dtype"]], cell["kernel"], texts, timeout_s)
                return before | timed(
                    lambda: peer.run(texts, cell["flash"]) if cell["who"] == "peer" else {"gbps": measured_gbps()}
                )

            measure(groups, run, line_of, lambda cell: 30.0, minutes, results)
    table(results.content).print()
    return 0 if any(run["status"] == "ok" for run in results.runs) else 1


def timed(work: Callable[[], dict]) -> dict:
    begin = time.monotonic()
    made = work()
    return {"status": "ok", "error": None, "wall_s": round(time.monotonic() - begin, 2), **made}


def converted(gguf: Path, folder: Path, dtype: str) -> Path:
    path = folder / f"{dtype}.halo"
    with open_source(gguf) as source:
        write_model(source, path, dtype, 1)
    return path


if __name__ == "__main__":
    run_benchmark(main)
