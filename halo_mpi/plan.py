"""`python -m halo_mpi.plan`: who would compute what, why, and how long a token would take; under mpirun, or for a file of devices."""

import json
from pathlib import Path

import click

from halo_mpi.cli import run_command
from halo_mpi.engine.options import SIZES_BY_RANK, Several, default_run, of_rank, threads_option
from halo_mpi.errors import UsageError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.choice import sizes_of
from halo_mpi.model.shapes import SHAPES
from halo_mpi.model.sizes import Sizes
from halo_mpi.schedule.devices import MOST_DEVICES, read_devices
from halo_mpi.schedule.head import best_head, most_rows
from halo_mpi.schedule.profiles import PROFILES, simulated
from halo_mpi.schedule.shown import as_json, losses_as_json, print_plan
from halo_mpi.schedule.sweep import as_said, figure_lines, print_sweep, sweep_as_json
from halo_mpi.schedule.sweep import sweep as sweep_of
from halo_mpi.schedule.work import Work
from halo_mpi.store.encoding import DTYPES
from halo_mpi.versions import version_option

EXAMPLES = """\b
Examples:
  launch/halo-mpirun -hostfile hostfiles/pis.txt python -m halo_mpi.plan --model models/smollm2-135m.halo
  halo-mpi plan --shape tinyllama --devices devices.json
  halo-mpi plan --shape llama-2-70b --profile pi5 --sweep 8,16,64,256 --loss 0.02
"""
BOARDS = click.IntRange(1, MOST_DEVICES)
MOST_LOSS = 0.2  # repairs are lost too then, which the cost model does not count


@click.command(epilog=EXAMPLES, short_help="Show who would compute what, why, and the predicted time per token.")
@click.option("--model", type=click.Path(path_type=Path), metavar="DIR", help="Folder made by `halo-mpi convert`.")
@click.option("--shape", type=click.Choice(list(SHAPES)), help="A known model's shape instead, whose weights are not needed.")
@click.option("--devices", "file", type=click.Path(path_type=Path), metavar="FILE",
              show_default="those that this runs on are measured", help="Plan for the devices of this JSON file, without MPI.")  # fmt: skip
@click.option("--profile", type=click.Choice(list(PROFILES)),
              help="Simulate boards of this kind instead, from figures that others published.")  # fmt: skip
@click.option("--count", type=BOARDS, metavar="N", help="With --profile: so many boards.")
@click.option("--sweep", type=Several(BOARDS, "N,..."), help="With --profile: a table over numbers of boards, e.g. 8,16,64,256.")
@click.option("--mbit", type=click.FloatRange(0, min_open=True), metavar="MBIT", show_default="as published",
              help="With --profile: of a board's line.")  # fmt: skip
@click.option("--loss", type=Several(click.FloatRange(0, MOST_LOSS), "N,..."), default="0", show_default=True,
              help="With --profile: of packets, per direction, e.g. 0.02; with --sweep also 0,0.02,0.05.")  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), show_default="the model's; of a shape, int4",
              help="With --devices or --profile: storage of the weights.")  # fmt: skip
@click.option("--context", type=click.IntRange(1), default=2048, show_default=True, metavar="C",
              help="Tokens that the KV cache must hold.")  # fmt: skip
@click.option("--memory", type=SIZES_BY_RANK, show_default="what is free; with --profile as published",
              help="Most memory for weights and KV cache of one rank, e.g. 800M, or 2G,800M: of rank 0, and of each other; what it does not "
                   "hold is planned to be read from disk at every token. With --profile one size, which must hold all.")  # fmt: skip
