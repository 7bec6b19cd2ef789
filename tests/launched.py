"""launch/halo-mpirun with a program that can be disturbed in the middle of its text, and what it started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.lab.processes import parent_of
from tests.mpi import EVEN, ROOT

TEXT = (*EVEN, "--wire", "f32", "--prompt", "The quick", "--max-tokens", "40", "--ignore-eos", "--temperature", "1.0",
        "--seed", "5")  # fmt: skip


class Launched:
    """halo-mpirun with the slow program, and its processes."""

    def __init__(self, model, *arguments, options=("-n", "3"), program="tests.programs.slow",
                 launcher=ROOT / "launch" / "halo-mpirun", **environ):  # fmt: skip
        self.mark = f"HALO_TEST_MARK={os.getpid()}-{time.monotonic_ns()}"
        name, value = self.mark.split("=")
        command = [sys.executable, launcher, *options, sys.executable, "-m", program, "--model", model]
        self.process = subprocess.Popen(
            list(map(str, [*command, *arguments])),
            env={**os.environ, "PYTHONPATH": str(ROOT), **environ, name: value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.out = b""

    def until(self, count):
        """Wait until so many bytes of the text are there."""
        while len(self.out) < count:
            data = os.read(self.process.stdout.fileno(), 1)
            assert data, self.process.stderr.read().decode()
            self.out += data
        return self

    def processes(self):
        """Pid and environment of everything that it started."""
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = Path("/proc", entry, "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if self.mark in environment and int(entry) != self.process.pid:
                yield int(entry), environment

    def rank(self, number):
        names = {f"OMPI_COMM_WORLD_RANK={number}", f"PMI_RANK={number}"}
        return next(pid for pid, environment in self.processes() if names & set(environment))

    def mpirun(self):
        return next(pid for pid, _ in self.processes() if parent_of(pid) == self.process.pid)

    def send(self, pid, number=signal.SIGKILL):
        os.kill(pid, number)
        return self

    def end(self, timeout=45):
        """(exit code, text, standard error, seconds that it took)"""
        begin = time.monotonic()
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            pytest.fail(f"hang: {self.process.communicate(timeout=20)}")
        took = time.monotonic() - begin
        left = [pid for pid, _ in self.processes()]
        assert not left, left
        return self.process.returncode, self.out + out, err.decode(), took
