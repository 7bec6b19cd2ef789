"""Where a program's wall time goes, without touching it: python bench/ticks.py FILE.json MODULE [ARGUMENT ...]

Runs `python -m MODULE ARGUMENT ...` in this process, and interrupts it by a timer. Every tick is counted for the innermost function of
halo_mpi that is on the stack: what it calls outside (NumPy, kernels, MPI) counts as its own. Python runs the handler when the call
into C that the tick has met returns, so a tick is counted where the time was spent; while the process waits for a core, none
is, so that ticks x interval tells little of the machine's load. Each rank of MPI writes a file of its own,
FILE.0.json, FILE.1.json ...: {"interval_ms", "ticks": {"prefill" | "decode": {"engine/root.py:_sync": n, ...}}}.

A worker's ticks are all under decode: measure with a prompt of one token.
"""

import ctypes
import json
import os
import runpy
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

INTERVAL_S = 0.97e-3  # out of step with every period of the program
PACKAGE = f"{os.sep}halo_mpi{os.sep}"
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
PARTS = {  # the first prefix that fits
    "sampling, text": ("engine/sampling", "engine/text", "engine/shown", "engine/checkpoint", "model/tokenizer", "generate"),
    "predictor": ("engine/predictor", "predict/"),
    "products": ("model/", "kernels/", "engine/vocabulary"),
    "waiting": ("wire/polling", "waiting:"),
    "wire": ("wire/",),
    "glue": ("",),
}
PHASES = {
    ("engine/root.py", "prefill"): "prefill",
    ("engine/root.py", "step"): "decode",  # of older checkouts
    ("engine/root.py", "steps"): "decode",
    ("engine/worker.py", "run"): "decode",
    ("engine/session.py", "finish"): "start",
}
RECEIVING = {"poll", "next", "wait"}  # of the links: what they do while nothing has come cannot be told from what they do when it has


class Ticks:
    """Counts by phase and place."""

    def __init__(self):
        self.counts: dict[str, Counter] = {"start": Counter(), "prefill": Counter(), "decode": Counter()}
        self.phase = "start"
        self._known: dict[int, tuple[CodeType, tuple[str, bool, str | None] | None]] = {}  # by id: hashing code is slow
        self._counting = False

    def tick(self, signum: int, frame: FrameType | None) -> None:
        if self._counting:  # a tick within a tick, on a busy machine
            return
        self._counting, place, receiving = True, None, False
        while frame is not None:
            code = frame.f_code
            if id(code) not in self._known:
                self._known[id(code)] = code, what_is(code)
            if known := self._known[id(code)][1]:
                place = place or known[0]
                receiving = receiving or known[1]
                self.phase = known[2] or self.phase
            frame = frame.f_back
        if place:
            self.counts[self.phase]["waiting:" + place if receiving else place] += 1
        self._counting = False


def what_is(code: CodeType) -> tuple[str, bool, str | None] | None:
    """Place, whether it receives messages, and the phase that it tells; None outside halo_mpi."""
    _, found, path = code.co_filename.rpartition(PACKAGE)
    if not found:
        return None
    receives = path.startswith("wire/") and code.co_name in RECEIVING
    return f"{path}:{code.co_name}", receives, phase_of(path, code.co_name)


def phase_of(path: str, function: str) -> str | None:
    """What begins or goes on where this function is on the stack."""
    return PHASES.get((path, function))


def part_of(place: str) -> str:
    return next(part for part, prefixes in PARTS.items() if place.startswith(prefixes))


def parts_of(places: dict[str, float]) -> dict[str, float]:
    """What the parts take together, in the unit of the places."""
    parts = dict.fromkeys(PARTS, 0.0)
    for place, taken in places.items():
        parts[part_of(place)] += taken
    return parts


def shown_parts(parts: dict[str, float]) -> str:
    """In ms and as shares of their sum."""
    total = sum(parts.values())
    return ", ".join(f"{part} {ms:.2f} ms ({ms / total:.0%})" for part, ms in parts.items() if ms)


def read_ticks(file: Path, ranks: int, tokens: int) -> list[dict[str, float]]:
    """By rank, ms per decoded token of each place, the longest first, from what `main` wrote for FILE."""
    found = [json.loads(of_rank(file, rank).read_text()) for rank in range(ranks)]
    return [{place: n * each["interval_ms"] / tokens for place, n in each["ticks"]["decode"].items()} for each in found]


def of_rank(file: Path, rank: int) -> Path:
    return file.with_suffix(f".{rank}.json")


class Event(ctypes.Structure):
    """struct sigevent of Linux."""

    _fields_ = [("value", ctypes.c_void_p), ("signal", ctypes.c_int), ("notify", ctypes.c_int), ("rest", ctypes.c_byte * 48)]


def start_timer(interval_s: float, number: int) -> None:
    """Send this process a signal at each interval. A timer of its own, since the program uses the alarm. Raises OSError."""
    libc, timer, begun = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p(), ctypes.c_long(round(interval_s * 1e9))
    event = Event(signal=number)
    times = (ctypes.c_long * 4)(0, begun, 0, begun)  # seconds and nanoseconds: between two ticks, to the first
    failed = libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer))
    if failed or libc.timer_settime(timer, 0, ctypes.byref(times), None):
        raise OSError(ctypes.get_errno(), "no timer")


def main() -> None:
    file, module, *arguments = sys.argv[1:]
    folder = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != folder]
    sys.argv = [module, *arguments]
    ticks, begin = Ticks(), time.time()
    signal.signal(signal.SIGRTMIN, ticks.tick)
    signal.siginterrupt(signal.SIGRTMIN, False)
    start_timer(INTERVAL_S, signal.SIGRTMIN)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        signal.signal(signal.SIGRTMIN, signal.SIG_IGN)
        rank = next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)
        counts = {phase: dict(found.most_common()) for phase, found in ticks.counts.items() if phase != "start"}
        content = {"interval_ms": INTERVAL_S * 1e3, "wall_s": round(time.time() - begin, 3), "ticks": counts}
        of_rank(Path(file), rank).write_text(json.dumps(content))


if __name__ == "__main__":
    main()
