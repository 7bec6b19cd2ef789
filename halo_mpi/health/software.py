"""Which program and which libraries run on a host, and whether they are the same on all."""

import hashlib
import platform
from pathlib import Path

import halo_mpi
from halo_mpi.health.finding import ERROR, OK, WARNING, Finding
from halo_mpi.versions import installed_version
from halo_mpi.wire.messages import PROTOCOL

LIBRARIES = ("mpi4py", "numpy", "numba", "llvmlite", "h5py")
INSTALL = "run `bash launch/quickstart.sh` there"
SAME = "copy the same halo_mpi folder to all hosts, and set it up alike: `bash launch/quickstart.sh` there"


def software() -> dict[str, str]:
    """Versions by name, empty where a library is not installed; `sources`: a digest of the program's own."""
    sources = hashlib.sha256()
    folder = Path(halo_mpi.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        sources.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    own = {"halo_mpi": halo_mpi.__version__, "protocol": str(PROTOCOL), "sources": sources.hexdigest()[:12]}
    return {**own, "Python": platform.python_version(), **{name: installed_version(name) for name in LIBRARIES}}


def lacking(versions: dict[str, str]) -> list[Finding]:
    """A finding if libraries are not installed on this host."""
    missing = [name for name in LIBRARIES if not versions[name]]
    return [Finding("libraries", ERROR, f"{', '.join(missing)} not installed", INSTALL)] if missing else []


def compared(versions: dict[str, dict[str, str]]) -> list[Finding]:
    """`versions`: by host; the first is the one that others are compared with."""
    (first, own), *others = versions.items()
    found = [finding for host, other in others for finding in _difference(first, own, host, other)]
    if "version" not in {finding.check for finding in found}:
        found.insert(0, Finding("version", OK, f"halo_mpi {own['halo_mpi']}, protocol {own['protocol']}"))
    if "libraries" not in {finding.check for finding in found}:
        found.append(Finding("libraries", OK, ", ".join(f"{name} {own[name]}" for name in ("Python", *LIBRARIES) if own[name])))
    return found


def is_same_program(own: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two hosts' ranks would work together at all."""
    return all(own.get(name) == other.get(name) for name in ("halo_mpi", "protocol"))


def _difference(first: str, own: dict[str, str], host: str, other: dict[str, str]) -> list[Finding]:
    if not is_same_program(own, other):
        theirs, ours = (f"{each.get('halo_mpi', '?')}, protocol {each.get('protocol', '?')}" for each in (other, own))
        return [Finding("version", ERROR, f"halo_mpi {theirs}, but {ours} on {first}", SAME, host)]
    found = []
    if own["sources"] != other.get("sources"):
        found.append(Finding("version", WARNING, f"the same version as on {first}, but other source files", SAME, host))
    differing = [
        f"{name} {other.get(name) or 'none'} (not {own[name]})" for name in ("Python", *LIBRARIES) if other.get(name) != own[name]
    ]
    if differing:
        found.append(Finding("libraries", WARNING, f"other than on {first}: {', '.join(differing)}", SAME, host))
    return found
