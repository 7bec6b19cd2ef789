"""Reading record files: h5py for the structure, `os.preadv` at the chunks' offsets for the records."""

import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from halo_mpi.errors import DamagedFileError, InputError
from halo_mpi.store.layout import FORMAT, RecordLayout, content_digest

MODEL_FILE = "model.h5"
ADVISED = 128 * 2**10  # bytes: what Linux fetches for one call is no more than a disk's readahead, of which this is the usual size


@dataclass(frozen=True, slots=True)
class Table:
    """The records of one kind in one file: where each lies and what its checksum is."""

    layout: RecordLayout
    positions: dict[int, int]  # entry number in the whole model -> position in this file
    offsets: np.ndarray  # int64 [layers, entries], bytes from the start of the file
    crc32: np.ndarray  # uint32 [layers, entries]


class RecordFile:
    """One open HDF5 file of tables. Its digest is checked when it is opened, each record's crc32 when it is read.

    Raises DamagedFileError if the file is truncated, not HDF5, or disagrees with its checksums.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with h5py.File(path, "r", locking=False) as file:  # never changed in place
                if file.attrs["halo_format"] != FORMAT:
                    raise InputError(
                        f"{path} has format {file.attrs['halo_format']}, this version reads {FORMAT}; convert it again"
                    )
                self.digest = file.attrs["digest"].decode()
                if content_digest(file) != self.digest:
                    raise DamagedFileError(f"{path} is damaged: its content does not match its digest; copy or convert it again")
                self.meta = json.loads(file["meta"][()].tobytes())
                self.tables = {name: self._open_table(file[name]) for name in file if name != "meta"}
            self.descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist") from error
        except PermissionError as error:
            raise InputError(f"{path} may not be read; check its permissions") from error
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, OverflowError, AttributeError) as error:
            raise DamagedFileError(
                f"{path} is damaged or not a halo_mpi file; copy or convert it again ({_one_line(error)})"
            ) from error

    def _open_table(self, group: h5py.Group) -> Table:
        layout = RecordLayout.from_json(group.attrs["layout"].decode())
        records, index, crc32 = group["records"], group["index"][()], group["crc32"][()]
        if records.chunks != (1, 1, layout.nbytes) or crc32.shape != records.shape[:2] or index.shape != records.shape[1:2]:
            raise ValueError(f"table {group.name} has unexpected shapes")
        offsets = np.zeros(crc32.shape, np.int64)
        for layer, position in np.ndindex(*offsets.shape):
            chunk = records.id.get_chunk_info_by_coord((layer, position, 0))
            if chunk.byte_offset is None or chunk.size != layout.nbytes or chunk.filter_mask:
                raise ValueError(f"record {layer}, {position} of table {group.name} is missing")
            offsets[layer, position] = chunk.byte_offset
        return Table(layout, {int(entry): position for position, entry in enumerate(index)}, offsets, crc32)

    def read(self, name: str, layer: int, entry: int) -> np.ndarray:
        """The bytes of one record, uint8 [nbytes].

        Raises DamagedFileError that names file, layer and entry if the file is too short or the checksum differs.
        """
        table = self.tables[name]
        position = table.positions[entry]
        record = np.empty(table.layout.nbytes, np.uint8)
        try:
            count = os.preadv(self.descriptor, [record], int(table.offsets[layer, position]))
        except OSError as error:
            raise DamagedFileError(
                f"{self.path}: reading layer {layer}, {name} {entry} failed ({error.strerror}); check the disk"
            ) from error
        if count != record.size or zlib.crc32(record) != table.crc32[layer, position]:
            raise DamagedFileError(
                f"{self.path} is damaged at layer {layer}, {name} {entry}: its checksum does not match; copy or convert it again"
            )
        return record

    def expect(self, name: str, layer: int, entry: int) -> None:
        """Have the kernel fetch what of a record is not in memory; without waiting for it."""
        table = self.tables[name]
        begin = int(table.offsets[layer, table.positions[entry]])
        end = begin + table.layout.nbytes
        for offset in range(begin, end, ADVISED):
            os.posix_fadvise(self.descriptor, offset, min(ADVISED, end - offset), os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        os.close(self.descriptor)


class ModelStore:
    """A `.halo` folder as one device sees it: `model.h5`, and those of the model's shards that lie on its disk.

    `pace`: called after each record with the time when its reading began (perf_counter) and its size in bytes.
    """

    def __init__(self, folder: Path, pace: Callable[[float, int], None] = lambda begin, size: None):
        if not folder.is_dir():
            raise InputError(f"the model folder {folder} does not exist; make one with `halo-mpi convert SOURCE {folder}`")
        if not (folder / MODEL_FILE).exists():
            raise InputError(f"{folder} holds no {MODEL_FILE}; is it a folder made by `halo-mpi convert`?")
        self.folder, self._pace = folder, pace
        self.model = RecordFile(folder / MODEL_FILE)
        self.meta = self.model.meta
        self.digest = self.model.digest
        self.model_id = self.meta.get("model_id", self.digest)  # the same for all versions of a model
        self.shards: dict[int, RecordFile] = {}
        for path in sorted(folder.glob("shard-*.h5")):
            number = int(re.sub(r"\D", "", path.stem) or -1)
            expected = self.meta["shard_digests"]
            shard = RecordFile(path)
            if not 0 <= number < len(expected) or shard.digest != expected[number]:
                raise InputError(f"{path} does not belong to this {MODEL_FILE}; copy both from the same conversion")
            self.shards[number] = shard

    def layout(self, name: str) -> RecordLayout:
        """The record layout of a table, from `model.h5` or any shard that is here."""
        for file in (self.model, *self.shards.values()):
            if name in file.tables:
                return file.tables[name].layout
        raise InputError(f"{self.folder} holds no shard with {name} records; copy a shard-KK.h5 to this host")

    def read(self, name: str, layer: int, entry: int) -> np.ndarray:
        """The bytes of one record, uint8, from whichever file here holds it.

        Raises InputError if no file here holds it, DamagedFileError if its checksum differs.
        """
        begin = time.perf_counter()
        record = self._holder(name, entry).read(name, layer, entry)
        self._pace(begin, record.nbytes)
        return record

    def expect(self, layer: int, records: Iterable[tuple[str, int]]) -> None:
        """Have the kernel fetch some records of a layer, by table and entry, while others are read: all at once, and no more than these.

        Raises InputError as `read` does.
        """
        for name, entry in records:
            self._holder(name, entry).expect(name, layer, entry)

    def _holder(self, name: str, entry: int) -> RecordFile:
        for file in (self.model, *self.shards.values()):
            if name in file.tables and entry in file.tables[name].positions:
                return file
        raise InputError(f"no shard in {self.folder} holds {name} {entry}; copy the missing shard-KK.h5 to this host")

    @property
    def version(self) -> str:
        """For people: which model, in which version."""
        return f"{self.digest[:12]} ({'calibrated' if self.meta.get('calibration') else 'not calibrated'} {self.model_id[:12]})"

    def entries(self, name: str) -> set[int]:
        """The numbers of the table's entries that lie on this disk."""
        files = (self.model, *self.shards.values())
        return {entry for file in files if name in file.tables for entry in file.tables[name].positions}

    def close(self) -> None:
        for file in (self.model, *self.shards.values()):
            file.close()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
