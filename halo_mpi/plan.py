"""`python -m halo_mpi.plan`: who would compute what, why, and how long a token would take; under mpirun, or for a file of devices."""

import json
from pathlib import Path

import click

from halo_mpi.cli import run_command
from halo_mpi.engine.options import Size, default_run, threads_option
from halo_mpi.errors import UsageError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.choice import sizes_of
from halo_mpi.model.shapes import SHAPES
from halo_mpi.model.sizes import Sizes
from halo_mpi.schedule.devices import read_devices
from halo_mpi.store.encoding import DTYPES
from halo_mpi.schedule.shown import as_json, losses_as_json, print_plan
from halo_mpi.versions import version_option

EXAMPLES = """\b
Examples:
  launch/halo-mpirun -hostfile hostfiles/pis.txt python -m halo_mpi.plan --model models/smollm2-135m.halo
  halo-mpi plan --shape tinyllama --devices devices.json
"""


@click.command(epilog=EXAMPLES, short_help="Show who would compute what, why, and the predicted time per token.")
@click.option("--model", type=click.Path(path_type=Path), metavar="DIR", help="Folder made by `halo-mpi convert`.")
@click.option("--shape", type=click.Choice(list(SHAPES)), help="A known model's shape instead, whose weights are not needed.")
@click.option("--devices", "file", type=click.Path(path_type=Path), metavar="FILE",
              show_default="those that this runs on are measured", help="Plan for the devices of this JSON file, without MPI.")  # fmt: skip
@click.option("--dtype", type=click.Choice(DTYPES), show_default="the model's; of a shape, int4",
              help="With --devices: storage of the weights.")  # fmt: skip
@click.option("--context", type=click.IntRange(1), default=2048, show_default=True, metavar="C",
              help="Tokens that the KV cache must hold.")  # fmt: skip
@click.option("--memory", type=Size(), show_default="what is free",
              help="Most memory for weights and KV cache of one rank, e.g. 800M; what it does not hold is planned to be read from disk at "
                   "every token.")  # fmt: skip
@threads_option
@click.option("--json", "wanted", is_flag=True, help="Print one JSON object; its devices are a file for --devices.")
@click.option("--verbose", is_flag=True, help="Show a traceback if something fails.")
@version_option
@click.pass_obj
def plan(comm, model: Path | None, shape: str | None, file: Path | None, dtype: str | None, context: int, memory: int | None,
         threads: int | None, wanted: bool, verbose: bool) -> None:  # fmt: skip
    """Show who would compute what, why, and the time per token that strict mode would take.

    The devices are measured in about a second, or read from a file: {"devices": [{"name": "pi5", "speed": 8.0, "memory": "6G"}, {"name":
    "pi4", "count": 3, "speed": 3.0, "memory": "3G", "link_ms": 0.4, "mbit": 1000, "loss": 0.02}]}, the root first; speed in GB/s of weights
    that a matrix-vector product reads, link_ms an empty request and its answer, mbit of its line (the head is split only where that is
    known), loss of packets per direction. With "read_gbps", GB/s of weights that its disk gives, a device may get more than its memory
    holds.
    """
    from halo_mpi.schedule.advice import advise
    from halo_mpi.schedule.head import best_head, most_rows
    from halo_mpi.schedule.shares import Work

    def check() -> None:
        if (model is None) == (shape is None):
            raise UsageError("give either --model DIR or --shape NAME")
        if shape and not file:
            raise UsageError("--shape needs --devices FILE: what is measured are devices that have the model")
        if file and memory:
            raise UsageError("--memory is for devices that are measured; in the file, each has its own")
        if dtype and not file:
            raise UsageError("--dtype is for --devices; measured is what the model has")

    if file:
        check()
        sizes = sizes_of(SHAPES[shape], dtype or "int4") if shape else _sizes_of_model(model, dtype)
        config, context = sizes.config, min(context, sizes.config.context)
        cluster, work = read_devices(file, sizes, context), Work.of(sizes, context)
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
        click.echo(json.dumps(as_json(config, cluster, work, advice, head) | losses_as_json(cluster, work)))
    else:
        print_plan(config, cluster, work, advice, head)


def _sizes_of_model(model: Path, dtype: str | None) -> Sizes:
    from halo_mpi.model.loading import down_dtype
    from halo_mpi.store.reader import ModelStore

    store = ModelStore(model)
    stored = (dtype,) if dtype else (store.meta["dtype"], down_dtype(store))
    return sizes_of(ModelConfig.from_dict(store.meta["config"]), *stored)


if __name__ == "__main__":
    run_command(plan)
