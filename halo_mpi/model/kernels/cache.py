"""Object code kept on disk between runs, so that a start compiles nothing.

A file begins with the checksum of the rest: one that a crash or a full disk cut off is compiled anew. Ranks that start at once each
write a file of their own and rename it; a folder that cannot be written costs the compilation at every start, and nothing else.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CHECKSUM = 32  # bytes


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "halo_mpi"


def kept(key: tuple[str, ...], make: Callable[[], bytes]) -> bytes:
    """What `make` returns for this key: from the disk, if this or an earlier process has left it there."""
    file = cache_folder() / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.o"
    content = _read(file)
    if content is None:
        content = make()
        with suppress(OSError):
            _write(file, content)
    return content


def _read(file: Path) -> bytes | None:
    try:
        found = file.read_bytes()
    except OSError:
        return None
    content = found[CHECKSUM:]
    return content if hashlib.sha256(content).digest() == found[:CHECKSUM] else None


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(hashlib.sha256(content).digest() + content)
        os.replace(draft, file)
    except OSError:
        os.unlink(draft)
        raise
