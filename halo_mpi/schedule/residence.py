"""Which parts of a share stay in memory, if it does not hold them all, and which are read again at every token."""

from dataclasses import dataclass

SLOTS = 2  # for parts that do not stay: one in use, one being read


@dataclass(frozen=True, slots=True)
class Residence:
    """`sizes`: bytes of a share's parts in the order of use; `stays`: whether each stays in memory; `slot`: bytes of one slot."""

    sizes: tuple[int, ...]
    stays: tuple[bool, ...]
    slot: int

    @property
    def nbytes(self) -> int:
        """What parts that stay, and the slots for the others, take."""
        return self.stay_bytes + SLOTS * self.slot

    @property
    def stay_bytes(self) -> int:
        return sum(size for size, stays in zip(self.sizes, self.stays) if stays)

    @property
    def streamed_bytes(self) -> int:
        """What is read again at every token."""
        return sum(self.sizes) - self.stay_bytes


def reside(sizes: list[int], budget: int | None) -> Residence:
    """What a budget (bytes; None: no limit) holds of a share's parts; if not even the slots, then no part stays and it is over budget.

    A token needs the parts in turn, so each one that does not stay is read at each token, whichever it is: bytes are all alike.
    Those that stay lie evenly between the others, so that the next one is read while they compute.
    """
    total, slot = sum(sizes), max(sizes, default=0)
    if budget is None or total <= max(budget, SLOTS * slot):
        return Residence(tuple(sizes), (True,) * len(sizes), 0)
    room = max(0, budget - SLOTS * slot)
    stays, held, passed = [], 0, 0
    for size in sizes:
        passed += size
        stays.append(held + size <= room * passed / total)
        held += size * stays[-1]
    for part in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):  # what is left over
        if not stays[part] and held + sizes[part] <= room:
            stays[part], held = True, held + sizes[part]
    return Residence(tuple(sizes), tuple(stays), slot)
