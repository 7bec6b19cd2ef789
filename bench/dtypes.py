"""What each storage dtype costs in perplexity: python -m bench.dtypes SOURCE.gguf [--tokens N] [--json FILE]

Every form of the model is converted and scored with `halo_mpi.evaluate` on one rank. "Without blocks" is the same model
with its hidden channels and FFN neurons shuffled (an exact symmetry of a LLaMA), so that the source's 4-bit blocks are torn
apart: what re-quantizing costs when the source has none. The text is Python's own language reference, from pydoc_data.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch

from bench.quality import language_reference
from halo_mpi.convert import write_model
from halo_mpi.versions import git_revision
from halo_mpi.sources import Source, open_source
from halo_mpi.store.encoding import Blocks

SEED = 1


class Shuffled:
    """A source whose hidden channels and FFN neurons are permuted; it computes the same function from f32 weights."""

    def __init__(self, source: Source):
        self.config = replace(source.config, name=source.config.name + " (shuffled)")
        self.tokenizer, self.summary, self._source = source.tokenizer, source.summary, source
        random = np.random.default_rng(SEED)
        self._hidden, self._neurons = random.permutation(source.config.hidden), random.permutation(source.config.ffn)
        self._matrices: dict[str, np.ndarray] = {}

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._matrix(name)[start:stop]

    def columns(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._matrix(name)[:, start:stop]

    def vector(self, name: str) -> np.ndarray | None:
        if name.endswith(".bias"):
            return self._source.vector(name)  # none of the models measured has any
        return self._source.vector(name)[self._hidden]

    def _matrix(self, name: str) -> np.ndarray:
        if name not in self._matrices:
            matrix = self._source.rows(name, 0, self._source.tensors[name].shape[0])
            matrix = matrix.dequantize() if isinstance(matrix, Blocks) else matrix
            kind = name.rpartition(".")[2]
            if kind in ("gate", "up"):
                matrix = matrix[self._neurons]
            elif kind == "down":
                matrix = matrix[:, self._neurons]
            matrix = matrix[self._hidden] if kind in ("o", "down") else matrix[:, self._hidden]
            self._matrices[name] = np.ascontiguousarray(matrix)
        return self._matrices[name]


FORMS = {
    "f32": ("f32", False),
    "bf16": ("bf16", False),
    "f16": ("f16", False),
    "int8": ("int8", False),
    "int4": ("int4", False),
    "int8, source without blocks": ("int8", True),
    "int4, source without blocks": ("int4", True),
}


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=2000, show_default=True, help="Tokens of text.")
@click.option("--context", default=512, show_default=True, help="Tokens per window.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the results to this file.")
def main(source: Path, tokens: int, context: int, out: Path | None) -> None:
    results = {}
    with tempfile.TemporaryDirectory() as name, open_source(source) as opened:
        folder = Path(name)
        (folder / "text").write_text(language_reference())
        for form, (dtype, shuffled) in FORMS.items():
            model = folder / "model.halo"
            write_model(Shuffled(opened) if shuffled else opened, model, dtype, 1, replace=True)
            size = sum(path.stat().st_size for path in model.iterdir())
            command = [sys.executable, "-m", "halo_mpi.evaluate", "--model", model, "--text", folder / "text"]
            options = ["--threads", 1, "--tokens", tokens, "--context", context, "--json", folder / "report.json"]
            subprocess.run(list(map(str, command + options)), check=True, stdout=subprocess.DEVNULL)
            report = json.loads((folder / "report.json").read_text())
            results[form] = {"perplexity": report["perplexity"], "bytes": size, "scored_tokens": report["scored_tokens"]}
            against = report["perplexity"] / results["f32"]["perplexity"] - 1
            print(f"{form:30} {size / 1e6:7.1f} MB   perplexity {report['perplexity']:9.4f}   {against:+.3%} of f32", flush=True)
    if out:
        machine = {
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        facts = {
            "git": git_revision(),
            "machine": machine,
            "source": source.name,
            "tokens": tokens,
            "context": context,
            "seed": SEED,
        }
        out.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
