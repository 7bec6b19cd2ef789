"""`halo-mpi inspect`: what is in a `.halo` folder, and whether it is intact."""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halo_mpi.cli import run_command
from halo_mpi.errors import DamagedFileError, UsageError
from halo_mpi.figures import require_matplotlib
from halo_mpi.model.config import ModelConfig
from halo_mpi.predict.shown import plot_calibration, print_calibration, stored_bytes
from halo_mpi.progress import progress
from halo_mpi.store.reader import ModelStore, RecordFile
from halo_mpi.versions import version_option


EXAMPLES = """\b
Examples:
  halo-mpi inspect models/smollm2-135m.halo --verify
  halo-mpi inspect models/smollm2-135m.halo --plot importance.png
"""


@click.command(epilog=EXAMPLES, short_help="Show what is in a .halo folder, and whether it is intact.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read everything and check every checksum.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE",
              help="Draw what calibration found: a heat map of the importance, a PNG.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--verbose", is_flag=True, help="Show a traceback if something fails.")
@version_option
def inspect(model: Path, verify: bool, plot: Path | None, as_json: bool, verbose: bool) -> None:
    """Show the shape, storage, sizes and digests of MODEL, a .halo folder, and of those of its shards that are here.

    Of a calibrated model also what calibration found, layer by layer.
    """
    require_matplotlib(plot)
    store = ModelStore(model)
    found = store.meta.get("calibration")
    if plot and not found:
        raise UsageError(f"{model} is not calibrated, so there is nothing to plot; run `halo-mpi calibrate {model}` first")
    facts = describe(store)
    if verify:
        facts["damaged"] = damaged_records(store)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        _print(facts)
        if found:
            model_bytes = sum(file["bytes"] for file in facts["files"])
            sizes = facts["calibration_bytes"]
            print_calibration(Console(highlight=False), found, ModelConfig.from_dict(store.meta["config"]), sizes, model_bytes)
    if plot:
        plot_calibration(found, plot)
    if verify and facts["damaged"]:
        raise DamagedFileError(f"{facts['damaged'][0]} ({len(facts['damaged'])} damaged records in all)")
    if verify:
        click.echo(f"all checksums of {len(facts['files'])} files match", err=True)


def describe(store: ModelStore) -> dict:
    """The facts that `inspect` prints."""
    config, found = ModelConfig.from_dict(store.meta["config"]), store.meta.get("calibration")
    files = [_describe_file(file) for file in (store.model, *store.shards.values())]
    missing = sorted(set(range(store.meta["shards"])) - set(store.shards))
    shape = config.to_dict() | {"group_size": config.group_size, "groups": config.groups, "parameters": config.parameters}
    return {
        "model": str(store.folder),
        "digest": store.digest,
        "dtype": store.meta["dtype"],
        "config": shape,
        "source": store.meta["source"],
        "biases": store.meta["biases"],
        "chat_template": store.meta["tokenizer"]["chat_template"] is not None,
        "model_id": store.model_id,
        "calibration": found,
        "calibration_bytes": stored_bytes(store) if found else None,
        "shards": store.meta["shards"],
        "shards_missing_here": missing,
        "files": files,
    }


def damaged_records(store: ModelStore) -> list[str]:
    """Read every record; a sentence for each whose checksum does not match."""
    places = [
        (file, name, layer, entry)
        for file in (store.model, *store.shards.values())
        for name, table in file.tables.items()
        for layer in range(len(table.crc32))
        for entry in table.positions
    ]
    damaged = []
    for file, name, layer, entry in progress(places, len(places), "verifying"):
        try:
            file.read(name, layer, entry)
        except DamagedFileError as error:
            damaged.append(str(error))
    return damaged


def _describe_file(file: RecordFile) -> dict:
    tables = {}
    for name, table in file.tables.items():
        matrices = {part.name: [part.rows, part.columns, part.dtype] for part in table.layout.parts.values()}
        tables[name] = {
            "layers": len(table.crc32),
            "entries": list(table.positions),
            "record_bytes": table.layout.nbytes,
            "matrices": matrices,
        }
    return {"name": file.path.name, "bytes": file.path.stat().st_size, "digest": file.digest, "tables": tables}


def _print(facts: dict) -> None:
    console, config = Console(highlight=False), facts["config"]
    console.print(f"[bold]{escape(config['name'])}[/]  {config['parameters'] / 1e6:.1f} M parameters, stored as {facts['dtype']}")
    console.print(f"digest {facts['digest']}, model {facts['model_id'][:12]}")
    console.print(f"source {', '.join(f'{key} {value}' for key, value in facts['source'].items())}", markup=False)
    console.print(
        f"{config['layers']} layers, hidden {config['hidden']}, {config['heads']} query heads on {config['kv_heads']} KV heads of "
        f"{config['head_dim']}, FFN {config['ffn']} in {config['groups']} groups of {config['group_size']}, vocabulary "
        f"{config['vocabulary']}{' (tied)' if config['tied'] else ''}, context {config['context']}"
    )
    features = {"RoPE scaling": config["rope_factors"] is not None, "chat template": facts["chat_template"],
                f"biases of {', '.join(facts['biases'])}": facts["biases"], "calibration": facts["calibration"]}  # fmt: skip
    console.print("has " + (", ".join(name for name, present in features.items() if present) or "no extras")
                  + ("" if facts["calibration"] else "; not calibrated (see `halo-mpi calibrate`)"))  # fmt: skip
    table = Table("file", "size, MB", "holds", "digest")
    for file in facts["files"]:
        holds = ", ".join(f"{name} {_ranges(grid['entries'])}" for name, grid in file["tables"].items())
        table.add_row(file["name"], f"{file['bytes'] / 1e6:.1f}", holds, file["digest"][:12])
    console.print(table)
    if facts["shards_missing_here"]:
        console.print(f"not on this disk: {', '.join(f'shard-{shard:02d}.h5' for shard in facts['shards_missing_here'])}")


def _ranges(numbers: list[int]) -> str:
    """Numbers with a common step in short: 0-8, 0-8 by 4, or the list itself."""
    steps = {after - before for before, after in zip(numbers, numbers[1:])}
    if len(numbers) < 3 or len(steps) > 1:
        return " ".join(map(str, numbers))
    step = steps.pop()
    return f"{numbers[0]}-{numbers[-1]}" + (f" by {step}" if step > 1 else "")


if __name__ == "__main__":
    run_command(inspect)
