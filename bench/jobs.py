"""A scaling sweep as batch jobs: one TOML of nodes x ranks per node x model x mode becomes a job script each, and their reports a table.

A sweep, as in bench/sweeps/scaling.toml:

\b
    system = "slurm"                  # or "pbs"
    time = "00:20:00"                 # of a job
    models = ["models/smollm2-135m.halo"]
    nodes = [1, 2, 4, 8]
    ranks_per_node = [1]
    cores_per_rank = 4
    prompt = "Once upon a time"
    tokens = 128
    [modes]                           # options of generate, by name
    strict = ["--sync", "strict"]
    relaxed = ["--sync", "relaxed"]
"""

import json
import shlex
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path

import click

from bench.lab.scenario import tomllib
from bench.tables import Table, number

SUBMIT = {"slurm": "sbatch", "pbs": "qsub"}
SLURM = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={ranks}
#SBATCH --cpus-per-task={cores}
#SBATCH --time={time}
#SBATCH --output={log}
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source launch/batch.sh
take_slurm_hosts
run_in_time {command}
"""
PBS = """#!/usr/bin/env bash
#PBS -N {name}
#PBS -l select={nodes}:ncpus={all_cores}:mpiprocs={ranks}
#PBS -l walltime={time}
#PBS -j oe
#PBS -o {log}
set -euo pipefail
cd "$PBS_O_WORKDIR"
source launch/batch.sh
take_hosts <"$PBS_NODEFILE"
run_in_time {command}
"""
SCRIPT = {"slurm": SLURM, "pbs": PBS}


@dataclass(frozen=True, slots=True)
class Sweep:
    """What the TOML file says. Raises click.UsageError for what it cannot be."""

    system: str
    models: list[str]
    nodes: list[int]
    modes: dict[str, list[str]]
    ranks_per_node: list[int] = field(default_factory=lambda: [1])
    cores_per_rank: int = 1
    time: str = "01:00:00"
    prompt: str = "Once upon a time"
    tokens: int = 128

    def __post_init__(self):
        def check(condition: bool, rule: str) -> None:
            if not condition:
                raise click.UsageError(rule)

        def are(values: object, kind: type) -> bool:
            return isinstance(values, list) and bool(values) and all(type(value) is kind for value in values)

        check(self.system in SUBMIT, f"system must be one of {', '.join(SUBMIT)}")
        check(are(self.models, str), "models must be a list of folders")
        for name in ("nodes", "ranks_per_node"):
            values = getattr(self, name)
            check(are(values, int) and min(values) > 0, f"{name} must be a list of whole numbers above 0")
        check(isinstance(self.modes, dict) and bool(self.modes) and all(isinstance(mode, list) for mode in self.modes.values()),
              "modes must be a table of lists of generate's options")  # fmt: skip
        check(all(type(value) is int and value > 0 for value in (self.cores_per_rank, self.tokens)),
              "cores_per_rank and tokens must be whole numbers above 0")  # fmt: skip


def read_sweep(file: Path) -> Sweep:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
        unknown = content.keys() - {each.name for each in fields(Sweep)}
        if unknown:
            raise click.UsageError(f"unknown: {', '.join(sorted(unknown))}")
        return Sweep(**content)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as error:
        raise click.UsageError(f"{file}: {str(error).replace('Sweep.__init__() ', '')}") from None
    except click.UsageError as error:
        raise click.UsageError(f"{file}: {error.message}") from None


def scripts(sweep: Sweep, folder: Path) -> dict[str, str]:
    """Job scripts by name."""
    found = {}
    for model, mode, nodes, ranks in product(sweep.models, sweep.modes, sweep.nodes, sweep.ranks_per_node):
        name = f"{Path(model).stem}-{mode}-{nodes}x{ranks}"
        words = ["python", "-m", "halo_mpi.generate", "--model", model, "--prompt", sweep.prompt, "--max-tokens", sweep.tokens,
                 "--ignore-eos", "--lookup", 0, "--threads", sweep.cores_per_rank, "--json", folder / f"{name}.json",
                 *sweep.modes[mode]]  # fmt: skip
        found[name] = SCRIPT[sweep.system].format(
            name=name, nodes=nodes, ranks=ranks, cores=sweep.cores_per_rank, all_cores=ranks * sweep.cores_per_rank, time=sweep.time,
            log=folder / f"{name}.log", command=shlex.join(map(str, words)),
        )  # fmt: skip
    return found


def table(folder: Path) -> Table:
    """The reports in the folder: strong scaling by model and mode, against the fewest ranks of the same."""
    reports = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    drawn = Table(f"Jobs of {folder}", ["model", "mode", "nodes x ranks", "ranks", "TPOT p50, ms", "p95", "speed-up", "efficiency"], texts=3)
    rows = [(*name.rsplit("-", 2), report) for name, report in reports.items()]
    rows.sort(key=lambda row: (row[0], row[1], row[3]["ranks"]))
    first: dict[tuple[str, str], dict] = {}
    for model, mode, places, report in rows:
        base, times = first.setdefault((model, mode), report), report["tpot_ms"]
        faster = base["tpot_ms"]["p50"] / times["p50"]
        efficiency = faster * base["ranks"] / report["ranks"]
        drawn.rows.append([model, mode, places, str(report["ranks"]), number(times["p50"]), number(times["p95"]), number(faster), f"{efficiency:.0%}"])
    missing = sorted({path.stem for path in folder.glob("*.job")} - reports.keys())
    drawn.notes = [f"No report yet, or it failed: {name} (see {folder / name}.log)" for name in missing]
    return drawn


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command(help="Write a script per job, and submit.sh, into FOLDER.")
@click.argument("sweep_toml", metavar="SWEEP.toml", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def write(sweep_toml: Path, folder: Path) -> None:
    sweep = read_sweep(sweep_toml)
    folder.mkdir(parents=True, exist_ok=True)
    made = scripts(sweep, folder)
    for name, text in made.items():
        (folder / f"{name}.job").write_text(text)
    lines = [f"{SUBMIT[sweep.system]} {shlex.quote(str(folder / f'{name}.job'))}\n" for name in made]
    (folder / "submit.sh").write_text("#!/usr/bin/env bash\nset -e\n" + "".join(lines))
    click.echo(f"{len(made)} jobs; start them from halo_mpi's folder: bash {folder / 'submit.sh'}; then: python -m bench.jobs table {folder}")


@main.command(name="table", help="The reports that the jobs of FOLDER wrote.")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def show(folder: Path) -> None:
    table(folder).print()


if __name__ == "__main__":
    main()
