"""What guesses from the text itself are worth: python -m bench.lookup [--guesses 0,2,4,8] [--json FILE]

Four devices, 2 ms between any two, greedy, with the model's chat template: texts to be summarized, code to be changed, and a question
and a story that repeat little (bench/texts/lookup.jsonl). A further row of a pass takes --row-share of the time that a device takes for
the first. Texts end where the model ends them: one that has to go on soon repeats itself, which would flatter the guesses.
--hosts 1 --pace-ms 0 is this machine itself.
"""

import json
import tempfile
from pathlib import Path

import click

from bench.cells import GENERATE, require_lab, run_in_lab
from bench.modes import Names, Numbers
from bench.results import ROOT, Results, run_benchmark, shared_options
from bench.rounds import failures, measure
from bench.shapes import config_of, model_options
from bench.stats import pairwise, token_ms
from bench.tables import Table, number
from halo_mpi.engine.lookup import MOST_GUESSES

TEXTS = ROOT / "bench" / "texts" / "lookup.jsonl"
PATIENCE_S = 40.0


def prompts() -> dict[str, str]:
    return {line["id"]: line["prompt"] for line in map(json.loads, TEXTS.read_text().splitlines())}


def run_text(model: Path, prompt: str, guesses: int, scenario: dict, max_tokens: int, seconds: float) -> dict:
    """`generate` with so many guesses a pass, in a lab."""
    with tempfile.TemporaryDirectory(prefix="halo-bench-") as folder:
        file = Path(folder) / "prompt.txt"
        file.write_text(prompt)
        program = [
            *GENERATE,
            "--model",
            model,
            "--prompt-file",
            file,
            "--chat",
            "--lookup",
            guesses,
            "--samples",
        ]
        program += ["--max-tokens", max_tokens, "--max-seconds", seconds]
        return run_in_lab(scenario, program, 2 * seconds + 2 * PATIENCE_S)


def name_of(cell: dict) -> str:
    return f"{cell['text']}, {cell['guesses']} guesses, repeat {cell['repeat'] + 1}"


def tokens_per_pass(run: dict) -> float:
    """Of a run that ended well; 1 without guesses."""
    return ((run["report"]["lookup"] or {}).get("tokens_per_pass")) or 1.0


def agree(run: dict, other: dict) -> bool:
    """Whether they wrote the same, as far as both came in their time."""
    one, two = run["report"]["token_ids"], other["report"]["token_ids"]
    return one[: len(two)] == two[: len(one)]


def line_of(run: dict) -> str:
    found = f"{tokens_per_pass(run):.2f} tokens per pass, {number(token_ms(run))} ms per token" if run["status"] == "ok" else ""
    return f"{name_of(run)}: {found}"


def table(content: dict) -> Table:
    settings = content["settings"]
    columns = ["text", "guesses", "tokens", "right", "tokens per pass", "TPOT mean", "time / none", "ids"]
    title = (
        f"Guesses: {settings['model']}, {settings['hosts']} devices, {settings['delay_ms']:g} ms links, "
        f"{settings['loss']:.0%} loss, {settings['pace_ms']:g} ms per sync"
    )
    drawn = Table(title, columns)
    done = [run for run in content["runs"] if run["status"] == "ok"]
    for text in settings["texts"]:
        drawn.ruled.add(len(drawn.rows))
        plain = [run for run in done if (run["text"], run["guesses"]) == (text, 0)]
        for guesses in settings["guesses"]:
            own = [run for run in done if (run["text"], run["guesses"]) == (text, guesses)]
            times = [ms for run in own if (ms := token_ms(run))]
            if not times:
                drawn.rows.append([text, str(guesses), "0", *["-"] * 5])
                continue
            lookup = own[0]["report"]["lookup"] or {}
            right = lookup["accepted"] / lookup["proposed"] if lookup.get("proposed") else None
            ratio = pairwise(own, plain, token_ms) if guesses and plain else None
            same = all(agree(run, other) for run in own for other in plain)
            drawn.rows.append([
                text, str(guesses), str(own[0]["report"]["generated_tokens"]), "-" if right is None else f"{right:.0%}",
                f"{tokens_per_pass(own[0]):.2f}", number(sum(times) / len(times)), str(ratio) if ratio else "-",
                "same" if same else "differ",
            ])  # fmt: skip
    drawn.notes += [
        "right: of the guesses that were computed; ids: against the runs without guesses, as far as both came"
    ] + failures(content, name_of)
    return drawn


@click.command(help=__doc__)
@model_options
@click.option("--texts", type=Names(prompts()), default=",".join(prompts()), show_default=True)
@click.option("--guesses", type=Numbers(int, 0, MOST_GUESSES), default="0,2,4,8", show_default=True, help="Of a pass, at most.")
@click.option("--max-tokens", type=click.IntRange(2), default=160, show_default=True)
@click.option("--seconds", type=click.FloatRange(1), default=40.0, show_default=True, help="Time box of a text.")
@click.option("--hosts", type=click.IntRange(1), default=4, show_default=True)
@click.option("--loss", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Of packets between two devices.")
@click.option("--delay-ms", type=click.FloatRange(0), default=2.0, show_default=True, help="Of a packet between two devices.")
@click.option(
    "--row-share", type=click.FloatRange(0), default=0.08, show_default=True, help="The int4 kernels: 78 us for 1 row, 96 for 4."
)
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True)
@shared_options("pace", "minutes", "json")
def main(model, texts, guesses, max_tokens, seconds, hosts, loss, delay_ms, row_share, repeats, pace_ms, minutes, out) -> int:
    require_lab()
    scenario = {"hosts": hosts, "loss": loss, "delay_ms": delay_ms, "pace_ms": pace_ms, "row_share": row_share}
    results = Results("lookup", out, 0, model=config_of(model).name, texts=texts, guesses=guesses, max_tokens=max_tokens,
                      seconds=seconds, repeats=repeats, **scenario)  # fmt: skip

    def run(cell: dict) -> dict:
        return run_text(model, prompts()[cell["text"]], cell["guesses"], scenario, max_tokens, seconds)

    groups = [[{"text": t, "guesses": g, "repeat": r} for g in guesses] for r in range(repeats) for t in texts]
    measure(groups, run, line_of, lambda _: 20 + seconds / 2, minutes, results)
    table(results.content).print()
    return 0 if any(run["status"] == "ok" for run in results.runs) else 1


if __name__ == "__main__":
    run_benchmark(main)
