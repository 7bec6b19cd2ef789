"""The other end of bench/peer.py: llama.cpp in a process of its own, which answers one case after the other."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import click

from bench.rank_cases import WARM_UP, Texts

PROGRAM = Path(__file__).with_name("peer.py")


class Opponent:
    """A running peer, or none if there is no interpreter for it: `facts` is None then."""

    def __init__(self, python: Path | None, gguf: Path | None, context: int):
        self.facts, self._process = None, None
        if python:
            command = [str(python), "-I", str(PROGRAM), str(gguf), str(context)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.facts = self._read()

    def __enter__(self) -> Opponent:
        return self

    def __exit__(self, *_) -> None:
        if self._process:
            self._process.stdin.close()
            self._process.wait()

    def run(self, texts: Texts, flash: bool) -> dict:
        """All cases, the warm-up first, with the end-of-text token banned."""
        found = {}
        for name, case in texts.cases.items():
            asked = {"ids": texts.ids[name], "tokens": case.tokens, "flash": flash, "banned": texts.banned}
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            found[name] = self._read()
        return {"cases": {name: each for name, each in found.items() if name != WARM_UP}}

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"the peer ended with exit code {self._process.wait()}")
        return json.loads(line)
