"""A calibration from start to end, the same code on every rank: read the text, walk, write."""

import json
from pathlib import Path

import numpy as np
import torch

from halo_mpi import __version__
from halo_mpi.engine.agreement import require_equal, together
from halo_mpi.engine.machine import peak_memory, share_cores
from halo_mpi.engine.prompts import read_text
from halo_mpi.errors import InputError
from halo_mpi.model.config import ModelConfig
from halo_mpi.model.whole import load_trunk
from halo_mpi.model.tokenizer import Tokenizer, TokenizerFiles
from halo_mpi.predict.progress_files import ProgressFiles
from halo_mpi.predict.rewrite import write_calibrated
from halo_mpi.predict.stored import facts
from halo_mpi.predict.texts import SHIPPED, digest, windows
from halo_mpi.predict.walk import Walk
from halo_mpi.progress import progress
from halo_mpi.store.reader import ModelStore
from halo_mpi.wire.exchange import broadcast, gather

WIDTH = 16  # the rank of an estimate
SENSITIVITY_WINDOW = 256  # tokens


class Calibration:
    """One calibration on one rank. Collective."""

    def __init__(self, comm, model: Path, threads: int | None, verbose: bool):
        self._comm, self._verbose = comm, verbose
        torch.set_grad_enabled(False)
        torch.set_num_threads(share_cores(comm, threads)[2])
        self._store = self._together(lambda: ModelStore(model.resolve()))  # a link stays one
        require_equal(comm, f"model in {model}", self._store.version, "copy one version of it to all hosts")
        self._config = self._together(lambda: ModelConfig.from_dict(self._store.meta["config"]))
        self._together(self._require_all_shards)

    def read(self, paths: tuple[Path, ...], tokens: int, window: int) -> None:
        """Cut the text on the root, for all."""
        window = min(window, self._config.context)

        def cut() -> list:
            tokenizer = Tokenizer(TokenizerFiles.from_dict(self._store.meta["tokenizer"]))
            return windows({path.name: read_text(path) for path in paths or SHIPPED}, tokenizer, tokens, window).tolist()

        cut_ = self._together(lambda: cut() if self._comm.rank == 0 else None)
        self._windows = np.array(broadcast(self._comm, cut_, patient=True), np.int32)
        self._texts = [path.name for path in paths or SHIPPED]

    def run(self, sensitivity_tokens: int, unit: int) -> tuple[dict, int] | None:
        """Walk, and write the calibrated version; on the root what was found, and the most memory, in bytes, that a rank took."""
        comm, store, config = self._comm, self._store, self._config
        settings = {"text": digest(self._windows), "windows": self._windows.shape, "model": store.digest, "ranks": comm.size,
                    "width": WIDTH, "unit": unit, "halo_mpi": __version__}  # fmt: skip
        files = ProgressFiles(store.folder, json.dumps(settings), comm.rank)
        self._together(files.begin)
        trunk = self._together(lambda: load_trunk(store, config))
        walk = Walk(comm, store, config, trunk, self._windows)
        for _ in self._progress(walk.fit(files, WIDTH, unit), config.layers, "calibrating"):
            pass
        sensitivities = None
        if sensitivity_tokens:
            window = min(SENSITIVITY_WINDOW, sensitivity_tokens, self._windows.shape[1])
            count = max(1, sensitivity_tokens // window)
            picked = self._windows[np.linspace(0, len(self._windows) - 1, min(count, len(self._windows))).astype(int), :window]
            steps = walk.sensitivities(picked)
            *_, sensitivities = self._progress(steps, config.layers + 1, "measuring layers")
        found = self._together(lambda: self._write(files, unit, sensitivities) if comm.rank == 0 else None)
        files.remove()
        peaks = gather(comm, peak_memory(), patient=True)
        return (found, max(peaks)) if comm.rank == 0 else None

    def _write(self, files: ProgressFiles, unit: int, sensitivities: np.ndarray | None) -> dict:
        """Write the calibrated version; what was found."""
        fits = map(files.load_fit, range(self._config.layers))
        found = {"texts": self._texts, "text_digest": digest(self._windows), "tokens": int(self._windows.size), "rank": WIDTH,
                 "unit": unit, "halo_mpi": __version__, **facts(fits, sensitivities)}  # fmt: skip
        write_calibrated(self._store, self._config, files.load_fit, found)
        return found

    def _together(self, step):
        return together(self._comm, step, self._verbose, patient=True)

    def _progress(self, steps, total: int, label: str):
        return progress(steps, total, label, shown=self._comm.rank == 0)

    def _require_all_shards(self) -> None:
        missing = sorted(set(range(self._store.meta["shards"])) - set(self._store.shards))
        if missing:
            names = ", ".join(f"shard-{shard:02d}.h5" for shard in missing)
            raise InputError(f"{self._store.folder} lacks {names}; to calibrate, copy all shards here")
