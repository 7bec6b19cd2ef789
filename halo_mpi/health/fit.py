"""Whether the hosts' memory holds a model."""

from dataclasses import dataclass

from halo_mpi.errors import MemoryBudgetError
from halo_mpi.health.finding import ERROR, OK, WARNING, Finding
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.kernels.choice import PROGRAM_BYTES, TILED, sizes_of
from halo_mpi.schedule.cost import Cluster, Device
from halo_mpi.schedule.losses import most_lost
from halo_mpi.schedule.memory import mebibytes
from halo_mpi.schedule.reading import reading_of
from halo_mpi.schedule.shares import best_shares, usual_shares
from halo_mpi.schedule.work import Work

SMALLER = "use more hosts, a model with fewer parameters, int4 instead of other storage, or a smaller --context; or generate --memory SIZE"


@dataclass(frozen=True, slots=True)
class Place:
    """A rank: its host, what is free there in bytes, by how many ranks that is shared, what this process has already, and its shards'
    heads and groups."""

    host: str
    available: int
    sharers: int
    resident: int
    heads: int
    groups: int

    def device(self, program_bytes: int) -> Device:
        """All devices alike but for memory and disk: nothing is measured."""
        free = self.available // self.sharers - max(0, program_bytes - self.resident)
        return Device(self.host, 1.0, 1.0, memory=max(0, free), disk_heads=self.heads, disk_groups=self.groups)


def fit(model: dict, places: list[Place], context: int) -> Finding:
    """`model`: see models.model; `places`: by rank; `context`: tokens that the KV cache holds."""
    config = ModelConfig.from_dict(model["config"])
    context = min(context, config.context)
    work = Work.of(sizes_of(config, model["dtype"], model["down_dtype"]), context)
    cluster = Cluster([place.device(PROGRAM_BYTES["llvm" if model["dtype"] in TILED else "reference"]) for place in places])
    usual = usual_shares(cluster, work)
    shares = usual.get("even")
    try:
        shares = shares or best_shares(cluster, work)
    except MemoryBudgetError as error:
        return Finding("memory", ERROR, str(error).partition(";")[0], SMALLER)
    held = [
        (int(reading_of(device, work, rank == 0, *own).held_bytes), device)
        for rank, (device, own) in enumerate(zip(cluster.devices, zip(shares.heads, shares.groups)))
    ]
    needed, fullest = max(held, key=lambda each: each[0] / max(1, each[1].memory))
    says = f"{mebibytes(needed)} of {mebibytes(fullest.memory)} on {fullest.name}, the fullest ({context} tokens of context)"
    if "even" not in usual:
        do = "keep the default --placement auto, which finds shares that fit" if len(places) > 1 else SMALLER
        return Finding("memory", WARNING, f"even shares do not fit, others do: {says}", do)
    if len(places) > 1:
        says += f"; {most_lost(cluster, work)} of {len(places) - 1} workers may be lost"
    return Finding("memory", OK, says)
