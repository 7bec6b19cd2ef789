"""A long relaxed run over a bad network, with links that go down at random: python -m bench.stress [--minutes M] [--json FILE]

`--check` recomputes what the root adds up, at every token; the memory of every rank is sampled. It ends well if the run does, every
partial sum is accounted for, and no rank has grown.
"""

import json
import random
import tempfile
import threading
import time
from pathlib import Path

import click
import psutil

from bench.cells import GENERATE, require_lab, run_in_lab
from bench.results import Results, run_benchmark, shared_options
from bench.shapes import model_options
from bench.tables import Table, number

OPTIONS = ("--sync", "relaxed", "--check", "--quality", "0.6")
EVERY_S = 5.0
START_S = 60.0
TEXT_S = 60.0  # then the next text begins
TEXT_TOKENS = 1500  # at most
SETTLED = 0.25  # of the samples are start-up: caches, buffers and the first long text
GROWTH_BYTES = 24 * 2**20  # that is still flat: the allocator's noise (Linux returns memory late)


def flaps(hosts: int, seconds: float, seed: int) -> list[dict]:
    """A worker's link goes down for 0.2 to 3 s, every 5 to 20 s."""
    draw, events, at_s = random.Random(seed), [], 3.0
    while at_s < seconds:
        host, for_s = f"pi{draw.randint(2, hosts)}", round(draw.uniform(0.2, 3.0), 2)
        events.append({"at_s": round(at_s, 2), "host": host, "action": "link-down", "for_s": for_s})
        at_s += for_s + draw.uniform(5, 20)
    return events


class Memory(threading.Thread):
    """Samples the resident memory, in bytes, of the processes whose command line has `word`."""

    def __init__(self, word: str):
        super().__init__(daemon=True)
        self._word, self._over, self.samples = word, threading.Event(), {}

    def run(self) -> None:
        while not self._over.wait(EVERY_S):
            for process in psutil.process_iter(["pid", "name", "cmdline", "memory_info"]):
                info = process.info
                words = info["cmdline"] or []
                if info["name"].startswith("python") and self._word in words and "bench.lab" not in words:
                    self.samples.setdefault(info["pid"], []).append(info["memory_info"].rss)

    def stop(self) -> list[list[int]]:
        self._over.set()
        self.join()
        return [samples for samples in self.samples.values() if len(samples) > 3]


def growth(samples: list[int]) -> float:
    """Bytes between the settled part's first and last quarter, by their medians."""
    settled = samples[int(len(samples) * SETTLED) :]
    quarter = max(1, len(settled) // 4)
    middle = sorted(settled[:quarter])[quarter // 2], sorted(settled[-quarter:])[quarter // 2]
    return middle[1] - middle[0]


@click.command(help=__doc__)
@model_options
@click.option("--ranks", type=click.IntRange(2, 64), default=4, show_default=True)
@click.option("--loss", type=click.FloatRange(0, 99), default=10.0, show_default=True, help="Per cent of the packets.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, help="How long to generate.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the flaps.")
@shared_options("json")
def main(model, ranks, loss, minutes, seed, out) -> int:
    require_lab()
    results = Results("stress", out, seed, model=model.name, ranks=ranks, loss=loss, minutes=minutes, options=OPTIONS)
    seconds = 60 * minutes
    with tempfile.TemporaryDirectory(prefix="halo-bench-") as name:
        prompts, answers = Path(name) / "prompts.jsonl", Path(name) / "answers.jsonl"
        lines = [{"id": number, "prompt": f"Chapter {number}."} for number in range(max(1, round(seconds / TEXT_S)))]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        scenario = {"hosts": ranks, "loss": loss / 100, "event": flaps(ranks, seconds, seed)}
        program = [*GENERATE, "--model", model, *OPTIONS, "--prompts", prompts, "--out", answers, "--ignore-eos"]
        program += ["--max-tokens", TEXT_TOKENS, "--max-seconds", min(TEXT_S, seconds)]
        memory = Memory(str(prompts))
        memory.start()
        began = time.monotonic()
        run = run_in_lab(scenario, program, 1.2 * seconds + START_S, seed)
        rss = memory.stop()
        results.add({**run, "seconds": time.monotonic() - began, "rss": rss, "growth": [growth(samples) for samples in rss]})
    results.finish()
    table(results.content).print()
    run = results.runs[0]
    return 0 if run["status"] == "ok" and len(rss) == ranks and max(run["growth"]) <= GROWTH_BYTES else 1


def table(content: dict) -> Table:
    run, settings = content["runs"][0], content["settings"]
    drawn = Table(f"Stress: {settings['ranks']} ranks, {settings['loss']:g} % loss, links down at random", ["", "value"])
    report = run["report"]
    drawn.rows.append(["ended", run["status"] if not run["error"] else f"{run['status']}: {run['error']}"])
    if report:
        ledger = report["ledger"]
        drawn.rows += [
            ["minutes", number(run["seconds"] / 60)],
            ["tokens", str(report["generated_tokens"])],
            ["TPOT p50, p99, max, ms", ", ".join(number(report["tpot_ms"][name]) for name in ("p50", "p99", "max"))],
            ["partial sums", str(ledger["partial_sums"])],
            *([name.replace("_", " "), str(ledger[name])] for name in ("on_time", "waited", "substituted", "discarded_late")),
            ["deferred", str(sum(ledger["deferred"].values()))],
        ]
    drawn.rows.append(["memory growth per rank, MiB", ", ".join(f"{grown / 2**20:+.1f}" for grown in run["growth"])])
    return drawn


if __name__ == "__main__":
    run_benchmark(main)
