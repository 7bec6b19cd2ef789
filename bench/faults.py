"""What each fault does to a run of generate: python -m bench.faults [--rows NAME,...] [--when MOMENT,...] [--json FILE]

Four hosts in a lab, started by halo-mpirun, greedy with f32 on the wire: a fault at prefill, in the middle of a token, and while work
moves. What the user sees, the longest wait for a token, whether the text is the undisturbed run's, the exit code, what was left running.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from bench.cells import require_lab
from bench.estimates import NOVEL
from bench.fault_runs import DONE, FAILED, LOST, PROMPT, Setting, complaints, damaged_copy, expected_codes, full_disk, lasted_s
from bench.fault_runs import judged, play, prompts_file, told
from bench.modes import Names
from bench.results import Results, run_benchmark, shared_options
from bench.rounds import measure
from bench.shapes import config_of, model_options
from bench.tables import Table, number

MOMENTS = ("prefill", "token", "move")
START = ("start",)  # of what is so from the beginning
VICTIM = "pi3"
SLOWED = {"host": "pi2", "action": "slowdown", "value": 0.2, "at_token": 4}  # so that work moves
PATIENCE_S = 30.0  # and so many times what the undisturbed run took: then it hangs
TIMES = 4


@dataclass(frozen=True, slots=True)
class Fault:
    """`events` lack their trigger. `codes`: the right exit codes, where the events do not tell them. `full`: the option whose file is on
    a full disk."""

    what: str
    events: tuple[dict, ...] = ()
    moments: tuple[str, ...] = MOMENTS
    codes: frozenset[int] = frozenset()
    full: str = ""
    damaged: bool = False


def on(action: str, *hosts: str, **more) -> tuple[dict, ...]:
    return tuple({"host": host, "action": action, **more} for host in hosts or (VICTIM,))


FAULTS = {
    "link-1": Fault("link down for 1 s", on("link-down", for_s=1)),
    "link-5": Fault("link down for 5 s", on("link-down", for_s=5)),
    "link-30": Fault("link down for 30 s", on("link-down", for_s=30)),
    "link": Fault("link down for good", on("link-down")),
    "hole-5": Fault("black hole for 5 s", on("black-hole", for_s=5)),
    "hole-30": Fault("black hole for 30 s", on("black-hole", for_s=30)),
    "hole": Fault("black hole for good", on("black-hole")),
    "stop-5": Fault("SIGSTOP for 5 s", on("stop", for_s=5)),
    "kill-1": Fault("SIGKILL of a worker", on("kill")),
    "kill-2": Fault("SIGKILL of two workers", on("kill", "pi3", "pi4")),
    "kill-3": Fault("SIGKILL of all workers", on("kill", "pi2", "pi3", "pi4")),
    "kill-root": Fault("SIGKILL of the root", on("kill", "pi1")),
    "daemon": Fault("SIGKILL of a host's MPI daemon", on("kill-daemon")),
    "reboot": Fault("a worker's host reboots, 8 s", on("reboot", value=8)),
    "oom": Fault("a worker runs out of memory", on("oom")),
    "damaged": Fault("a worker's shards are damaged", (), START, frozenset({LOST}), damaged=True),
    "nan": Fault("NaN partial sums", on("nan")),
    "disk-out": Fault("disk full: --out", (), START, frozenset({FAILED}), full="--out"),
    "disk-json": Fault("disk full: --json", (), START, frozenset({FAILED}), full="--json"),
    "disk-checkpoint": Fault("disk full: --checkpoint", (), START, frozenset({DONE, FAILED}), full="--checkpoint"),
    "sigterm": Fault("SIGTERM", ({"action": "terminate"},)),
}


def cells(rows: tuple[str, ...], when: tuple[str, ...]) -> list[dict]:
    """The undisturbed runs first."""
    faults = [{"fault": row, "when": moment} for row in rows for moment in FAULTS[row].moments
              if (moment in when or moment == "start")]  # fmt: skip
    needed = {kind_of(cell["when"]) for cell in faults}
    return [{"fault": "none", "when": moment} for moment in ("token", "move") if moment in needed] + faults


def kind_of(moment: str) -> str:
    """The undisturbed run that a moment's runs are compared with."""
    return "move" if moment == "move" else "token"


