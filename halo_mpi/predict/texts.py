"""The text that calibration runs on, cut into windows."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from halo_mpi.engine.prompts import read_text
from halo_mpi.errors import InputError
from halo_mpi.model.tokenizer import Tokenizer

SHIPPED = tuple(Path(__file__).with_name("texts") / name for name in ("novels.txt", "manuals.txt", "questions.txt", "code.txt"))


def windows(paths: Sequence[Path], tokenizer: Tokenizer, tokens: int, length: int) -> np.ndarray:
    """Token ids int32 [about tokens / length, length], of each text as many windows as its part of all allows, in turns.

    Raises InputError if a file cannot be read, or if there are fewer than two windows.
    """
    cut = []
    for path in paths:
        ids = np.array(tokenizer.encode(read_text(path), special=False), np.int32)
        cut.append(ids[: len(ids) // length * length].reshape(-1, length))
    available = sum(map(len, cut))
    wanted = min(available, max(2, tokens // length))
    if wanted < 2:
        raise InputError(f"{', '.join(map(str, paths))}: fewer than {2 * length} tokens, which is too little to calibrate with")
    chosen = []
    for own in cut:
        count = min(len(own), round(wanted * len(own) / available))
        picked = np.linspace(0, len(own) - 1, count).astype(int) if count else []
        chosen += [((turn + 0.5) / count, window) for turn, window in enumerate(own[picked])]
    return np.stack([window for _, window in sorted(chosen, key=lambda entry: entry[0])])


def digest(windows: np.ndarray) -> str:
    """sha256 (hex) of the token ids."""
    return hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()
