"""Whether memory holds a plan, and one that spares the first and the last layer."""

from collections.abc import Sequence

from halo_mpi.model.sizes import Sizes
from halo_mpi.schedule.cost import Cluster
from halo_mpi.schedule.placement import Disks, Plan, without_ends
from halo_mpi.schedule.work import Work


def room(plan: Plan, sizes: Sizes, cluster: Cluster, work: Work) -> int | None:
    """Bytes that every rank has left under a plan, less than 0 if one lacks some; None: enough."""
    left = None
    for rank, device in enumerate(cluster.devices):
        heads, groups = plan.query_heads(rank), plan.groups(rank)
        if device.memory is not None:
            taken = sum(sizes.layer_bytes(*own, work.context) for own in zip(heads, groups))
            own = device.memory - taken - (work.root_bytes if rank == 0 else 0)
            left = own if left is None else min(left, own)
    return left


def ends_spared(plan: Plan, unstable: Sequence[int], sizes: Sizes, cluster: Cluster, work: Work, available: Disks) -> Plan:
    """The plan with nothing of the first and the last layer on the `unstable`, if the others' memory holds that; else as it is.

    So is one in which ranks are gathered, in few layers and seldom in these.
    """
    if plan.gathered:
        return plan
    spared = without_ends(plan, unstable, len(cluster.devices), available)
    left = room(spared, sizes, cluster, work)
    return spared if left is None or left >= 0 else plan
