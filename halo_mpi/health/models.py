"""Whether the model is there, whole, and the same on all hosts."""

from pathlib import Path

from halo_mpi.errors import HaloError
from halo_mpi.health.finding import ERROR, OK, WARNING, Finding
from halo_mpi.model.loading import down_dtype
from halo_mpi.store.reader import ModelStore

COPY = "copy the model folder of {first} there"


def model(folder: Path) -> tuple[dict | None, list[Finding]]:
    """What lies in a `.halo` folder of this host, and findings if it cannot be used."""
    try:
        store = ModelStore(folder)
    except HaloError as error:
        says, _, do = str(error).partition("; ")
        return None, [Finding("model", ERROR, says, do or "copy the model folder of another host here")]
    facts = {
        "version": store.version,
        "digest": store.digest,
        "dtype": store.meta["dtype"],
        "down_dtype": down_dtype(store),
        "config": store.meta["config"],
        "shards": sorted(store.shards),
        "of": store.meta["shards"],
        "heads": len(store.entries("query")),
        "groups": len(store.entries("ffn")),
    }
    store.close()
    return facts, []


def compared(facts: dict[str, dict | None]) -> list[Finding]:
    """`facts`: by host, of those where it could be read; the first has what the others are compared with."""
    here = {host: own for host, own in facts.items() if own}
    if not here:
        return []
    (first, own), *others = here.items()
    found = [
        Finding("model", ERROR, f"version {other['version']}, but {own['version']} on {first}", COPY.format(first=first), host)
        for host, other in others
        if other["digest"] != own["digest"]
    ]
    same = {host: other for host, other in here.items() if other["digest"] == own["digest"]}
    if len(same) == len(facts):
        found.append(Finding("model", OK, f"{own['config']['name']}, {own['dtype']}, version {own['version']}"))
    return found + _shards(same)


def _shards(facts: dict[str, dict]) -> list[Finding]:
    every = set(range(next(iter(facts.values()))["of"]))
    missing = {host: sorted(every - set(own["shards"])) for host, own in facts.items()}
    nowhere = set.intersection(*map(set, missing.values()))
    found = []
    if nowhere:
        found.append(
            Finding("shards", ERROR, f"{_files(sorted(nowhere))} on no host", "copy it from where the model was converted")
        )
    for host, lacking in missing.items():
        if lacking:
            says = f"no {_files(lacking)}: it computes only from its other shards, and takes over nothing of these"
            found.append(Finding("shards", WARNING, says, "copy the shards there, or leave it so if its disk is full", host))
    return found or [Finding("shards", OK, f"all {len(every)} on every host")]


def _files(numbers: list[int]) -> str:
    return ", ".join(f"shard-{number:02d}.h5" for number in numbers)
