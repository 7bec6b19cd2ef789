"""The text that calibration runs on, cut into windows."""

import hashlib
from pathlib import Path

import numpy as np

from halo_mpi.errors import InputError
from halo_mpi.model.tokenizer import Tokenizer

SHIPPED = tuple(Path(__file__).with_name("texts") / name for name in ("novels.txt", "manuals.txt", "questions.txt", "code.txt"))


def windows(texts: dict[str, str], tokenizer: Tokenizer, tokens: int, length: int) -> np.ndarray:
    """Token ids int32 [about tokens / length, length], of each text (by name) as many windows as its part of all allows, in turns.

    Raises InputError if there are fewer than two windows.
    """
    cut = []
    for text in texts.values():
        ids = np.array(tokenizer.encode(text, special=False), np.int32)
        cut.append(ids[: len(ids) // length * length].reshape(-1, length))
    available = sum(map(len, cut))
    if available < 2:
        raise InputError(f"{', '.join(texts)}: fewer than {2 * length} tokens, which is too little to calibrate with")
    everything = [(turn / len(own), window) for own in cut for turn, window in enumerate(own)]  # alike deep into every text
    everything.sort(key=lambda entry: entry[0])
    wanted = min(available, max(2, tokens // length))
    return np.stack([everything[place][1] for place in np.linspace(0, available - 1, wanted).astype(int)])


def digest(windows: np.ndarray) -> str:
    """sha256 (hex) of the token ids."""
    return hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()
