"""What a calibration found, for people: a table, and a heat map of the importance."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from halo_mpi.figures import figure
from halo_mpi.model.config import ModelConfig
from halo_mpi.predict.stored import KINDS, TABLES
from halo_mpi.store.reader import ModelStore


def stored_bytes(store: ModelStore) -> dict[str, int]:
    """Bytes of each of the calibration's tables."""
    tables = {name: store.model.tables[name] for name in TABLES}
    return {name: table.layout.nbytes * table.crc32.size for name, table in tables.items()}


def print_calibration(console: Console, found: dict, config: ModelConfig, sizes: dict[str, int], model_bytes: int) -> None:
    """One line per layer, and what all of it takes."""
    quarter = max(1, config.groups // 4)
    both, cost = "groups,\nheads", found["sensitivity"]
    table = Table(title=f"calibrated on {found['tokens']} tokens of {', '.join(found['texts'])}")
    for column in (
        "layer",
        "first\nquarter",
        f"rank corr.\n{both}",
        f"recall\n{both}",
        f"explained\n{both}",
        "cost\nattn.,\nFFN",
    ):
        table.add_column(column, justify="right", no_wrap=True)

    def pair(name: str, layer: int) -> str:
        return ", ".join(f"{np.mean(found[kind][name][layer]):.2f}" for kind in KINDS)

    layers = range(len(found["groups"]["importance"]))
    for layer in layers:
        table.add_row(
            str(layer),
            f"{sum(sorted(found['groups']['importance'][layer])[-quarter:]):.0%}",
            *(pair(name, layer) for name in ("correlation", "recall", "recovered")),
            ", ".join(f"{value:+.3f}" for value in cost[layer]) if cost else "-",
        )
    table.add_section()
    means = [", ".join(f"{_mean(found[kind][name]):.2f}" for kind in KINDS) for name in ("correlation", "recall", "recovered")]
    table.add_row("mean", "", *means, "")
    console.print(table)
    console.print(
        "first quarter: its groups' part of the layer's |output|. Held out: rank correlation of predicted with actual |output|; recall of "
        "the least important quarter; part of |output|^2 that an estimate explains. cost: nats per token if a fifth is missing."
    )
    share = {name: f"{size / 1e6:.1f} MB ({size / model_bytes:.1%})" for name, size in sizes.items()}
    console.print(
        f"estimates of rank {found['rank']}: groups {share['group_estimate']}, heads {share['head_estimate']}; importance "
        f"{share['importance']} of the files here"
    )


def plot_calibration(found: dict, path: Path) -> None:
    """Importance by layer, of groups and heads, and what is lost without a part of each layer."""
    panels = 3 if found["sensitivity"] else 2
    with figure(path, panels, 5.2) as axes:
        for axis, kind in zip(axes, KINDS):
            image = axis.imshow(np.array(found[kind]["importance"]), aspect="auto", cmap="magma", interpolation="nearest")
            axis.set(title=f"importance of {kind}: share of a layer's |output|", xlabel=kind[:-1], ylabel="layer")
            axis.figure.colorbar(image, ax=axis)
        if found["sensitivity"]:
            cost = np.array(found["sensitivity"])
            for column, name in enumerate(("attention", "FFN")):
                axes[2].plot(cost[:, column], range(len(cost)), "o-", label=name)
            axes[2].invert_yaxis()
            axes[2].set(title="loss if a fifth of a layer is missing", xlabel="nats per token", xscale="symlog", ylabel="layer")
            axes[2].legend()


def _mean(rows: list) -> float:
    return float(np.mean([np.mean(row) for row in rows]))
