"""What more boards would bring, by the cost model: python -m bench.boards [--shapes NAME,...] [--losses 0,2,5] [--json FILE]

`plan --profile --sweep` for known shapes and boards, in one table. All of it is simulated; `bench.validation` and `bench.published` tell
how far that can be trusted.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from bench.modes import Names, Numbers
from bench.results import Results, run_benchmark, shared_options
from bench.tables import Table, number
from halo_mpi.figures import figure, require_matplotlib
from halo_mpi.model.kernels.choice import sizes_of
from halo_mpi.model.shapes import SHAPES
from halo_mpi.schedule.profiles import PROFILES
from halo_mpi.schedule.sweep import sweep

CONTEXT = 2048
COUNTS = "1,2,4,8,16,32,64,128,256"
STYLES = ("-", "--", ":", "-.")
NO_PARTS = dict.fromkeys(("compute_ms", "wire_ms", "wait_ms", "head_ms"))


def table(content: dict) -> Table:
    columns = ["shape", "boards of", "loss", "boards", "with work", "ms per token", "computing", "wire", "lost packets", "vocabulary",
               "efficiency", "head split"]  # fmt: skip
    drawn = Table("SIMULATED, not measured: time per token on more and more boards", columns, texts=2)
    for (shape, profile, _), points in by_line(content):
        drawn.ruled.add(len(drawn.rows))
        for point in points:
            parts = point["parts"] or NO_PARTS
            efficiency = f"{point['efficiency']:.0%}" if point["efficiency"] else "-"
            drawn.rows.append([
                shape, profile, f"{point['loss']:.0%}", str(point["count"]), str(point["working"]) if point["tpot_ms"] else "does not fit",
                number(point["tpot_ms"]), *map(number, parts.values()), efficiency, number(point["split_tpot_ms"]),
            ])  # fmt: skip
    drawn.notes = [f"{profile}: {said}" for profile, said in content["settings"]["figures"].items()]
    return drawn


def by_line(content: dict) -> Iterator[tuple[tuple, list[dict]]]:
    """Points by shape, profile and loss."""
    keys = dict.fromkeys((point["shape"], point["profile"], point["loss"]) for point in content["runs"])
    for key in keys:
        yield key, [point for point in content["runs"] if (point["shape"], point["profile"], point["loss"]) == key]


def plot(content: dict, path: Path) -> None:
    """A panel per shape: time per token against boards, a colour per profile and a line style per loss rate."""
    shapes, profiles, losses = (list(dict.fromkeys(point[name] for point in content["runs"])) for name in ("shape", "profile", "loss"))
    with figure(path, len(shapes), 4.5) as panels:
        for panel, shape in zip(panels, shapes):
            for (of, profile, loss), points in by_line(content):
                held = [(point["count"], point["tpot_ms"]) for point in points if point["tpot_ms"]]
                if of == shape and held:
                    style = {"color": f"C{profiles.index(profile)}", "linestyle": STYLES[losses.index(loss) % len(STYLES)]}
                    panel.plot(*zip(*held), marker="o", markersize=3, label=f"{profile}, {loss:.0%} lost", **style)
            panel.set(title=f"{shape}, simulated", xlabel="boards", ylabel="ms per token", ylim=(0, None))
            panel.set_xscale("log", base=2)
            panel.grid(alpha=0.3)
        panels[-1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.02, 0.5))


@click.command(help=__doc__)
@click.option("--shapes", type=Names(SHAPES), default="llama-2-7b,llama-2-13b,llama-2-70b", show_default=True)
@click.option("--profiles", type=Names(PROFILES), default=",".join(PROFILES), show_default=True)
@click.option("--counts", type=Numbers(int, 1, 4096), default=COUNTS, show_default=True)
@click.option("--losses", type=Numbers(float, 0, 100), default="0", show_default=True, help="Per cent of packets, per direction.")
@shared_options("json", "plot")
def main(shapes, profiles, counts, losses, out, png) -> int:
    require_matplotlib(png)
    said = {name: "; ".join(f"{key} {figure.value:g}" for key, figure in PROFILES[name].figures.items()) for name in profiles}
    results = Results("boards", out, 0, dtype="int4", context=CONTEXT, figures=said)
    for shape in shapes:
        for name in profiles:
            shares = [loss / 100 for loss in losses]
            for point in sweep(PROFILES[name], counts, shares, sizes_of(SHAPES[shape], "int4"), CONTEXT):
                results.runs.append({"shape": shape, "profile": name, **asdict(point)})
    results.finish()
    table(results.content).print()
    if png:
        plot(results.content, png)
    return 0


if __name__ == "__main__":
    run_benchmark(main)
