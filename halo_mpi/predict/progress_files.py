"""What a calibration has found so far, on disk beside the model: `.NAME.calibration/`.

layer-LL.npz     the root's: the fit of a layer
walkers-RR-P.npz each rank's: residual vectors after the last layer done (P: its number's parity) and the one before,
                 since ranks that are killed may not all have done the same; written whole, then renamed
settings-RR      text, tokens, ranks and model that all of it belongs to; with others everything begins anew
"""

import os
import shutil
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from halo_mpi.errors import HaloError
from halo_mpi.predict.fits import Judged, LayerFit, LowRank
from halo_mpi.predict.layer import Part, Walkers
from halo_mpi.wire.exchange import broadcast, gather

DAMAGED = (OSError, ValueError, KeyError, EOFError, BadZipFile, TypeError)  # what reading a file that is not whole raises
ARRAYS = ("order", "weight", "bias", "importance")


class ProgressFiles:
    """Of one rank. Every rank has them on its own disk, or all on a shared one. Raises HaloError if they cannot be written."""

    def __init__(self, model: Path, settings: str, rank: int):
        self.folder = model.resolve().parent / f".{model.name}.calibration"
        self._rank, self._settings = rank, settings

    def begin(self) -> None:
        """Throw away what belongs to other settings."""
        try:
            own = self.folder / f"settings-{self._rank:02d}"
            if not own.exists() or own.read_text() != self._settings:
                self.folder.mkdir(parents=True, exist_ok=True)
                for parity in range(2):
                    self._walkers(parity).unlink(missing_ok=True)
                own.write_text(self._settings)
        except OSError as error:
            raise HaloError(f"cannot write in {self.folder}: {error.strerror}; free some space or make it writable") from error

    def layers_done(self, comm) -> int:
        """How many layers all ranks have done and can go on from (collective)."""
        found = []
        for parity in range(2):
            try:
                with np.load(self._walkers(parity), allow_pickle=False) as saved:
                    found.append(int(saved["layers"]) if saved["x"].ndim == saved["ahead"].ndim == 3 else 0)
            except DAMAGED:
                continue
        everywhere = [set(found) for found in gather(comm, found, patient=True)]
        done = max(set.intersection(*everywhere), default=0) if everywhere else 0
        return broadcast(comm, done if all(map(self._is_whole, range(done))) else 0, patient=True)

    def load_walkers(self, layers: int, part: Part) -> Walkers:
        with np.load(self._walkers(layers), allow_pickle=False) as saved:
            return Walkers(torch.from_numpy(saved["x"]), torch.from_numpy(saved["ahead"]), part)

    def save(self, layer: int, walkers: Walkers, fit: LayerFit | None) -> None:
        """The layer is done: its fit, then the walkers."""
        try:
            if fit:
                _write(self._fit(layer), _flat(fit))
            _write(self._walkers(layer + 1), {"layers": layer + 1, "x": walkers.x.numpy(), "ahead": walkers.ahead.numpy()})
        except OSError as error:
            raise HaloError(f"cannot write in {self.folder}: {error.strerror}; free some space and run it again") from error

    def load_fit(self, layer: int) -> LayerFit:
        with np.load(self._fit(layer), allow_pickle=False) as saved:
            return _unflat(saved)

    def remove(self) -> None:
        """All is in the model."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_whole(self, layer: int) -> bool:
        try:
            self.load_fit(layer)
        except DAMAGED:
            return False
        return True

    def _walkers(self, layers: int) -> Path:
        return self.folder / f"walkers-{self._rank:02d}-{layers % 2}.npz"

    def _fit(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03d}.npz"


def _write(path: Path, arrays: dict) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _flat(fit: LayerFit) -> dict:
    arrays = {name: getattr(fit, name) for name in ARRAYS}
    for kind in ("groups", "heads"):
        for name in ("inward", "outward", "bias"):
            arrays[f"{kind}.{name}"] = np.stack([getattr(estimate, name) for estimate in getattr(fit, kind)])
    for name in Judged.__slots__:
        arrays[f"judged.{name}"] = np.asarray(getattr(fit.judged, name))
    return arrays


def _unflat(saved) -> LayerFit:
    estimates = {}
    for kind in ("groups", "heads"):
        arrays = [saved[f"{kind}.{name}"] for name in ("inward", "outward", "bias")]
        estimates[kind] = [LowRank(*each) for each in zip(*arrays)]
    judged = Judged(**{name: saved[f"judged.{name}"] for name in Judged.__slots__})
    return LayerFit(**{name: saved[name] for name in ARRAYS}, **estimates, judged=judged)
