"""Calibration from the first layer to the last, on one rank or with the windows spread over several.

After every layer all that was found lies on disk, so that a run that was stopped goes on where it was.
"""

from collections.abc import Iterator

import numpy as np
import torch

from halo_mpi.model.config import ModelConfig
from halo_mpi.model.llama import Share, Trunk
from halo_mpi.model.whole import load_layer
from halo_mpi.predict.layer import LayerCalibration, Part, Walkers
from halo_mpi.predict.progress_files import ProgressFiles
from halo_mpi.predict.sensitivity import Variants
from halo_mpi.store.reader import ModelStore
from halo_mpi.wire.exchange import add_up

HELD_OUT_EVERY, MOST_HELD_OUT = 8, 8  # windows
ORDER_FROM = 4  # every so manieth window decides the neurons' order


def spread(windows: np.ndarray, rank: int, ranks: int) -> tuple[np.ndarray, Part]:
    """A rank's windows. Those that are held out are all the root's; what a window is for does not depend on the number of ranks."""
    held = list(range(HELD_OUT_EVERY // 2, len(windows), HELD_OUT_EVERY))[:MOST_HELD_OUT] or [len(windows) - 1]
    fitted = [window for window in range(len(windows)) if window not in held]
    chosen = (held if rank == 0 else []) + fitted[rank::ranks]
    for_order = [place for place, window in enumerate(chosen) if window in fitted[::ORDER_FROM]]
    return windows[chosen], Part(len(held) if rank == 0 else 0, for_order)


class Walk:
    """Layer by layer over a model that need not fit in memory. Collective; every rank needs all of the model's shards."""

    def __init__(self, comm, store: ModelStore, config: ModelConfig, trunk: Trunk, windows: np.ndarray):
        self._comm, self._store, self._config, self._trunk = comm, store, config, trunk
        own, self._part = spread(windows, comm.rank, comm.size)
        self._ids, self._length = torch.from_numpy(own).long(), windows.shape[1]

    def share(self, layer: int, length: int) -> Share:
        """One whole layer, for windows of `length` tokens."""
        config = self._config
        weights = load_layer(self._store, config, layer, list(range(config.heads)), list(range(config.groups)))
        return Share(config, [weights], length)

    def fit(self, files: ProgressFiles, width: int, unit: int) -> Iterator[int]:
        """Fit what was not fitted before, into `files`; the layers that are done, one after the other."""
        done = files.layers_done(self._comm)
        yield from range(done)
        walkers = files.load_walkers(done, self._part) if done else self._start()
        for layer in range(done, self._config.layers):
            share = self.share(layer, self._length)
            fit = LayerCalibration(self._comm, self._config, share, self._trunk, layer, unit).run(walkers, width)
            files.save(layer, walkers, fit)
            yield layer

    def _start(self) -> Walkers:
        x = self._trunk.embedding[self._ids]
        return Walkers(x, torch.empty(x.shape, dtype=torch.float16), self._part)

    def sensitivities(self, windows: np.ndarray) -> Iterator[np.ndarray | None]:
        """None after each layer; at the end, on the root, nats that the loss rises by: f64 [layers, 2], attention and FFN."""
        comm = self._comm
        own = {number: windows[number] for number in range(comm.rank, len(windows), comm.size)}
        variants = Variants(self._config, self._trunk, own)
        for layer in range(self._config.layers):
            variants.pass_layer(self.share(layer, windows.shape[1]), layer)
            yield None
        sums = variants.losses()
        add_up(comm, sums)
        losses = sums[:-1] / max(1.0, sums[-1])
        yield (losses[1:] - losses[0]).reshape(-1, 2)
