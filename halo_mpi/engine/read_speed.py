"""How fast a rank's disk gives weights that are ready to compute with."""

import time
from itertools import product
from math import gcd

from halo_mpi.model.kernels.kernel import Kernel
from halo_mpi.model.loading import fill
from halo_mpi.model.sizes import Shape
from halo_mpi.store.reader import ModelStore

READ_S = 0.1
TOGETHER = 4  # neighbouring records, which a disk gives faster than scattered ones


def read_gbps(store: ModelStore, kernel: Kernel, rank: int, ranks: int) -> float | None:
    """GB/s of weights as they are in memory, read and copied or decoded as the loader does it, for READ_S; None if this disk has none.

    Each record is read once, from places spread over the layers and others on every rank, so that on a Pi that has not yet used the model
    the disk answers. Records that the page cache holds come faster, several times where the disk is slow: the figure then is that of
    memory and decoding, and tokens take what was planned only as long as the files stay in the cache beside the weights.
    """
    table = next((name for name in ("ffn", "query") if store.entries(name)), None)
    if table is None:
        return None
    config, layout, entries = kernel.sizes.config, store.layout(table), sorted(store.entries(table))
    parts = [part for part in layout.parts.values() if not part.name.endswith(".bias")]
    matrices = {part.name: Shape((part.rows, part.columns), kernel.sizes.dtype_of(part.name)) for part in parts}
    rooms = {name: kernel.make(shape) for name, shape in matrices.items()}
    runs = [entries[first : first + TOGETHER] for first in range(0, len(entries), TOGETHER)]
    first_layer, first_run = rank * config.layers // ranks, rank * len(runs) // ranks
    far = _step(config.layers)
    places = [
        ((first_layer + step * far) % config.layers, runs[(first_run + step + turn) % len(runs)])
        for turn, step in product(range(len(runs)), range(config.layers))
    ]

    def expect(layer: int, run: list[int]) -> None:
        store.expect(layer, [(table, entry) for entry in run])

    weights, begin = 0, time.perf_counter()
    expect(*places[0])
    for (layer, run), following in zip(places, [*places[1:], None]):
        if following:
            expect(*following)
        for entry in run:
            record = store.read(table, layer, entry)
            for name, shape in matrices.items():
                fill(rooms[name], slice(0, shape.dims[0]), slice(0, shape.dims[1]), layout, record, name)
                weights += shape.nbytes
        if time.perf_counter() - begin > READ_S:
            break
    return weights / (time.perf_counter() - begin) / 1e9


def _step(layers: int) -> int:
    """From one layer to another that is far, so that all are met."""
    return next(step for step in range(max(1, layers * 2 // 5), layers + 1) if gcd(step, layers) == 1)
