"""What the operating system allows: open files, room for temporary files; and whether memory is lent by a disk."""

import resource
import shutil
import tempfile
from pathlib import Path

from halo_mpi.health.finding import ERROR, OK, WARNING, Finding

FILES = 512  # enough for 60 ranks: four connections each, their libraries and the model's files
TEMPORARY = 64 * 2**20  # bytes; MPI keeps its sessions there, and local ranks their shared memory
EMPTY = "end other programs, or take a smaller --memory; `sudo swapoff -a && sudo swapon -a` empties it"
ROOM = "free some room there, or set TMPDIR"
SWAPPED = 32 * 2**20  # bytes in use that are worth a word


def limits(root: Path) -> list[Finding]:
    """`root`: where `proc` is."""
    return [_swap(root), _open_files(), _temporary(Path(tempfile.gettempdir()))]


def _swap(root: Path) -> Finding:
    sizes = {}
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            sizes[name] = int(rest.split()[0]) * 1024
        total = sizes["SwapTotal"]
        used = total - sizes["SwapFree"]
    except (OSError, KeyError, ValueError, IndexError):
        return Finding("swap", OK, "not told by this machine")
    if used >= SWAPPED:
        says = f"{used / 2**20:.0f} of {total / 2**20:.0f} MiB in use: what lies there is read from disk again, and all ranks wait for it"
        return Finding("swap", WARNING, says, EMPTY)
    return Finding("swap", OK, "none in use" if total else "none")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FILES:
        return Finding("files", OK, f"{FILES} or more may be open")
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    do = f"run `ulimit -n {most}` before, or raise nofile in /etc/security/limits.conf"
    return Finding("files", WARNING, f"only {soft} files may be open, connections included", do)


def _temporary(folder: Path) -> Finding:
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("disk", ERROR, f"{folder} cannot be written ({error.strerror}), and MPI not start", ROOM)
    if free < TEMPORARY:
        return Finding("disk", WARNING, f"{free / 2**20:.0f} MiB are left in {folder}", ROOM)
    return Finding("disk", OK, f"room in {folder}")
