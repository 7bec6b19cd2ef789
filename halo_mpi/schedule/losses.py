"""What is left when workers are lost: whether the others hold everything, and what a token takes then."""

from dataclasses import dataclass, replace

from halo_mpi.errors import MemoryBudgetError
from halo_mpi.schedule.cost import Cluster, Device
from halo_mpi.schedule.shares import Work, best_shares


@dataclass(frozen=True, slots=True)
class Loss:
    """Of any one of these workers, which are alike. `tpot_ms`: None if the others' memory or disks do not hold its part."""

    ranks: tuple[int, ...]
    tpot_ms: float | None


def losses_of_one(cluster: Cluster, work: Work) -> list[Loss]:
    """What each worker's loss means, alike ones together."""
    alike: dict[Device, list[int]] = {}
    for rank, device in list(enumerate(cluster.devices))[1:]:
        alike.setdefault(replace(device, name=""), []).append(rank)
    return [Loss(tuple(ranks), _tpot_ms(cluster, work, ranks[:1])) for ranks in alike.values()]


def most_lost(cluster: Cluster, work: Work) -> int:
    """So many workers may be lost, whichever they are: those with the most memory and the fullest disks are what is tried."""

    def worth(rank: int) -> tuple[float, float]:
        device = cluster.devices[rank]
        held = [len(cluster.devices) if entries is None else entries for entries in (device.disk_heads, device.disk_groups)]
        return float("inf") if device.memory is None else device.memory, sum(held)

    order = sorted(range(1, len(cluster.devices)), key=worth, reverse=True)
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if _tpot_ms(cluster, work, order[:middle]) is None else (middle, high)
    return low


def _tpot_ms(cluster: Cluster, work: Work, lost: list[int]) -> float | None:
    devices = [
        replace(device, disk_heads=0, disk_groups=0) if rank in lost else device for rank, device in enumerate(cluster.devices)
    ]
    try:
        return best_shares(replace(cluster, devices=devices), work).cost.tpot_ms
    except MemoryBudgetError:
        return None