class Cases:
    """Plays cells, and first the undisturbed runs that they are judged by."""

    def __init__(self, setting: Setting):
        self._setting = setting
        self.undisturbed: dict[str, dict] = {}

    def _undisturbed(self, kind: str, setting: Setting) -> dict:
        if kind not in self.undisturbed:
            self.undisturbed[kind] = play(setting, [SLOWED] if kind == "move" else [], 8 * PATIENCE_S)
        return self.undisturbed[kind]

    def events(self, fault: Fault, moment: str) -> list[dict]:
        """The fault's events with their trigger."""
        half_s = self.undisturbed["token"]["report"]["tpot_ms"]["p50"] / 2e3 if "token" in self.undisturbed else 0.05
        triggers = {"prefill": {"at_phase": "prefill"}, "move": {"at_phase": "re-placement"},
                    "token": {"at_token": max(1, self._setting.tokens // 5), "after_s": round(half_s, 4)}}  # fmt: skip
        slowed = [SLOWED] if moment == "move" else []
        return slowed + [{**event, **triggers[moment]} for event in fault.events]

    def run(self, cell: dict) -> dict:
        name, moment = cell["fault"], cell["when"]
        setting = replace(self._setting, placement="auto") if moment == "move" else self._setting
        undisturbed = self._undisturbed(kind_of(moment), setting)
        if name == "none":
            return undisturbed
        fault = FAULTS[name]
        if undisturbed["report"] is None:
            return undisturbed | {"status": "failed", "error": "the undisturbed run failed"}
        limit_s = PATIENCE_S + TIMES * undisturbed["wall_s"] + sum(event.get("for_s", 0) for event in fault.events)
        with ExitStack() as stack:
            if fault.full:
                disk = stack.enter_context(full_disk())
                setting = replace(setting, options=(fault.full, str(disk / "file")))
            if fault.full == "--out":
                setting = replace(setting, prompts=prompts_file(Path(stack.enter_context(TemporaryDirectory()))))
            if fault.damaged:
                setting = replace(setting, damaged=stack.enter_context(damaged_copy(setting.model)))
            run = play(setting, self.events(fault, moment), limit_s)
        return judged_as(fault, run, undisturbed, setting.mode == "relaxed")


def judged_as(fault: Fault, run: dict, undisturbed: dict, relaxed: bool) -> dict:
    log = run["lab"]["events"] if run["lab"] else []
    codes = set(fault.codes) or expected_codes(log, lasted_s(run))
    wrong = complaints(run, undisturbed, codes, relaxed)
    played = [entry for entry in log if entry["action"] in {event["action"] for event in fault.events} and "failed" not in entry]
    if len(played) < len(fault.events):
        wrong.insert(0, "the fault was not played: its moment did not come, or it could not be done")
    return judged(run, undisturbed, codes, wrong)


def name_of(cell: dict) -> str:
    what = FAULTS[cell["fault"]].what if cell["fault"] in FAULTS else "undisturbed"
    return f"{what}, {cell['when']}"


def line_of(run: dict) -> str:
    return f"{name_of(run)}: {run['said'] or 'nothing'}"


def table(content: dict) -> Table:
    settings = content["settings"]
    columns = ["fault", "when", "the user sees", "text", "longest wait, s", "exit", "expected", "left", "took s", ""]
    drawn = Table(f"Faults: {settings['model']}, {settings['mode']}, {settings['tokens']} tokens", columns, texts=4)
    before = None
    for run in content["runs"]:
        if run["fault"] != before:
            drawn.ruled.add(len(drawn.rows))
        before, lab = run["fault"], run["lab"] or {}
        orphans = lab.get("orphans")
        drawn.rows.append([
            name_of(run).rpartition(", ")[0], run["when"], (run["said"] or "nothing")[:70], run.get("ids", "same"),
            number(lab.get("longest_wait_s")), str(run["exit_code"]), told(set(run.get("expected", [DONE]))),
            "-" if orphans is None else str(len(orphans)), number(run["wall_s"]), "" if run["status"] == "ok" else run["status"],
        ])  # fmt: skip
    drawn.notes += [f"{run['status']}: {name_of(run)}: {run['error']}" for run in content["runs"] if run["status"] != "ok"]
    drawn.notes += [] if content["complete"] else [f"INCOMPLETE: {content['why_incomplete']}"]
    return drawn


@click.command(help=__doc__)
@model_options
@click.option("--rows", type=Names(FAULTS), default=",".join(FAULTS), help="Which faults. [default: all]")
@click.option("--when", type=Names(MOMENTS), default=",".join(MOMENTS), show_default=True)
@click.option("--mode", type=click.Choice(["strict", "relaxed"]), default="strict", show_default=True)
@click.option("--tokens", type=click.IntRange(8), default=128, show_default=True, help="Of each text.")
@click.option("--words", type=click.IntRange(0), default=0, show_default=True, help="Of a novel, before the usual prompt.")
@shared_options("pace", "minutes", "json", minutes=60)
def main(model, rows, when, mode, tokens, words, pace_ms, minutes, out) -> int:
    require_lab()
    about = {"rows": rows, "when": when, "mode": mode, "tokens": tokens, "words": words, "pace_ms": pace_ms}
    results = Results("faults", out, 0, model=config_of(model).name, **about)
    before = NOVEL.read_text().split()[:words]
    cases = Cases(Setting(model, tokens, pace_ms, mode, prompt=" ".join([*before, PROMPT])))
    measure([[cell] for cell in cells(rows, when)], cases.run, line_of, lambda _: 40, minutes, results)
    table(results.content).print()
    return 0 if results.content["complete"] and all(run["status"] == "ok" for run in results.runs) else 1


if __name__ == "__main__":
    run_benchmark(main)
