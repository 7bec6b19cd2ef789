"""Random faults, again and again: python -m bench.fault_schedules [--runs N] [--seed S] [--json FILE]

Each run of generate on four hosts, strict with f32 on the wire, meets one to three faults at random moments: links, ranks, daemons, whole
hosts, memory, broken answers. Each must end in time with the right exit code, the undisturbed text, and nothing left running. The n-th
run is the first one of the seed S + n.
"""

import os
import random

import click

from bench.cells import require_lab
from bench.fault_runs import HOSTS, Setting, complaints, expected_codes, judged, lasted_s, play, told
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import measure
from bench.shapes import config_of, model_options
from bench.tables import Table, number
from halo_mpi.engine.lookup import MOST_GUESSES

MOST_EVENTS = 3
AT_PREFILL = 0.15  # of the events
OUTAGE_S = (0.1, 6.0)
LIMIT_S, TIMES = 40.0, 4  # a hang: longer than this and so many times the undisturbed run
KINDS = {  # how often, against the others
    "link-down": 4, "black-hole": 4, "stop": 3, "kill": 4, "slowdown": 1, "loss": 1, "kill-daemon": 2, "reboot": 2, "oom": 1, "nan": 2,
    "kill-root": 1, "terminate": 1,
}  # fmt: skip


def schedule(seed: int, lasts_s: float) -> list[dict]:
    """The events of one run that lasts about so long."""
    draw = random.Random(seed)
    return [event(draw, lasts_s) for _ in range(draw.randint(1, MOST_EVENTS))]


def event(draw: random.Random, lasts_s: float) -> dict:
    kind, host = draw.choices(list(KINDS), KINDS.values())[0], f"pi{draw.randint(2, HOSTS)}"
    moment = {"at_phase": "prefill"} if draw.random() < AT_PREFILL else {"at_s": round(draw.uniform(0, 0.9 * lasts_s), 3)}
    outage_s = round(draw.uniform(*OUTAGE_S), 2)
    made = {"host": host, "action": kind, **moment}
    if kind in ("link-down", "black-hole") and draw.random() < 0.7 or kind in ("stop", "slowdown", "loss"):
        made["for_s"] = outage_s
    if kind == "kill-root":
        made |= {"host": "pi1", "action": "kill"}
    elif kind == "terminate":
        made["host"] = "pi1"
    elif kind in ("slowdown", "loss"):
        made["value"] = {"slowdown": 0.5, "loss": 0.1}[kind]
    elif kind == "reboot":
        made["value"] = round(2 + outage_s, 2)
    return made


def undisturbed_run(setting: Setting) -> dict:
    run = play(setting, [], 4 * LIMIT_S)
    if run["report"] is None:
        raise click.ClickException(f"the undisturbed run failed: {run['error']}")
    return run


def run_schedule(setting: Setting, seed: int, undisturbed: dict) -> dict:
    """What became of one run with faults, judged."""
    run = play(setting, schedule(seed, lasted_s(undisturbed)), LIMIT_S + TIMES * undisturbed["wall_s"], seed)
    codes = expected_codes(run["lab"]["events"] if run["lab"] else [], lasted_s(run))
    return judged(run, undisturbed, codes, complaints(run, undisturbed, codes))


def told_events(run: dict) -> str:
    """What was done to the run."""
    log = run["lab"]["events"] if run["lab"] else []
    return ", ".join(f"{e['t_s']:.1f} {e['action']} {e['host']}{' (failed)' if 'failed' in e else ''}" for e in log) or "nothing"


def table(content: dict) -> Table:
    settings = content["settings"]
    drawn = Table(f"Random faults: {settings['model']}, {settings['tokens']} tokens",
                  ["seed", "at s what", "text", "longest wait, s", "exit", "expected", "took s", ""], texts=3)  # fmt: skip
    for run in content["runs"]:
        if run["status"] != "ok" or len(content["runs"]) <= 20:
            wait_s = run["lab"] and run["lab"]["longest_wait_s"]
            drawn.rows.append([str(run["seed"]), told_events(run), run["ids"], number(wait_s), str(run["exit_code"]),
                               told(set(run["expected"])), number(run["wall_s"]), run["status"]])  # fmt: skip
    failed = [run for run in content["runs"] if run["status"] != "ok"]
    drawn.notes += [f"{run['status']}: {run['error']}; again: {again(run['seed'], settings)}" for run in failed]
    drawn.notes.append(f"{len(content['runs']) - len(failed)} of {len(content['runs'])} runs ended as they should")
    drawn.notes += [] if content["complete"] else [f"INCOMPLETE: {content['why_incomplete']}"]
    return drawn


def again(seed: int, settings: dict) -> str:
    """The command that plays one schedule again; the moments are those of the clock, so it may end otherwise."""
    same = f"--model {settings['folder']} --tokens {settings['tokens']} --pace-ms {settings['pace_ms']:g}"
    return f"python -m bench.fault_schedules --runs 1 --seed {seed} {same} --lookup {settings.get('lookup', 0)}"


@click.command(help=__doc__)
@model_options
@click.option("--runs", type=click.IntRange(1), default=20, show_default=True)
@click.option("--tokens", type=click.IntRange(8), default=96, show_default=True, help="Of each text.")
@click.option("--lookup", type=click.IntRange(0, MOST_GUESSES), default=0, show_default=True, help="Guesses of a pass, at most.")
@shared_options("pace", "minutes", "seed", "json", minutes=60)
def main(model, runs, tokens, lookup, pace_ms, minutes, seed, out) -> int:
    require_lab()
    name = config_of(model).name
    results = Results("fault_schedules", out, seed, model=name, folder=os.path.relpath(model), runs=runs, tokens=tokens, lookup=lookup,
                      pace_ms=pace_ms)  # fmt: skip
    setting = Setting(model, tokens, pace_ms, options=("--lookup", str(lookup)))
    undisturbed = undisturbed_run(setting)

    def line_of(run: dict) -> str:
        return f"seed {run['seed']}: {told_events(run)}"

    groups = [[{"seed": seed + number}] for number in range(runs)]
    measure(groups, lambda cell: run_schedule(setting, cell["seed"], undisturbed), line_of, lambda _: 20, minutes, results)
    table(results.content).print()
    return 0 if results.content["complete"] and all(run["status"] == "ok" for run in results.runs) else 1


if __name__ == "__main__":
    run_benchmark(main)
