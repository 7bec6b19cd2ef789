"""A run of generate with faults, through halo-mpirun in a lab: what became of it, and what should have."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.cells import EXIT_TIMEOUT, LAB_S, outcome, toml
from halo_mpi.store.reader import RecordFile

HOSTS = 4
PROMPT = "Once upon a time, in a village by the sea, there lived an old dog"
EXACT = ("--wire", "f32", "--kernel", "reference")  # whose sums hardly depend on who computes what; compiled kernels round inputs to 8 bits
DONE, FAILED, LOST, TERMINATED = 0, 1, 3, 143
MENDED_BY = {"link-down": "link-up", "black-hole": "heal", "stop": "continue", "reboot": "boot"}
BANNER = re.compile(r"-{40,}\n.*?-{40,}\n", re.DOTALL)  # mpirun's, among the program's text
NO_WORDS = ("lab: ", " prompt tokens, ", "setpgid")  # of lines that tell the user nothing
FOR_GOOD = ("kill", "oom", "nan")
RESTARTS = ("kill-daemon", "reboot")  # the job begins again with all hosts that answer then
NOTICE_S = 2.0  # what happens so shortly before the end need not be noticed
RETURN_S = 4.0  # who is back so long before the end is at work again
GONE_S = 0.5  # who is away for less need not be noticed either


@dataclass(frozen=True, slots=True)
class Setting:
    """`options`: of generate, after all others."""

    model: Path
    tokens: int
    pace_ms: float
    mode: str = "strict"
    placement: str = "importance"
    options: tuple[str, ...] = ()
    prompt: str = PROMPT
    prompts: Path | None = None  # instead
    damaged: Path | None = None  # what pi3 has instead of the model


def play(setting: Setting, events: list[dict], timeout_s: float, seed: int = 0) -> dict:
    """Like `outcome`, and `text`: what was written; `said`: the last line for the user, or None."""
    with tempfile.TemporaryDirectory(prefix="halo-bench-") as name:
        folder = Path(name)
        scenario = {"hosts": HOSTS, "pace_ms": setting.pace_ms, "event": events}
        (folder / "scenario.toml").write_text(toml(scenario))
        lab = ["-m", "bench.lab", "run", folder / "scenario.toml", "--launcher", "halo-mpirun", "--marks"]
        lab += ["--record", folder / "report.lab.json", "--timeout", timeout_s, "--seed", seed]
        run = outcome([sys.executable, *lab, "--", *program(setting, folder)], folder, timeout_s + LAB_S)
        text, errors = ((folder / name).read_bytes().decode(errors="replace") for name in ("stdout", "stderr"))
    if run["status"] == "timeout":
        run["error"] = f"not done after {timeout_s:.0f} s"
    if run["lab"]:
        run["lab"] |= {"links": None, "costs": None}
    return run | {"text": BANNER.sub("", text), "said": last_words(errors)}


def program(setting: Setting, folder: Path) -> list:
    source = ["--prompts", setting.prompts] if setting.prompts else ["--prompt", setting.prompt]
    options = ["--placement", setting.placement, "--sync", setting.mode, *EXACT, "--ignore-eos"]
    options += [*source, "--max-tokens", setting.tokens, "--json", folder / "report.json", "--checkpoint", folder / "checkpoint"]
    python = ["python", "-m", "halo_mpi.generate", *options, *setting.options]
    if setting.damaged is None:
        return [*python, "--model", setting.model]
    choose = 'if [ "$(hostname)" = pi3 ]; then model=$1; else model=$2; fi; shift 2; exec "$@" --model "$model"'
    return ["sh", "-c", choose, "sh", setting.damaged, setting.model, *python]


def last_words(errors: str) -> str | None:
    """The last line that the program or its launcher said, but for the summary at the end of a run."""
    lines = [line.strip("\0 ") for line in errors.splitlines()]
    lines = [line for line in lines if line.strip("-") and not any(word in line for word in NO_WORDS)]
    own = [line for line in lines if line.startswith(("halo-mpi: ", "halo-mpirun: "))]
    return (own or lines or [None])[-1]


def expected_codes(log: list[dict], lasted_s: float | None) -> set[int]:
    """The exit codes that are right after these events of a lab's log; `lasted_s`: the generation, None if it never came to its end."""
    done, end = [entry for entry in log if "failed" not in entry], lasted_s or float("inf")
    actions = {entry["action"] for entry in done}
    if "terminate" in actions:
        return {TERMINATED}
    if any(entry["host"] == "pi1" and entry["action"] in ("kill", "oom", "kill-daemon") for entry in done):
        return {DONE, FAILED, LOST}  # FAILED, or as a restart ends
    codes = {DONE}
    for number, entry in enumerate(done):
        codes = worse(codes, codes_after(entry, done[:number], done[number + 1 :], end))
    return {DONE, LOST} if codes == {LOST} and actions & set(RESTARTS) else codes


