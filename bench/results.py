"""What every benchmark writes: its raw runs, with all that is needed to judge and repeat them."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from bench.lab.system import LabError
from halo_mpi.errors import HaloError

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "mpi4py", "h5py")


def run_benchmark(command: click.Command) -> None:
    """Run a benchmark's command and exit; a failure is one line on standard error."""
    try:
        code = command.main(standalone_mode=False) or 0
    except click.exceptions.Abort:  # what click makes of Ctrl-C
        code, message = 130, "interrupted"
    except click.ClickException as error:
        code, message = error.exit_code, " ".join(error.format_message().split())
    except LabError as error:
        code, message = 2, str(error)
    except HaloError as error:
        code, message = error.exit_code, str(error)
    except OSError as error:
        code, message = 1, str(error)
    else:
        sys.exit(code)
    click.echo(f"bench: {message}", err=True)
    sys.exit(code)


def shared_options(*names: str, minutes: float = 28.0) -> Callable:
    """Those of the options that benchmarks have in common; `minutes`: the default of --minutes."""
    known = {
        "pace": click.option("--pace-ms", type=click.FloatRange(0), default=0.7, show_default=True,
                             help="Least time of a device for an even share of a sync."),
        "minutes": click.option("--minutes", type=click.FloatRange(0, min_open=True), default=minutes, show_default=True,
                                help="Time budget of all."),
        "seed": click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
                             help="Of what is drawn; the kernel's losses cannot be seeded, those of the lab's relay can."),
        "json": click.option("--json", "out", type=click.Path(path_type=Path), help="Write everything to this file."),
        "plot": click.option("--plot", "png", type=click.Path(path_type=Path), help="Draw the figure."),
    }  # fmt: skip

    def add(command: Callable) -> Callable:
        for name in reversed(names):
            command = known[name](command)
        return command

    return add


class Results:
    """One benchmark's result: settings and runs, written after every run, so that an end by force loses little."""

    def __init__(self, benchmark: str, path: Path | None, seed: int, **settings):
        self.path = path
        self.content = {
            "benchmark": benchmark,
            "schema": SCHEMA,
            "git": git_revision(),
            "command": command_line(),
            "date": now(),
            "seed": seed,
            "versions": versions(),
            "machine": {
                "cores": os.cpu_count(),
                "architecture": platform.machine(),
                "kernel": platform.release(),
                "cpu": cpu_name(),
            },
            "load_average": {"start": os.getloadavg(), "end": None},
            "settings": settings,
            "complete": False,
            "why_incomplete": "still running",
            "runs": [],
        }
        self.write()

    @property
    def runs(self) -> list[dict]:
        return self.content["runs"]

    def add(self, run: dict) -> None:
        self.runs.append(run)
        self.write()

    def finish(self, why_incomplete: str | None = None) -> None:
        """All is done, or it ends here for a reason."""
        self.content |= {"complete": why_incomplete is None, "why_incomplete": why_incomplete, "finished": now()}
        self.write()

    def write(self) -> None:
        """As JSON, one line per run."""
        if self.path is None:
            return
        self.content["load_average"]["end"] = os.getloadavg()
        head = json.dumps({key: value for key, value in self.content.items() if key != "runs"}, indent=1)
        runs = ",\n".join(json.dumps(run) for run in self.runs)
        text = f'{head[:-2]},\n "runs": [\n{runs}\n]}}\n'
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.path.with_name(self.path.name + ".new")
            fresh.write_text(text)
            fresh.replace(self.path)
        except OSError as error:
            raise click.ClickException(f"cannot write {self.path}: {error.strerror}") from None


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command_line() -> str:
    main = sys.modules["__main__"].__spec__
    name = f"python -m {main.name.removesuffix('.__main__')}" if main else Path(sys.argv[0]).name
    return f"{name} {shlex.join(sys.argv[1:])}".strip()


def versions() -> dict:
    """Of Python, the packages and MPI. Nothing is imported for it: MPI must not start in a benchmark's own process."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"mpi": first_line_of("mpirun", "--version")}


def git_revision() -> str | None:
    """Of the checkout, with a + if it was changed."""
    return first_line_of("git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")


def cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def first_line_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
