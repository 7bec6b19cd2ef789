"""A Slurm of its own in the lab: the controller on the first host, a slurmd on each, as on a cluster with a shared disk."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from bench.lab.lab import Lab
from tests.mpi import ROOT

DAEMONS = os.environ["PATH"] + ":/usr/sbin"
TOOLS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "scontrol": "slurm-wlm", "munged": "munge", "mungekey": "munge"}
# proctrack and task: cgroups are hidden in a namespace of the lab. cred_expire: a job that is queued again starts after that time.
CONFIG = """
ClusterName=lab
SlurmctldHost={first}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_tools() -> str:
    """Why there is no Slurm here; empty if there is."""
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool, path=DAEMONS) is None}
    return f"apt-get install {' '.join(sorted(missing))}" if missing else ""


class SlurmLab:
    """`folder`: for all that Slurm writes."""

    def __init__(self, lab: Lab, folder: Path):
        self._lab, self._folder, self._daemons = lab, folder, []
        self._began = time.monotonic()
        hosts = list(lab.scenario.hosts)
        nodes = [f"NodeName={host} NodeAddr={lab.names.address(host)} CPUs=2 State=UNKNOWN" for host in hosts]
        for name in ("state", *(f"{kind}-{host}" for kind in ("spool", "tmp") for host in hosts)):
            (folder / name).mkdir(parents=True)
        self.first, self.config = hosts[0], folder / "slurm.conf"
        text = CONFIG.format(folder=folder, first=self.first, address=lab.names.address(self.first))
        self.config.write_text(text + "\n".join(nodes) + "\n")

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for daemon in reversed(self._daemons):
            os.killpg(daemon.pid, signal.SIGTERM)
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()

    def run(self, *words) -> str:
        """What a command of the user on the first host prints; it must succeed."""
        done = subprocess.run(self._on(self.first, " ".join(map(str, words))), capture_output=True, text=True, timeout=30, env=self._environment,
                              cwd=ROOT, stdin=subprocess.DEVNULL)  # fmt: skip
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def submit(self, *words) -> str:
        """The job's number."""
        job = self.run("sbatch", "--parsable", *words).strip()
        self._say(f"$ sbatch {' '.join(map(str, words))}\nSubmitted batch job {job}")
        return job

    def state(self, job: str) -> str:
        shown = self.run("scontrol", "-o", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0]

    def end_of(self, job: str, most_s: float) -> str:
        """The state of a job that will not run again."""
        deadline, known = time.monotonic() + most_s, ""
        while True:
            state = self.state(job)
            if state != known:
                self._say(f"job {job}: {state}")
            if state not in ("PENDING", "RUNNING", "COMPLETING"):
                return state
            assert time.monotonic() < deadline, f"{state} after {most_s:.0f} s"
            known = state
            time.sleep(0.5)

    def _say(self, what: str) -> None:
        """Part of the transcript, which `pytest -s` shows."""
        print(f"{time.monotonic() - self._began:6.1f} s  {what}")

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.config), "PATH": DAEMONS}

    def _on(self, host: str, command: str) -> list:
        return [self._lab.agent, host, command]

    def _start(self):
        folder = self._folder
        subprocess.run(["mungekey", "-c", "-k", folder / "munge.key"], check=True, env=self._environment)
        files = [f"--{name}={folder / f'munge.{end}'}" for name, end in
                 {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}.items()]  # fmt: skip
        self._daemon(["munged", "--foreground", "--force", *files])
        self._daemon(self._on(self.first, f"exec slurmctld -D -f {self.config}"))
        for host in self._lab.scenario.hosts:
            self._daemon(self._on(host, f"exec slurmd -D -f {self.config} -N {host}"))
        deadline = time.monotonic() + 30
        while not self._all_idle():
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.3)

    def _all_idle(self) -> bool:
        told = subprocess.run(self._on(self.first, "sinfo -h -N -o %T"), capture_output=True, text=True, env=self._environment)
        return told.returncode == 0 and set(told.stdout.split()) == {"idle"}

    def _daemon(self, words: list):
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._daemons.append(subprocess.Popen(list(map(str, words)), env=self._environment, start_new_session=True, **quiet))