def codes_after(entry: dict, earlier: list[dict], later: list[dict], end: float) -> set[int]:
    action, began = entry["action"], entry["t_s"]
    if action == "nan" and any(other["host"] == entry["host"] and other["action"] in MENDED_BY for other in earlier):
        return {DONE, LOST}  # it may have no work any more
    if action in RESTARTS:
        return {DONE, LOST}
    if action not in FOR_GOOD and action not in MENDED_BY:
        return {DONE}
    mends = (other["t_s"] for other in later if (other["host"], other["action"]) == (entry["host"], MENDED_BY.get(action)))
    back = next(mends, float("inf"))
    if back - began < GONE_S or back + RETURN_S < end < float("inf"):
        return {DONE}
    return {LOST} if back == float("inf") and began + NOTICE_S < end else {DONE, LOST}


def worse(one: set[int], other: set[int]) -> set[int]:
    """Of two faults in one run."""
    return {max(a, b) for a in one for b in other}


def text_of(run: dict, undisturbed: dict) -> str:
    """Whether a run's text is the undisturbed one's: same, beginning (of it), none, or from where on it differs."""
    found, wanted = run["text"].rstrip("\n"), undisturbed["text"].rstrip("\n")
    if run["report"]:
        ids, right = run["report"]["token_ids"], undisturbed["report"]["token_ids"]
        differing = next((place for place, (one, other) in enumerate(zip(ids, right)) if one != other), None)
        if differing is not None:
            return f"differs from token {differing + 1} on"
        if len(ids) == len(right):
            return "same" if found == wanted or not run["text"] else "same ids, shown otherwise"
    if not found.strip("\ufffd"):
        return "none"
    if found == wanted:
        return "same"
    return "beginning" if wanted.startswith(found.rstrip("\ufffd")) else "differs"


def complaints(run: dict, undisturbed: dict, codes: set[int], relaxed: bool = False) -> list[str]:
    """What is wrong about how a run ended."""
    if run["exit_code"] == EXIT_TIMEOUT:
        return [run["error"]]
    found, code, text = [], run["exit_code"], text_of(run, undisturbed)
    if code not in codes:
        found.append(f"exit code {code} instead of {told(codes)}")
    whole = code in (DONE, LOST)
    if not relaxed and text not in (("same",) if whole else ("same", "beginning", "none")):
        found.append(f"text: {text}")
    if relaxed and whole and (run["report"] or {}).get("generated_tokens") != undisturbed["report"]["generated_tokens"]:
        found.append("fewer tokens than asked for")
    if code == FAILED and not run["said"]:
        found.append("it failed without a word")
    if run["lab"] is None:
        found.append("the lab left no record")
    elif run["lab"]["orphans"]:
        found.append(f"{len(run['lab']['orphans'])} processes left")
    return found


def judged(run: dict, undisturbed: dict, codes: set[int], wrong: list[str]) -> dict:
    """The run, with what is to be said of it."""
    status = "ok" if not wrong else "hang" if run["status"] == "timeout" else "wrong"
    return run | {
        "status": status,
        "error": "; ".join(wrong) or None,
        "expected": sorted(codes),
        "ids": text_of(run, undisturbed),
    }


def told(codes: set[int]) -> str:
    return " or ".join(map(str, sorted(codes)))


def lasted_s(run: dict) -> float | None:
    """Seconds from the begin of the generation to its end, if it came to it."""
    times = (run["lab"] or {}).get("generation_s") or {"begin": None, "end": None}
    return None if times["end"] is None else times["end"] - times["begin"]


@contextmanager
def full_disk() -> Iterator[Path]:
    """A folder on a disk without a free byte."""
    with tempfile.TemporaryDirectory(prefix="halo-bench-") as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", name], check=True)
        try:
            with open(Path(name) / "full", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


@contextmanager
def damaged_copy(model: Path) -> Iterator[Path]:
    """The same model with a wrong byte in every head and group."""
    with tempfile.TemporaryDirectory(prefix="halo-bench-") as name:
        copy = Path(shutil.copytree(model, Path(name) / model.name))
        for shard in copy.glob("shard-*.h5"):
            tables = RecordFile(shard).tables.values()
            with open(shard, "r+b") as raw:
                for offset in np.concatenate([table.offsets.ravel() for table in tables]).tolist():
                    raw.seek(offset + 40)
                    byte = raw.read(1)
                    raw.seek(offset + 40)
                    raw.write(bytes([byte[0] ^ 1]))
        yield copy


def prompts_file(folder: Path) -> Path:
    (folder / "prompts.jsonl").write_text(json.dumps({"id": 1, "prompt": PROMPT}) + "\n")
    return folder / "prompts.jsonl"
