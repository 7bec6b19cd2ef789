"""For setup-pis.sh: which files belong on which host, and making a host's folders the same as here by rsync."""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpirun_hosts import EXIT_FAILED, LaunchError
from pis_host import AGENT, Facts, Host, HostError

COPIES = 2  # with --spread: on so many hosts lies each shard
KEPT_FREE_BYTES = 64_000_000  # for what the first run writes: compiled modules and kernels


@dataclass(frozen=True)
class Tree:
    """A folder that is to be the same on this computer and a host. `rules`: rsync's filters, which say what of it."""

    what: str
    folder: Path
    rules: tuple[str, ...]


@dataclass(frozen=True)
class Changes:
    """What a copy changes, or would change."""

    files: int
    bytes: int
    removed: int

    def __bool__(self):
        return bool(self.files or self.removed)


def code_of(root: Path) -> Tree:
    """The files that git knows. On a host, files that git does not know go from the folders of the code, and stay beside them."""
    listed = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        reason = (listed.stderr.strip().splitlines() or ["git does not say why"])[0]
        raise LaunchError(f"git does not tell the files of {root}: {reason}", EXIT_FAILED)
    names = [name for name in listed.stdout.split("\0") if name and os.path.lexists(root / name)]
    folders = {str(parent) for name in names for parent in Path(name).parents} - {"."}
    shown = [f"+ /{escaped(folder)}/" for folder in sorted(folders)] + [f"+ /{escaped(name)}" for name in names]
    return Tree("code", root, (*shown, "H *", "P /*", "Pp __pycache__/"))


def environment_of(root: Path) -> Tree:
    return Tree("environment", root / ".venv", ("-p __pycache__/", "- /.halo-here-*"))


def model_of(folder: Path, shards: Sequence[str]) -> Tree:
    """A model with these of its shards; others go."""
    shown = [f"+ /{escaped(name)}" for name in ("model.h5", *shards)]
    return Tree("model", folder, (*shown, "H *", "R /shard-*.h5", "P *"))


def shards_of(folder: Path) -> list[str]:
    if not (folder / "model.h5").is_file():
        raise LaunchError(f"{folder} holds no model.h5; name a folder made by `halo-mpi convert`")
    return sorted(path.name for path in folder.glob("shard-*.h5"))


def spread(shards: Sequence[str], hosts: Sequence[str]) -> dict[str, list[str]]:
    """Shards by host: each on COPIES hosts, as many on one host as on another, but for one or two."""
    held = {host: set() for host in hosts}
    for turn in range(max(len(shards), len(hosts))):
        for copy in range(COPIES):
            held[hosts[(turn + copy) % len(hosts)]].add(shards[turn % len(shards)])
    return {host: sorted(names) for host, names in held.items()}


def check_space(changes: Sequence[tuple[Tree, Changes]], facts: Facts) -> None:
    """Raises HostError if what is to be copied is more than what is free."""
    needed = {}
    for tree, change in changes:
        mount = facts.places[str(tree.folder)].mount
        needed[mount] = needed.get(mount, 0) + change.bytes
    free = {place.mount: place.free_bytes for place in facts.places.values()}
    for mount, size in needed.items():
        if size and size + KEPT_FREE_BYTES > free[mount]:
            raise HostError(f"{sized(size)} are to be copied, and its {mount} has {sized(free[mount])} free")


def listed(changed: Sequence[tuple[Tree, Changes]]) -> str:
    """For the user: code (12 files, 0.1 MB, 1 removed), ..."""
    told = []
    for tree, change in changed:
        removed = f", {change.removed} removed" if change.removed else ""
        told.append(f"{tree.what} ({change.files} files, {sized(change.bytes)}{removed})")
    return ", ".join(told)


def sized(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def escaped(name: str) -> str:
    return re.sub(r"([\[*?])", r"\\\1", name)


class Copier:
    """Copies trees to hosts. `verify`: by content; else files of the same size and time count as the same."""

    def __init__(self, verify: bool):
        self._options = ["--checksum"] if verify else []

    def changes(self, tree: Tree, host: Host, is_there: bool) -> Changes:
        """What a copy would change."""
        if is_there:
            return self._rsync(tree, host, self._address(host, tree), ["--dry-run"])
        with tempfile.TemporaryDirectory(prefix="halo-setup-") as nothing:
            return self._rsync(tree, host, f"{nothing}/", ["--dry-run"])

    def copy(self, tree: Tree, host: Host) -> Changes:
        return self._rsync(tree, host, self._address(host, tree), [])

    def _address(self, host: Host, tree: Tree) -> str:
        return f"{f'[{host.name}]' if ':' in host.name else host.name}:{tree.folder}/"

    def _rsync(self, tree: Tree, host: Host, target: str, options: list[str]) -> Changes:
        line = ["rsync", "-rlpt", "--omit-dir-times", "--delete", "--protect-args", "--out-format=%i %l"]
        line += ["--timeout=900", "--partial-dir=.halo-partial", "--filter=merge -", "-e", AGENT]
        line += [*self._options, *options, f"{tree.folder}/", target]
        done = host.commands.run(line, "".join(f"{rule}\n" for rule in tree.rules))
        if done.returncode:
            raise HostError(f"copying the {tree.what} failed: {host.why(done.stderr)}")
        return count(done.stdout)


def count(itemized: str) -> Changes:
    """From rsync's lines '%i %l'."""
    files = size = removed = 0
    for line in itemized.splitlines():
        kind, _, length = line.partition(" ")
        if kind[:2] in ("<f", ">f"):
            files, size = files + 1, size + int(length)
        elif kind.startswith("cL"):
            files += 1
        elif kind == "*deleting":
            removed += 1
    return Changes(files, size, removed)
