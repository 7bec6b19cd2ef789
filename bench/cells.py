"""One cell of a benchmark: the real program under the real mpirun, in a lab or without, in a time box, and what became of it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.lab.launch import find_mpirun, require_open_mpi_5
from bench.lab.system import require_root_and_tools
from bench.results import ROOT
from halo_mpi.engine.marks import LAB_DIR

LAB_S = 60.0  # to bring a lab up and take it down, at most
END_S = 20.0  # for a lab to take itself down when told to
EXIT_TIMEOUT = 124
# But for what a mode says: nothing that is measured decides who computes what, and whoever is late is waited for.
EVEN = ("--placement", "importance", "--takeover-ms", "0")
GENERATE = ("halo_mpi.generate", *EVEN, "--lookup", "0")  # a token a pass, so that times per token can be compared
PROMPT = "The"  # one token: the prompt is computed under loss too, and should not eat up the time box
LAB_KEYS = ("backend", "seed", "duration_s", "generation_s", "tokens", "starts", "longest_wait_s", "orphans", "events", "links",
            "costs")  # fmt: skip


def require_lab() -> None:
    """Raises LabError with the reason why there can be no lab here."""
    require_root_and_tools()
    require_open_mpi_5()


def generation(model: Path, options: tuple[str, ...], seconds: float, max_tokens: int) -> list:
    """`generate` in a time box, with the end-of-text token banned and all times in the report."""
    program = [*GENERATE, "--model", model, *options, "--prompt", PROMPT, "--ignore-eos", "--samples"]
    return [*program, "--max-tokens", max_tokens, "--max-seconds", seconds]


def run_in_lab(scenario: dict, program: list, timeout_s: float, seed: int = 0) -> dict:
    """Run `python -m PROGRAM --json F` in a lab of these scenario values. See `outcome` for what comes back."""
    with tempfile.TemporaryDirectory(prefix="halo-bench-") as name:
        folder = Path(name)
        (folder / "scenario.toml").write_text(toml(scenario))
        lab = ["-m", "bench.lab", "run", folder / "scenario.toml", "--seed", seed, "--timeout", timeout_s, "--marks"]
        command = [sys.executable, *lab, "--", "python", "-m", *program, "--json", folder / "report.json"]
        return outcome(command, folder, timeout_s + LAB_S)


def run_locally(ranks: int, program: list, timeout_s: float, tree: Path = ROOT, ticks: Path | None = None,
                device: dict | None = None) -> dict:  # fmt: skip
    """Run `mpirun -n RANKS python -m PROGRAM --json F` on this machine, from the checkout `tree`.

    `ticks`: the file for what bench.ticks counts meanwhile; `device`: what each rank plays, as a pace file of halo_mpi/engine/marks.py.
    """
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
    with tempfile.TemporaryDirectory(prefix="halo-bench-") as name:
        folder = Path(name)
        start = [ROOT / "bench" / "ticks.py", ticks] if ticks else ["-m"]
        command = [find_mpirun(), *options, *(as_devices(folder, ranks, device) if device else ()), "-n", ranks]
        command += [sys.executable, *start, *program, "--json", folder / "report.json"]
        return outcome(command, folder, timeout_s, tree)


def as_devices(folder: Path, ranks: int, device: dict) -> list:
    """mpirun's options for ranks that play such devices, and the files by which they know it."""
    for answer in ("set", "go", "calm"):
        (folder / answer).touch()
    for rank in range(ranks):
        (folder / f"pace-{rank}.json").write_text(json.dumps(device))
    return ["-x", f"{LAB_DIR}={folder}"]


def outcome(command: list, folder: Path, timeout_s: float, tree: Path = ROOT) -> dict:
    """What became of a command that leaves report.json (and, from a lab, report.lab.json) in the folder. Its output is left there too.

    status: ok | stuck (the program gave up itself, with a report) | timeout | failed; error: one line, or None.
    """
    started = time.monotonic()
    began = time.time()
    with open(folder / "stderr", "w+") as errors, open(folder / "stdout", "w") as output:
        code = _finish(_start(command, output, errors, tree), timeout_s)
        errors.seek(0)
        lines = [line for line in errors.read().splitlines() if line.strip()]
    report, lab = _read(folder / "report.json"), _read(folder / "report.lab.json")
    if code == EXIT_TIMEOUT:
        status, error = "timeout", f"not done after {timeout_s:g} s"
    elif code or report is None:
        said = [line for line in lines if line.startswith(("halo-mpi: ", "lab: ", "bench: "))]
        status, error = "failed", (said or lines or [f"exit code {code}, no report"])[-1][:300]
    else:
        status, error = ("stuck", report["stuck"]) if report.get("stuck") else ("ok", None)
    lab = {key: lab[key] for key in LAB_KEYS} if lab else None
    wall_s = round(time.monotonic() - started, 2)
    return {"status": status, "error": error, "exit_code": code, "began": began, "wall_s": wall_s, "report": report, "lab": lab}


def _start(command: list, output, errors, tree: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
    pipes = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": errors}
    return subprocess.Popen(list(map(str, command)), cwd=tree, env=environment, start_new_session=True, **pipes)


def _finish(process: subprocess.Popen, timeout_s: float) -> int:
    """Its exit code. A process that takes too long, or that nobody waits for any more (Ctrl-C), is told to end, then killed."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return EXIT_TIMEOUT
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def toml(table: dict, name: str = "") -> str:
    """A scenario's values as TOML: plain ones, then tables and arrays of tables."""
    plain = {k: v for k, v in table.items() if not isinstance(v, (dict, list))}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in plain.items())
    for key, value in table.items():
        path = f"{name}.{key}" if name else key
        if isinstance(value, dict):
            text += f"\n[{path}]\n{toml(value, path)}"
        elif isinstance(value, list):
            text += "".join(f"\n[[{path}]]\n{toml(entry, path)}" for entry in value)
    return text
