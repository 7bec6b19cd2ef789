"""The text under way in a file, so that another start of the program goes on with it.

Written by the root at every token, before the token's text is shown: what was shown is always in the file. The file is replaced as
a whole (a new one, then a rename), so whoever reads it finds a whole one, however this process ends.
"""

import hashlib
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from halo_mpi.engine.prompts import Prompt
from halo_mpi.engine.sampling import Sampling
from halo_mpi.errors import DamagedFileError, InputError

SCHEMA = 2
# The page cache outlives the process; only a root that loses its power needs the disk, and an SD card takes 10 to 100 ms for that.
SYNC_EVERY_S = 10.0
CHECKSUM = ', "crc32": '  # the file's last field, of all bytes before it
RECENT = 16  # tokens, of whose times the median is told


@dataclass(frozen=True, slots=True)
class Saved:
    """A text that was begun. `seed`: the run's, which prompts without one of their own have. `outlook` is for launch/halo-mpirun:
    most tokens `to_come`, of later texts too, a token's time `token_s`, and when this run's first was there, time.time()."""

    model: str
    id: str | int | None
    prompt_sha256: str
    sampling: dict
    seed: int
    random: dict
    ttft_ms: float
    spent_s: float
    outlook: dict
    token_ids: list[int]

    def belongs(self, path: Path, model: str, texts: list[Prompt], done: set) -> bool:
        """Whether it is one of `texts` and is still to be finished. Raises InputError if it is of something else."""
        if self.id in done:
            return False
        text = next((text for text in texts if text.id == self.id), None)
        advice = "start as that text was started, give another --checkpoint, or remove the file"
        if self.model != model:
            raise InputError(f"{path} was written with another model or another version of it; {advice}")
        if text is None or self.prompt_sha256 != _digest(text.tokens):
            raise InputError(f"{path} is the checkpoint of another prompt; {advice}")
        for name, value in _options(text.sampling).items():
            if value != self.sampling.get(name):
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{path} is of a text with {option} {self.sampling.get(name)}, not {value}; {advice}")
        return True


def read_checkpoint(path: Path) -> Saved | None:
    """The text in this file; None if there is no such file. Raises InputError if it cannot be used."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    body, _, checksum = content.rpartition(CHECKSUM.encode())
    advice = "remove it, and the text begins anew"
    try:
        fields = json.loads(content)
        schema = fields.pop("schema")
        if zlib.crc32(body) != int(checksum.strip().removesuffix(b"}")) or fields.pop("crc32") is None:
            raise ValueError("checksum")
        if schema != SCHEMA:
            raise InputError(f"{path} is a checkpoint of another version of halo_mpi; {advice}")
        return Saved(**fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamagedFileError(f"{path} is damaged, or no checkpoint; {advice}, or give another --checkpoint") from None


class Checkpoint:
    """The file of a run; without a `path` nothing is written. A disk that fails is told to `warn` once: the text goes on without.
    `to_come`: most tokens of all texts."""

    def __init__(self, path: Path | None, model: str, seed: int, warn: Callable[[str], None], to_come: int = 0):
        self._path, self._model, self._seed, self._warn = path, model, seed, warn
        self._on = path is not None
        self._later, self._first_at = to_come, None  # of texts not begun yet
        self._recent_s: deque[float] = deque(maxlen=RECENT)
        self._synced_at = float("-inf")

    def begin(self, text: Prompt, random: dict, token_ids: list[int], ttft_ms: float, spent_s: float) -> None:
        """A text is begun, or gone on with after these tokens. `random`: the sampler's state."""
        if not self._on:
            return
        about = {"schema": SCHEMA, "model": self._model, "id": text.id, "prompt_sha256": _digest(text.tokens)}
        about |= {"sampling": _options(text.sampling), "seed": self._seed}
        self._about = json.dumps(about).removesuffix("}")
        self._ids = ", ".join(map(str, token_ids))
        self._later -= text.sampling.max_tokens
        self._to_come = text.sampling.max_tokens - len(token_ids)
        self._spent_s = None  # when this run's latest token was there
        self._write(random, ttft_ms, spent_s)

    def token(self, token: int, random: dict, ttft_ms: float, spent_s: float) -> None:
        """The text has one more token; `random`: the sampler's state before the next is chosen."""
        if self._on:
            self._ids += f", {token}" if self._ids else str(token)
            self._to_come -= 1
            self._first_at = self._first_at or time.time()
            if self._spent_s is not None:
                self._recent_s.append(spent_s - self._spent_s)
            self._spent_s = spent_s
            self._write(random, ttft_ms, spent_s)

    def remove(self) -> None:
        """All is finished."""
        if self._path:
            _remove(self._path)

    def _write(self, random: dict, ttft_ms: float, spent_s: float) -> None:
        token_s = median(self._recent_s) if self._recent_s else None
        outlook = {"to_come": self._to_come + self._later, "token_s": token_s, "first_at": self._first_at}
        now = json.dumps({"random": random, "ttft_ms": ttft_ms, "spent_s": spent_s, "outlook": outlook})[1:-1]
        body = f'{self._about}, {now}, "token_ids": [{self._ids}]'.encode()
        part = self._path.with_name(self._path.name + ".part")
        try:
            with open(part, "wb", buffering=0) as file:
                file.write(body + f"{CHECKSUM}{zlib.crc32(body)}}}\n".encode())
                if time.monotonic() - self._synced_at > SYNC_EVERY_S:
                    os.fsync(file.fileno())
                    self._synced_at = time.monotonic()
            os.replace(part, self._path)
        except OSError as error:
            self._warn(f"the checkpoint {self._path} cannot be written: {error.strerror}; the run goes on without it")
            self._on = False
            _remove(part)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # the folder is not there, or may not be changed


def _digest(tokens: list[int]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def _options(sampling: Sampling) -> dict:
    """As JSON gives them back."""
    return {**asdict(sampling), "stop": list(sampling.stop)}
