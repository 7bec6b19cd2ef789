"""What of a folder's files is in memory, and taking it out: the pages of these files only, without root."""

import ctypes
import mmap
import os
from pathlib import Path

from halo_mpi.store.reader import ModelStore


def drop(folder: Path) -> None:
    """Ask the kernel to forget the files' pages. It does not on every file system; see `resident`."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drop_records(store: ModelStore, layer: int, names: set[str]) -> None:
    """The same of a layer's records in these tables, and of nothing that others expect."""
    for file in store.shards.values():
        with open(file.path, "rb") as opened:
            for name in names & file.tables.keys():
                table = file.tables[name]
                begin = int(table.offsets[layer].min()) // mmap.PAGESIZE * mmap.PAGESIZE
                end = int(table.offsets[layer].max()) + table.layout.nbytes + mmap.PAGESIZE - 1
                os.posix_fadvise(opened.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


def without_readahead(store: ModelStore) -> None:
    """Of what the kernel guesses; what is expected it fetches."""
    for file in (store.model, *store.shards.values()):
        os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def warm(folder: Path) -> None:
    """Read the files, again if need be: where memory is short, the kernel takes back what was read just now."""
    for _ in range(5):
        for path in folder.iterdir():
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass
        if resident(folder) == 1.0:
            return


def resident(folder: Path) -> float:
    """The share of the files' pages that is in memory."""
    counts = [_resident_pages(path) for path in folder.iterdir() if path.stat().st_size]
    return sum(there for there, _ in counts) / sum(pages for _, pages in counts)


def _resident_pages(path: Path) -> tuple[int, int]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    there = (ctypes.c_ubyte * pages)()
    with open(path, "rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        try:
            if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), there):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(page & 1 for page in there), pages
