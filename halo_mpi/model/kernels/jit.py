"""Numba as it is used here: without the GIL and without checks.

    step    is compiled into what calls it
    entry   is called from Python, and kept on disk; entry_adding_up may add in an order that is faster, but always the same
    part    is called by its address, and kept on disk

Numba looks for changes only in the file of an entry, not in those of the steps that are part of it. So all is kept in a folder
that is named after a checksum of every source here.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numba
from numba import types
from numba.core.ccallback import CFunc

from halo_mpi.model.kernels.cache import cache_folder


def _checksum() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


numba.config.CACHE_DIR = numba.config.CACHE_DIR or str(cache_folder() / f"numba-{_checksum()}")

step = numba.njit(nogil=True, error_model="numpy")
entry = numba.njit(nogil=True, error_model="numpy", cache=True)
entry_adding_up = numba.njit(nogil=True, error_model="numpy", cache=True, fastmath={"reassoc", "contract"})


def part(function: Callable, arguments: int) -> CFunc:
    """A function of so many int64, compiled."""
    return numba.cfunc(types.void(*[types.int64] * arguments), error_model="numpy", cache=True)(function)