@threads_option
@click.option("--json", "wanted", is_flag=True, help="Print one JSON object; its devices are a file for --devices.")
@click.option("--verbose", is_flag=True, help="Show a traceback if something fails.")
@version_option
@click.pass_obj
def plan(comm, model: Path | None, shape: str | None, file: Path | None, profile: str | None, count: int | None,
         sweep: tuple[int, ...] | None, mbit: float | None, loss: tuple[float, ...], dtype: str | None, context: int,
         memory: tuple[int, ...] | None, threads: int | None, wanted: bool, verbose: bool) -> None:  # fmt: skip
    """Show who would compute what, why, and the time per token that strict mode would take.

    The devices are measured in about a second, or read from a file: {"devices": [{"name": "pi5", "speed": 8.0, "memory": "6G"}, {"name":
    "pi4", "count": 3, "speed": 3.0, "memory": "3G", "link_ms": 0.4, "mbit": 1000, "loss": 0.02}]}, the root first; speed in GB/s of weights
    that a matrix-vector product reads, link_ms an empty request and its answer, mbit of its line (the head is split only where that is
    known), loss of packets per direction. With "read_gbps", GB/s of weights that its disk gives, a device may get more than its memory
    holds. With --profile nothing is measured: what it tells is a simulation.
    """
    from halo_mpi.schedule.advice import advise

    def check() -> None:
        if (model is None) == (shape is None):
            raise UsageError("give either --model DIR or --shape NAME")
        if file and profile:
            raise UsageError("give either --devices FILE or --profile NAME")
        if profile and (count is None) == (sweep is None):
            raise UsageError("--profile needs either --count N or --sweep N,...")
        if not profile and (count or sweep or mbit or any(loss)):
            raise UsageError("--count, --sweep, --mbit and --loss are for --profile")
        if profile and memory and len(memory) > 1:
            raise UsageError("--memory: all boards of a --profile are alike; give one size")
        if count and len(loss) > 1:
            raise UsageError("several values of --loss are for --sweep")
        if shape and not file and not profile:
            raise UsageError("--shape needs --devices FILE or --profile NAME: what is measured are devices that have the model")
        if file and memory:
            raise UsageError("--memory is for devices that are measured, or of a --profile; in the file, each has its own")
        if dtype and not file and not profile:
            raise UsageError("--dtype is for --devices and --profile; measured is what the model has")

    if file or profile:
        check()
        sizes = sizes_of(SHAPES[shape], dtype or "int4") if shape else _sizes_of_model(model, dtype)
        context = min(context, sizes.config.context)
        if sweep:
            points = list(sweep_of(PROFILES[profile], sweep, loss, sizes, context, mbit=mbit, memory=of_rank(memory, 0)))
            if wanted:
                click.echo(json.dumps(sweep_as_json(profile, PROFILES[profile], sizes, points)))
            else:
                print_sweep(profile, PROFILES[profile], sizes, points)
            return
        config, work = sizes.config, Work.of(sizes, context)
        if profile:
            cluster = simulated(PROFILES[profile], count, sizes, context, mbit, loss[0], of_rank(memory, 0))
        else:
            cluster = read_devices(file, sizes, context)
        advice = advise(cluster, work, calibrated=False)
    else:
        from halo_mpi.engine.agreement import together
        from halo_mpi.engine.planning import measure
        from halo_mpi.engine.session import Session

        together(comm, check, verbose)
        session = Session(comm, default_run(model, memory, threads, verbose))
        session.connect()
        cluster = measure(session)
        session.disconnect()
        config = session.config
        work = Work.of(session.kernel.sizes, min(context, config.context))
        advice = session.on_root(lambda: advise(cluster, work, bool(session.store.meta.get("calibration"))))
        if not session.is_root:
            return
    head = best_head(cluster, work, advice.shares, most_rows(config.hidden))
    if wanted:
        told = as_json(config, cluster, work, advice, head) | losses_as_json(cluster, work)
        click.echo(json.dumps(told | ({"simulated": as_said(profile, PROFILES[profile])} if profile else {})))
        return
    if profile:
        click.echo(f"SIMULATED, not measured: {count} boards of profile {profile}.")
    print_plan(config, cluster, work, advice, head)
    if profile:
        click.echo("\n".join(figure_lines(PROFILES[profile])))


def _sizes_of_model(model: Path, dtype: str | None) -> Sizes:
    from halo_mpi.model.loading import down_dtype
    from halo_mpi.store.reader import ModelStore

    store = ModelStore(model)
    stored = (dtype,) if dtype else (store.meta["dtype"], down_dtype(store))
    return sizes_of(ModelConfig.from_dict(store.meta["config"]), *stored)


if __name__ == "__main__":
    run_command(plan)
