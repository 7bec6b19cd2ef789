"""Writing record files, and folders that appear under their final name only when they are complete."""

import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from halo_mpi.errors import DiskFullError, UsageError
from halo_mpi.store.layout import ALIGNMENT, FORMAT, RecordLayout, content_digest

SMALLEST_ALIGNED = 4096  # bytes; records are aligned in the file, HDF5's own small structures are not


class _Disk:
    """A file whose writes never fail towards HDF5, which crashes when it must close a file that it could not write.

    The first failure is kept in `error`; from then on writes are dropped, and what was dropped is read as zeros.
    """

    def __init__(self, path: Path):
        self._file = open(path, "w+b", buffering=0)
        self.error: OSError | None = None
        self.seek, self.tell, self.truncate = self._file.seek, self._file.tell, self._file.truncate
        self.read = self._file.read  # h5py takes what can read and seek for a file

    def write(self, data: memoryview) -> int:
        rest = memoryview(data).cast("B")
        while rest and self.error is None:
            try:
                rest = rest[self._file.write(rest) :]
            except OSError as error:
                self.error = error
        return len(data)

    def readinto(self, buffer: memoryview) -> int:
        count = self._file.readinto(buffer)
        if self.error is not None:
            memoryview(buffer).cast("B")[count:] = bytes(len(buffer) - count)
            return len(buffer)
        return count

    def flush(self) -> None:
        pass  # there is no buffer

    def close(self) -> None:
        """Wait until the disk has everything. Raises OSError for what failed before."""
        try:
            if self.error is None:
                os.fsync(self._file.fileno())
            self.check()
        finally:
            self._file.close()

    def abandon(self) -> None:
        self._file.close()

    def check(self) -> None:
        if self.error is not None:
            raise self.error


class RecordFileWriter:
    """One HDF5 file of tables (see `layout`), written record by record and closed with its metadata and digest.

    Version-3 superblocks and object headers are used because they carry checksums of HDF5's own structures, and strings of
    fixed length because those of variable length lie in a heap without one, whose damage can send HDF5 into an endless
    loop. The methods raise OSError if the disk is full.
    """

    def __init__(self, path: Path):
        self._disk = _Disk(path)
        self._file = h5py.File(
            self._disk, "w", libver=("v110", "v110"), alignment_threshold=SMALLEST_ALIGNED, alignment_interval=ALIGNMENT
        )
        self._crc32: dict[str, np.ndarray] = {}
        self._positions: dict[str, dict[int, int]] = {}

    def add_table(self, name: str, layout: RecordLayout, layers: int, index: list[int]) -> None:
        """Declare a table of `layers` x len(index) records; `index` numbers its entries in the whole model."""
        if not index:
            return
        group = self._file.create_group(name)
        group.attrs["layout"] = np.bytes_(layout.to_json())
        group.create_dataset("index", data=np.array(index, "<i4"))
        shape = (layers, len(index), layout.nbytes)
        group.create_dataset("records", shape, np.uint8, chunks=(1, 1, layout.nbytes))
        self._crc32[name] = np.zeros(shape[:2], "<u4")
        self._positions[name] = {entry: position for position, entry in enumerate(index)}

    def write(self, name: str, layer: int, entry: int, record: np.ndarray) -> None:
        """Write one record, uint8 [nbytes]."""
        position = self._positions[name][entry]
        self._file[name]["records"][layer, position] = record
        self._crc32[name][layer, position] = zlib.crc32(record)
        self._disk.check()

    def __enter__(self) -> "RecordFileWriter":
        return self

    def __exit__(self, *exception) -> None:
        if self._file:  # not closed: the body failed
            self._file.close()
            self._disk.abandon()

    def close(self, meta: dict) -> str:
        """Write the metadata and checksums, flush to disk and return the file's digest (hex)."""
        text = json.dumps(meta, sort_keys=True).encode()
        for name, crc32 in self._crc32.items():
            self._file[name].create_dataset("crc32", data=crc32)
        self._file.create_dataset("meta", data=np.frombuffer(text, np.uint8))
        digest = content_digest(self._file)
        self._file.attrs["halo_format"] = FORMAT
        self._file.attrs["digest"] = np.bytes_(digest)
        self._file.close()
        self._disk.close()
        return digest


@contextmanager
def new_folder(final: Path, needed_bytes: int, marker: str, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `final`, renamed to it if the body succeeds and removed if not.

    Raises UsageError if `final` exists and may not be replaced (only a folder that holds `marker` ever is), DiskFullError
    if the disk does not hold `needed_bytes` or fills up in the body.
    """
    if final.exists() and not (final / marker).is_file():
        raise UsageError(f"{final} exists already and is no folder made by this command; choose another name")
    if final.exists() and not replace:
        raise UsageError(f"{final} exists already; choose another name, remove it, or add --force to replace it")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free
        if free < needed_bytes:
            raise DiskFullError(
                f"the disk of {final.parent} has {free / 1e6:.0f} MB free but {final.name} needs about "
                f"{needed_bytes / 1e6:.0f} MB; free some space or choose a smaller --dtype"
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    except OSError as error:
        raise UsageError(f"cannot write in {final.parent}: {error.strerror}; choose another output folder") from error
    try:
        yield partial
        partial.chmod(0o755)
        if final.exists():
            old = partial.with_suffix(".old")
            final.rename(old)
            partial.rename(final)
            shutil.rmtree(old, ignore_errors=True)  # over NFS, files that are open leave something behind
        else:
            partial.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"the disk of {final.parent} is full; nothing was left under {final}") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
