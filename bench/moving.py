"""What moving work is worth when a device changes while text flows: python -m bench.moving [--scenes NAME,...] [--json FILE]

One device of four at a quarter of its speed from 8 s on, until 28 s; or two of eight that lose 30 % of their packets from the first token
on. Each with even shares that stay, and with `--placement auto`, whose work moves. Strict: the text must be the same in all.
"""

from itertools import accumulate

import click

from bench.cells import require_lab
from bench.modes import Names
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import failures, measure
from bench.scenes import run_in_scene
from bench.shapes import config_of, model_options
from bench.stats import percentile
from bench.tables import Table, number

SCENES = {  # seconds of a run, and what is told apart, in seconds from the first token
    "hot-later": (50.0, {"before": (1, 8), "trouble": (18, 28), "after": (40, 50)}),
    "two-bad-of-eight": (75.0, {"trouble": (50, 75)}),
}
CHANGES = {"hot-later": (8.0, 28.0), "two-bad-of-eight": (0.0,)}
WAYS = {"even": ("--placement", "even"), "still": ("--placement", "auto", "--no-moves"), "moves": ("--placement", "auto")}
PHASES = ("before", "trouble", "after")


def name_of(cell: dict) -> str:
    return f"{cell['scene']}, {cell['way']}, repeat {cell['repeat'] + 1}"


def line_of(run: dict) -> str:
    found = phases(run) if run["status"] == "ok" else {}
    return f"{name_of(run)}: " + ", ".join(f"{name} {number(percentile(times, 50))}" for name, times in found.items())


def ends(run: dict) -> list[float]:
    """When each token was done, in seconds from the first one."""
    return list(accumulate(run["report"]["samples"]["tpot_ms"], initial=0.0))


def phases(run: dict) -> dict[str, list[float]]:
    """The times of the tokens of each phase, in ms."""
    times, done = run["report"]["samples"]["tpot_ms"], [end / 1e3 for end in ends(run)[1:]]
    bounds = SCENES[run["scene"]][1]
    return {name: [ms for ms, end in zip(times, done) if first < end <= last] for name, (first, last) in bounds.items()}


def moves(run: dict) -> list[tuple[int, int]]:
    """The tokens at which a move began, and was done."""
    events = [event for event in run["report"]["events"] if event["what"].startswith(("moving work", "moved: "))]
    return [(one["token"], other["token"]) for one, other in zip(events[::2], events[1::2])]


def adapted(run: dict) -> list[str]:
    """After each change: how many seconds later the first move that follows was done; and by which token."""
    done, found = ends(run), []
    for change in CHANGES[run["scene"]]:
        ended = [done[min(last, len(done) - 1)] / 1e3 for _, last in moves(run)]
        after = [end - change for end in ended if end > change]
        found.append(f"{after[0]:.1f}" if after else "-")
    return found


def longest(run: dict) -> float | None:
    """The longest token while work moved, over the median of the tokens before the move in the same trouble."""
    times, ratios = run["report"]["samples"]["tpot_ms"], []
    for first, last in moves(run):
        before = percentile(times[max(0, first - 8) : first], 50)
        if before and times[first:last]:
            ratios.append(max(times[first:last]) / before)
    return max(ratios, default=None)


def same_text(runs: list[dict]) -> list[str]:
    """Whether all runs wrote the same, whatever moved: other shares round otherwise."""
    texts = [run["report"]["token_ids"] for run in runs if run["status"] == "ok"]
    pairs = [(one, other) for number, one in enumerate(texts) for other in texts[:number]]
    same = sum(one[: min(len(one), len(other))] == other[: min(len(one), len(other))] for one, other in pairs)
    return [f"token ids: the same, as far as both go, in {same} of {len(pairs)} pairs of runs"]


def table(content: dict) -> Table:
    settings = content["settings"]
    columns = ["scenario", "shares", "tokens", *(f"{name}: TPOT p50" for name in PHASES), "moved after s", "moves",
               "longest token in a move / median"]  # fmt: skip
    drawn = Table(f"Moving work: {settings['model']}, {settings['pace_ms']:g} ms per sync and device", columns, texts=2)
    for scene in settings["scenes"]:
        drawn.ruled.add(len(drawn.rows))
        for way in settings["ways"]:
            for run in content["runs"]:
                if (run["scene"], run["way"]) != (scene, way) or run["status"] != "ok":
                    continue
                found, worst = phases(run), longest(run)
                drawn.rows.append([
                    scene, way, str(len(run["report"]["samples"]["tpot_ms"])),
                    *(number(percentile(found.get(name, []), 50)) for name in PHASES),
                    " / ".join(adapted(run)), str(len(moves(run))), f"{worst:.2f}" if worst else "-",
                ])  # fmt: skip
    drawn.notes.append("moved after: seconds from each change of the devices until the next move was done")
    drawn.notes += failures(content, name_of) + same_text(content["runs"])
    return drawn


@click.command(help=__doc__)
@model_options
@click.option("--scenes", type=Names(SCENES), default=",".join(SCENES), show_default=True)
@click.option("--ways", type=Names(WAYS), default="even,moves", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True)
@shared_options("pace", "minutes", "seed", "json")
def main(model, scenes, ways, repeats, pace_ms, minutes, seed, out) -> int:
    require_lab()
    results = Results(
        "moving", out, seed, model=config_of(model).name, scenes=scenes, ways=ways, repeats=repeats, pace_ms=pace_ms
    )

    def run(cell: dict) -> dict:
        return run_in_scene(model, WAYS[cell["way"]], cell["scene"], pace_ms, SCENES[cell["scene"]][0], seed + cell["repeat"])

    groups = [[{"scene": s, "way": w, "repeat": r} for w in ways] for r in range(repeats) for s in scenes]
    measure(groups, run, line_of, lambda cell: 15 + 1.5 * SCENES[cell["scene"]][0], minutes, results)
    table(results.content).print()
    return 0 if any(run["status"] == "ok" for run in results.runs) else 1


if __name__ == "__main__":
    run_benchmark(main)
