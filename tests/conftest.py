"""Models that several test files share, converted once."""

from dataclasses import replace
from pathlib import Path

import pytest

from halo_mpi.convert import write_model
from halo_mpi.sources import open_source
from tests.mpi import ROOT
from tests.tiny_models import TINY, write_tiny_hf

GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def converted(source: Path, out: Path, dtype: str, shards: int = 4) -> Path:
    with open_source(source) as opened:
        write_model(opened, out, dtype, shards)
    return out


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    if not GGUF.exists():
        pytest.skip("models/SmolLM2-135M-Instruct.Q4_1.gguf is missing; launch/test.sh fetches it")
    return GGUF


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf, tmp_path_factory):
    """SmolLM2-135M as a function of the dtype: a `.halo` folder, converted on first use."""
    folder = tmp_path_factory.mktemp("smollm2")

    def model(dtype: str) -> Path:
        path = folder / f"{dtype}.halo"
        return path if path.exists() else converted(smollm2_gguf, path, dtype)

    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A small random model in f32, three shards."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_hf(folder / "source", replace(TINY, context=512))
    return converted(folder / "source", folder / "tiny.halo", "f32", shards=3)
