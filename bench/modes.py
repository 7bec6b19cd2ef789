"""The ways to run that the benchmarks compare, one line each."""

from dataclasses import dataclass, field

import click


@dataclass(frozen=True, slots=True)
class Mode:
    """`options`: of generate and evaluate; `scenario`: the lab's keys that belong to it.

    `exact`: its token ids must not depend on the network. `program`: the module that runs. `alone`: one host does the work of
    all; `paced`: at the pace of the device that the lab plays.
    """

    description: str
    options: tuple[str, ...] = ()
    scenario: dict = field(default_factory=dict)
    exact: bool = True
    program: str = "halo_mpi.generate"
    alone: bool = False
    paced: bool = True


STOCK = ("--kick-ms", "0", "--no-trailer", "--copies", "1", "--no-tune-sockets")
STRICT = ("--sync", "strict", "--wire", "f32", *STOCK)
DROP = ("--late", "drop", "--deadline-ms", "10", "--quality", "1")
REPAIR = ("--sync", "strict", "--copies", "1")
TWICE = ("--sync", "strict", "--copies", "2")
RELAXED = ("--sync", "relaxed")
SOON = ("--deadline-ms", "1", "--quality", "0.6")
OLD = ("--old-kernel", "--outage-ms", "30")
MODES = {
    "strict": Mode("(a) strict, stock kernel", STRICT),
    "strict-tuned": Mode("(b) strict, kernel tuned by root", STRICT, {"rto_min_ms": 5, "quickack": True}),
    "allreduce": Mode("(c) the syncs alone, by MPI_Allreduce", program="bench.allreduce", exact=False),
    "one": Mode("(d) one such device alone", STRICT, alone=True),
    "one-unpaced": Mode("(d) one rank at this machine's speed", STRICT, alone=True, paced=False),
    "halo": Mode(
        "(a') late ones dropped after 10 ms, stock sockets, as HALO was published",
        (*RELAXED, "--wire", "f32", *DROP, *STOCK),
        exact=False,
    ),
    "repair-f32": Mode("strict, losses repaired, f32", (*REPAIR, "--wire", "f32")),
    "twice-f32": Mode("strict, sent twice, f32", (*TWICE, "--wire", "f32")),
    "relaxed-f32": Mode("relaxed, f32", (*RELAXED, "--wire", "f32"), exact=False),
    "relaxed-f32-soon": Mode("relaxed, f32, late after 1 ms", (*RELAXED, "--wire", "f32", *SOON), exact=False),
    "repair": Mode("strict, losses repaired", REPAIR),
    "repair-q8": Mode("strict, losses repaired, q8", (*REPAIR, "--wire", "q8")),
    "twice": Mode("strict, sent twice", TWICE),
    "four": Mode("strict, sent four times", ("--sync", "strict", "--copies", "4")),
    "default": Mode("strict, sent twice, or four times where much is late (the default)", ("--sync", "strict")),
    "relaxed-once": Mode("relaxed, nothing sent twice", (*RELAXED, "--copies", "1"), exact=False),
    "relaxed": Mode("relaxed", RELAXED, exact=False),
    "relaxed-old": Mode("relaxed, kernel before 6.15", (*RELAXED, *OLD, "--quality", "0.4"), exact=False),
    "repair-old": Mode("strict, losses repaired, kernel before 6.15", (*REPAIR, "--old-kernel")),
    "twice-old": Mode("strict, sent twice, kernel before 6.15", (*TWICE, "--old-kernel")),
}
ENGINE_MODES = tuple(name for name, mode in MODES.items() if mode.program == "halo_mpi.generate" and not mode.alone)


class Names(click.ParamType):
    """Names of a table, separated by commas."""

    name = "NAME,..."

    def __init__(self, known):
        self._known = tuple(known)

    def convert(self, value, param, ctx):
        names = value if isinstance(value, tuple) else tuple(word.strip() for word in value.split(","))
        for name in names:
            if name not in self._known:
                self.fail(f"{name!r} is none of {', '.join(self._known)}", param, ctx)
        return names


class Numbers(click.ParamType):
    """Numbers of one kind within limits, separated by commas."""

    name = "N,..."

    def __init__(self, kind: type, least: float, most: float):
        self._kind, self._least, self._most = kind, least, most

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._kind(word) for word in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers, as in 1,2,5", param, ctx)
        if not all(self._least <= number <= self._most for number in numbers):
            self.fail(f"{value!r}: each must be between {self._least:g} and {self._most:g}", param, ctx)
        return numbers
