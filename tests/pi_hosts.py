"""Hosts for setup-pis.sh that are folders on this computer: an ssh and an rsync that go first on the PATH lead there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.mpi import ROOT

TOOLS = ("sh", "awk", "df", "dirname", "uname", "date", "ls", "mkdir", "touch", "rsync", "env")
SSH = """#!/bin/bash
while [ "$1" = -o ]; do shift 2; done
host=$1 disk={disks}/$1 root={root}
shift
[ -e "$disk" ] || {{ echo "ssh: Could not resolve hostname $host: Name or service not known" >&2; exit 255; }}
[ -e "$disk/refused" ] && {{ cat "$disk/refused" >&2; exit 255; }}
command=$*
command=${{command//"$root"/"$disk$root"}}
said=$(PATH=$disk/bin sh -c "$command" 2>&1)
code=$?
printf '%s\\n' "${{said//"$disk"/}}"
exit $code
"""
RSYNC = """#!/bin/bash
words=("$@")
target=${{words[-1]}}
[ "${{target#*:}}" = "$target" ] || words[-1]={disks}/${{target%%:*}}${{target#*:}}
exec {rsync} "${{words[@]}}"
"""


class PiHosts:
    """A small checkout of halo_mpi with its environment and a model, and hosts that have nothing of it yet."""

    def __init__(self, folder: Path, *names: str):
        self.root, self.disks, self._tools = folder / "halo", folder / "disks", folder / "tools"
        self.hostfile, self.names = folder / "hosts", names
        self.model = self.root / "models" / "small.halo"
        self.hostfile.write_text("localhost slots=1\n" + "".join(f"{name} slots=1\n" for name in names))
        self._make_root()
        self._tools.mkdir()
        words = {"root": self.root, "disks": self.disks, "rsync": shutil.which("rsync")}
        for name, text in (("ssh", SSH), ("rsync", RSYNC)):
            executable(self._tools / name, text.format(**words))
        for name in names:
            (self.disks / name / "bin").mkdir(parents=True)
            (self.disks / name / self.root.parent.relative_to("/")).mkdir(parents=True)
            for tool in TOOLS:
                (self.disks / name / "bin" / tool).symlink_to(shutil.which(tool))

    def _make_root(self):
        for part in ("setup-pis.sh", "pis.py", "pis_host.py", "pis_copy.py", "mpirun_hosts.py"):
            self.write(f"launch/{part}", (ROOT / "launch" / part).read_text())
        self.write("launch/halo-mpirun", "import sys\nsys.exit(0)\n")
        self.write("halo_mpi/engine/root.py", "token = 1\n")
        self.write("halo_mpi/old.py", "old = 1\n")
        self.write(".gitignore", "/.venv/\n/models/\n__pycache__/\n")
        subprocess.run("git init -q . && git add .", shell=True, cwd=self.root, check=True)
        self.write(".venv/halo-stamp", f"{self.root}\nhash\n\n")
        self.write(".venv/lib/package/module.py", "value = 2\n")
        (self.root / ".venv" / "bin").mkdir()
        (self.root / ".venv" / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
        for name in ("model", *(f"shard-{number:02}" for number in range(4))):
            self.write(f"models/small.halo/{name}.h5", name * 1000)

    def write(self, name: str, text: str, host: str | None = None) -> Path:
        path = (self.on(host) if host else self.root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def on(self, host: str) -> Path:
        """Where the checkout lies on a host."""
        return self.disks / host / self.root.relative_to("/")

    def tool(self, host: str, name: str, text: str | None) -> None:
        """What this program does on a host; None: it is missing."""
        path = self.disks / host / "bin" / name
        path.unlink()
        if text is not None:
            executable(path, f"#!/bin/sh\n{text}\n")

    def refuse(self, host: str, reason: str) -> None:
        (self.disks / host / "refused").write_text(reason)

    def start(self, *options) -> subprocess.Popen:
        words = ["bash", self.root / "launch" / "setup-pis.sh", self.hostfile, *options]
        path = f"{self._tools}{os.pathsep}{os.environ['PATH']}"
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(list(map(str, words)), env={**os.environ, "PATH": path}, **pipes)

    def set_up(self, *options) -> tuple[int, dict[str, str], str]:
        """(exit code, what was said of each host, standard error)"""
        process = self.start(*options)
        out, err = process.communicate(timeout=50)
        return process.returncode, dict(line.split(": ", 1) for line in out.splitlines()), err

    def files(self, host: str, folder: str) -> list[str]:
        top = self.on(host) / folder
        return sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.is_file() or path.is_symlink())


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
