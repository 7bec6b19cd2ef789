"""A cluster in the lab whose hosts have disks, a user and an sshd of their own: what setup-pis.sh meets among real boards."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.lab.lab import Lab
from bench.lab.system import NETNS
from tests.mpi import ROOT

TOOLS = {"sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "git": "git", "setpriv": "util-linux"}
USER, UID = "pi", 54321
HALO = Path("/home/pi/halo_mpi")
UNNEEDED = """torch torchgen transformers* sympy* matplotlib* fontTools* unicorn* PIL* pillow* networkx* hf_xet* pip* setuptools*
    hypothesis* accelerate* kiwisolver* pydantic* mpmath* __pycache__""".split()
HIDE = """
hide() { mount -t tmpfs -o mode=755 halo-lab "$1"; }
set -e
mount --make-rprivate /
echo "$NAME" > /proc/sys/kernel/hostname
for file in passwd group shadow hosts; do mount --bind "$DISK/etc/$file" "/etc/$file"; done
mount --bind "$DISK/home" /home
cp -r "$DISK/sshd" /dev/shm/"$NAME"-sshd
hide /run
mv /dev/shm/"$NAME"-sshd /run/sshd
mkdir /run/python
mount --bind "$PYTHON" /run/python
hide "$REPOSITORY" ; hide "$ENVIRONMENT"
[ -z "$PRIVATE" ] || hide "$PRIVATE"
mkdir -p "$PYTHON"
mount --bind /run/python "$PYTHON"
hide /dev/shm ; hide /tmp
chmod 1777 /dev/shm /tmp
exec "$SSHD" -D -e -f /run/sshd/config
"""
CONFIG = """
HostKey /run/sshd/key
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
"""


def missing_tools() -> str:
    """Why there is no such cluster here; empty if there is."""
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin") is None}
    if missing:
        return f"apt-get install {' '.join(sorted(missing))}"
    return "" if Path(sys.prefix, "bin", "mpirun").exists() else "the virtual environment has no Open MPI of its own"


class PiLab:
    """The first host of a lab has halo_mpi, its environment and a model, and knows the others' names; they have a home folder.

    Each has a user pi with no rights, sees neither this repository nor its virtual environment, and has /home, /tmp and /dev/shm to
    itself. `strangers` do not know the first one's key.
    """

    def __init__(self, lab: Lab, folder: Path, model: Path, strangers: tuple[str, ...] = ()):
        self.lab, self._folder, self._strangers = lab, folder, strangers
        self.names, self._servers = list(lab.scenario.hosts), {}
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "user-key")
        for name in self.names:
            self._make_disk(name)
        self._fill_first(model)
        for name in self.names:
            call("chown", "-R", f"{UID}:{UID}", self.disk(name) / "home" / USER)

    def __enter__(self):
        self._servers = {name: self._serve(name) for name in self.names}
        for name, server in self._servers.items():
            until(lambda: self.answers(name) or server.poll() is not None)
            assert server.poll() is None, (self.disk(name) / "log").read_text()
        return self

    def __exit__(self, *_):
        for server in self._servers.values():
            server.terminate()
            server.wait()

    def disk(self, name: str) -> Path:
        return self._folder / name

    def halo(self, name: str) -> Path:
        """Where a host's copy of halo_mpi lies, seen from here."""
        return self.disk(name) / HALO.relative_to("/")

    def run(self, command: str, timeout: float = 110) -> subprocess.CompletedProcess:
        """A command of the user on the first host."""
        server = self._servers[self.names[0]]
        words = ["nsenter", "--target", server.pid, "--net", "--mount", "--uts"]
        words += ["setpriv", "--reuid", UID, "--regid", UID, "--clear-groups"]
        words += ["env", "-i", f"HOME=/home/{USER}", f"USER={USER}", "PATH=/usr/bin:/bin", "sh", "-c", f"cd {HALO} && {command}"]
        quiet = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
        return subprocess.run(list(map(str, words)), timeout=timeout, **quiet)

    def answers(self, name: str) -> bool:
        """Whether its sshd listens."""
        probe = ["nsenter", f"--net={NETNS / self.lab.names.namespace(name)}", "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/22"]
        return subprocess.run(probe, capture_output=True).returncode == 0

    def _make_disk(self, name: str):
        disk = self.disk(name)
        etc, home, sshd = disk / "etc", disk / "home" / USER, disk / "sshd"
        for folder in (etc, home / ".ssh", sshd):
            folder.mkdir(parents=True)
        own = {"passwd": f"{USER}:x:{UID}:{UID}::/home/{USER}:/bin/bash", "group": f"{USER}:x:{UID}:", "shadow": f"{USER}:*:19000::::::"}
        for file, line in own.items():
            (etc / file).write_text(f"{Path('/etc', file).read_text().rstrip()}\n{line}\n")
        known = self._others() if name == self.names[0] else ""
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{known}")  # as on Raspberry Pi OS
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", sshd / "key")
        (sshd / "config").write_text(CONFIG)
        if name not in self._strangers:
            shutil.copy(self._folder / "user-key.pub", home / ".ssh" / "authorized_keys")

    def _others(self) -> str:
        return "".join(f"{self.lab.names.address(name)} {name}\n" for name in self.names[1:])

    def _fill_first(self, model: Path):
        ssh, halo = self.disk(self.names[0]) / "home" / USER / ".ssh", self.halo(self.names[0])
        shutil.copy(self._folder / "user-key", ssh / "id_ed25519")
        keys = [f"{name} {(self.disk(name) / 'sshd' / 'key.pub').read_text()}" for name in self.names]
        (ssh / "known_hosts").write_text("".join(keys))
        tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
        for file in tracked.split("\0"):
            if (ROOT / file).is_file():
                (halo / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, halo / file)
        call("git", "-C", halo, "init", "-q")
        call("git", "-C", halo, "add", ".")
        shutil.copytree(model, halo / "models" / model.name)
        venv = halo / ".venv"
        shutil.copytree(sys.prefix, venv, symlinks=True, ignore=shutil.ignore_patterns(*UNNEEDED))
        (venv / "halo-stamp").write_text(f"{HALO}\n\n\n")
        for finder in venv.glob("lib/python*/site-packages/__editable__*halo_mpi*"):
            finder.unlink()
        site = next(venv.glob("lib/python*/site-packages"))
        (site / "halo_mpi.pth").write_text(f"{HALO}\n")  # as an installation in this folder does

    def _serve(self, name: str) -> subprocess.Popen:
        closed = [folder for folder in Path(sys.base_prefix).parents if not folder.stat().st_mode & 0o001]
        variables = {
            "NAME": name, "DISK": self.disk(name), "PYTHON": sys.base_prefix, "REPOSITORY": ROOT,
            "ENVIRONMENT": os.path.realpath(sys.prefix),
            "PRIVATE": closed[-1] if closed else "", "SSHD": shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin"),
        }  # fmt: skip
        words = ["nsenter", f"--net={NETNS / self.lab.names.namespace(name)}", "unshare", "--mount", "--uts", "sh", "-c", HIDE]
        log = (self.disk(name) / "log").open("w")
        quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        return subprocess.Popen(words, env={**os.environ, **{key: str(value) for key, value in variables.items()}}, **quiet)


def call(*words) -> None:
    subprocess.run(list(map(str, words)), check=True, capture_output=True)


def until(done, most_s: float = 20.0) -> None:
    deadline = time.monotonic() + most_s
    while not done():
        assert time.monotonic() < deadline, f"not within {most_s:.0f} s"
        time.sleep(0.05)
