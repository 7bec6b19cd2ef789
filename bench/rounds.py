"""Groups of cells, one after the other, within a time budget. Ctrl-C and a spent budget keep what was measured."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from bench.results import Results
from bench.tables import Table

Cell = dict  # what identifies a run; "repeat" counts repetitions


def measure(
    groups: Iterable[list[Cell]],
    run: Callable[[Cell], dict],
    line_of: Callable[[dict], str],
    expected_s: Callable[[Cell], float],
    minutes: float,
    results: Results,
) -> None:
    """Run every cell (`run` returns what became of it) and add it to the results. A group is begun only if it will fit.

    `expected_s`: how long a cell takes before it was run once.
    """
    groups, end = list(groups), time.monotonic() + 60 * minutes
    total, done = sum(map(len, groups)), 0
    took_s: dict[tuple, float] = {}
    try:
        for group in groups:
            needed_s = sum(took_s.get(_key(cell)) or expected_s(cell) for cell in group)
            if time.monotonic() + needed_s > end:
                results.finish(f"truncated after {done} of {total} runs: the time budget of {minutes:g} minutes")
                return
            for cell in group:
                made = {**cell, **run(cell)}
                results.add(made)
                took_s[_key(cell)] = made["wall_s"]
                done += 1
                ended = "ok" if made["status"] == "ok" else f"{made['status']}: {made['error']}"
                click.echo(f"[{done}/{total}] {line_of(made)}, {ended} ({made['wall_s']:.0f} s)", err=True)
    except KeyboardInterrupt:
        results.finish(f"interrupted after {done} of {total} runs")
        return
    results.finish()


def conclude(results: Results, table: Callable[[dict], Table], plot: Callable[[dict, Path], None], png: Path | None) -> int:
    """Print the table and draw the figure, if one is wanted; the exit code: 0 if any run ended well."""
    table(results.content).print()
    if png:
        plot(results.content, png)
    return 0 if any(run["status"] == "ok" for run in results.runs) else 1


def _key(cell: Cell) -> tuple:
    return tuple((key, value) for key, value in cell.items() if key != "repeat")


def failures(content: dict, name_of: Callable[[dict], str]) -> list[str]:
    """Notes for a table: every run that did not end well, and what is missing."""
    notes = [f"{run['status']}: {name_of(run)}: {run['error']}" for run in content["runs"] if run["status"] != "ok"]
    return notes + ([] if content["complete"] else [f"INCOMPLETE: {content['why_incomplete']}"])
