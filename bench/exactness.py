"""What a kernel's rounding costs: python -m bench.exactness [--kernels reference,llvm] [--tokens N] [--json FILE]

One rank scores real text (Python's language reference) with `halo_mpi.evaluate`, and continues some prompts greedily, once per kernel.
The first kernel named is what the others are compared with: relative difference in perplexity, of single log-probabilities, the
share of tokens with the same likeliest successor, and how many tokens of each text agree before the two part. Nothing is timed.
"""

import json
import tempfile
from itertools import takewhile
from pathlib import Path

import click
import numpy as np

from bench.cells import EVEN, GENERATE, run_locally
from bench.modes import Names
from bench.quality import language_reference
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import failures, measure
from bench.shapes import config_of, model_options
from bench.tables import Table
from halo_mpi.model.kernels.choice import KERNELS

PROMPTS = (
    "The capital of France is",
    "A Raspberry Pi is a small computer that",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at 100 degrees because",
    "The three most important inventions of the last century are",
    "Dear Sir or Madam,",
    "1, 1, 2, 3, 5, 8,",
)
EACH_TOKEN_S = 0.2


def options_of(model: Path, kernel: str) -> list:
    kernels = [] if kernel == "auto" else ["--kernel", kernel]
    return ["--model", model, "--threads", 1, "--wire", "f32", *kernels]


def evaluated(model: Path, kernel: str, text: Path, tokens: int, context: int, timeout_s: float) -> dict:
    with tempfile.TemporaryDirectory() as name:
        saved = {"--logprobs": Path(name) / "logprobs.npy", "--top1": Path(name) / "top1.npy"}
        saving = [word for option in saved.items() for word in option]
        program = [
            "halo_mpi.evaluate",
            *EVEN,
            *options_of(model, kernel),
            "--text",
            text,
            "--tokens",
            tokens,
            "--context",
            context,
            *saving,
        ]
        made = run_locally(1, program, timeout_s)
        report = made.pop("report")
        if made["status"] != "ok":
            return made
        logprobs, top1 = (np.load(path) for path in saved.values())
    facts = {name: report[name] for name in ("git", "perplexity", "scored_tokens")} | {"kernel_used": report["kernel"]}
    return made | facts | {"logprobs": [round(float(x), 5) for x in logprobs], "top1": top1.tolist()}


def continued(model: Path, kernel: str, tokens: int, timeout_s: float) -> dict:
    with tempfile.TemporaryDirectory() as name:
        prompts, out = Path(name) / "prompts.jsonl", Path(name) / "out.jsonl"
        prompts.write_text("".join(json.dumps({"id": n, "prompt": text}) + "\n" for n, text in enumerate(PROMPTS)))
        program = [*GENERATE, *options_of(model, kernel), "--prompts", prompts, "--out", out]
        made = run_locally(1, [*program, "--max-tokens", tokens, "--ignore-eos"], timeout_s)
        report = made.pop("report")
        if made["status"] != "ok":
            return made
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    ids = [line["token_ids"] for line in sorted(lines, key=lambda line: line["id"])]
    return made | {"git": report["git"], "kernel_used": report["kernel"], "ids": ids}


def common(ids: list[int], others: list[int]) -> int:
    """Tokens until two texts part."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, others)))


def compared(run: dict, exact: dict) -> dict:
    """Of two evaluations: relative difference in perplexity, mean and largest of the log-probabilities, share of equal top-1."""
    apart = np.abs(np.subtract(run["logprobs"], exact["logprobs"]))
    return {
        "perplexity": run["perplexity"] / exact["perplexity"] - 1,
        "mean": float(apart.mean()),
        "max": float(apart.max()),
        "top1": float(np.mean(np.equal(run["top1"], exact["top1"]))),
    }


def table(content: dict) -> Table:
    settings, runs = content["settings"], [run for run in content["runs"] if run["status"] == "ok"]
    columns = [
        "kernel",
        "perplexity",
        "against first",
        "|log-probability apart|",
        "largest",
        "same top-1",
        "tokens until texts part",
    ]
    title = f"Rounding of kernels: {settings['model']}, {settings['tokens']} tokens in windows of {settings['context']}"
    drawn, first = Table(title, columns), settings["kernels"][0]
    scored = {run["kernel"]: run for run in runs if run["what"] == "evaluate"}
    texts = {run["kernel"]: run["ids"] for run in runs if run["what"] == "generate"}
    for kernel in settings["kernels"]:
        cells = ["-"] * 6
        if kernel in scored:
            cells[0] = f"{scored[kernel]['perplexity']:.4f}"
        if kernel in scored and first in scored and kernel != first:
            against = compared(scored[kernel], scored[first])
            cells[1:5] = [
                f"{against['perplexity']:+.3%}",
                f"{against['mean']:.4f}",
                f"{against['max']:.3f}",
                f"{against['top1']:.2%}",
            ]
        if kernel in texts and first in texts and kernel != first:
            cells[5] = ", ".join(str(common(own, others)) for own, others in zip(texts[kernel], texts[first]))
        drawn.rows.append([f"{kernel} ({scored[kernel]['kernel_used']})" if kernel in scored else kernel, *cells])
    drawn.notes.append(f"Texts of {settings['generated']} tokens each: {settings['generated']} means that they did not part.")
    drawn.notes += failures(content, name_of)
    return drawn


def name_of(cell: dict) -> str:
    return f"{cell['what']}, kernel {cell['kernel']}"


def line_of(run: dict) -> str:
    return name_of(run) + (f": perplexity {run['perplexity']:.4f}" if "perplexity" in run else "")


@click.command(help=__doc__)
@model_options
@click.option("--kernels", type=Names(KERNELS), default="reference,llvm", show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=4096, show_default=True, help="Of text.")
@click.option("--context", type=click.IntRange(2), default=512, show_default=True, help="Tokens per window.")
@click.option("--generated", type=click.IntRange(1), default=200, show_default=True, help="Tokens of each continued text.")
@shared_options("minutes", "seed", "json", minutes=60.0)
def main(model, kernels, tokens, context, generated, minutes, seed, out) -> int:
    settings = {"model": config_of(model).name, "kernels": kernels, "tokens": tokens, "context": context, "generated": generated}
    results = Results("exactness", out, seed, **settings, prompts=PROMPTS)
    work = {"evaluate": tokens, "generate": generated * len(PROMPTS)}
    with tempfile.TemporaryDirectory(prefix="halo-exactness-") as name:
        text = Path(name) / "text"
        text.write_text(language_reference())

        def run(cell: dict) -> dict:
            timeout_s = 120 + 5 * EACH_TOKEN_S * work[cell["what"]]
            if cell["what"] == "evaluate":
                return evaluated(model, cell["kernel"], text, tokens, context, timeout_s)
            return continued(model, cell["kernel"], generated, timeout_s)

        cells = [{"what": what, "kernel": kernel, "repeat": 0} for what in work for kernel in kernels]
        measure([[cell] for cell in cells], run, line_of, lambda cell: 10 + EACH_TOKEN_S * work[cell["what"]], minutes, results)
    table(results.content).print()
    return 0 if all(run["status"] == "ok" for run in results.runs) else 1


if __name__ == "__main__":
    run_benchmark(main)
