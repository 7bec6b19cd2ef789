"""What really happened in a run, as JSON beside the program's own report."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from bench.lab.lab import Lab
from bench.lab.run import Run


def record_path(command: list[str], given: str | None) -> Path | None:
    """`given`, else beside the file that the command's --json names: report.json -> report.lab.json."""
    if given:
        return Path(given)
    for word, following in zip(command, [*command[1:], ""]):
        name = following if word == "--json" else word.removeprefix("--json=") if word.startswith("--json=") else ""
        if name:
            return Path(name).with_suffix(".lab.json")
    return None


def record(lab: Lab, run: Run, exit_code: int, duration_s: float) -> dict:
    """Take it before the lab is taken down."""
    assert lab.links is not None
    load = os.getloadavg()
    return {
        "schema": 1,
        "scenario": asdict(lab.scenario),
        "backend": lab.links.name,
        "seed": lab.seed if lab.links.name == "relay" else None,
        "kernel": platform.release(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "load_average": load},
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "launcher": run.launcher,
        "fault_tolerant": run.fault_tolerant if run.launcher == "mpirun" else None,
        "command": run.command,
        "exit_code": exit_code,
        "duration_s": round(duration_s, 3),
        "marked": run.marked,
        "generation_s": {"begin": rounded(run.began_s), "end": rounded(run.ended_s)},
        "tokens": run.tokens,
        "starts": run.starts,
        "longest_wait_s": rounded(run.longest_wait_s),
        "orphans": run.orphans,
        "events": run.director.log,
        "links": [lane_record(lab, lane) for lane in lab.links.lanes()],
        "costs": lab.links.costs(),
    }


def lane_record(lab: Lab, lane) -> dict:
    """offered_loss is the scenario's; a lane that judged nothing (the other end's link is worse) has no measured one."""
    measured = round(lane.dropped / lane.judged, 6) if lane.judged else None
    return asdict(lane) | {"offered_loss": lab.scenario.hosts[lane.host].mean_loss, "measured_loss": measured}


def rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def write(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
