"""What several test files share: models, converted once, and what laboratories this machine can have."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from bench.lab.scenario import Host, Scenario
from halo_mpi.convert import write_model
from halo_mpi.sources import open_source
from tests.lab import why_not
from tests.launched import TEXT, Launched
from tests.mpi import ROOT, halo, mpi_is_open_mpi, succeed
from tests.tiny_models import TINY, write_tiny_hf

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored, also by what is started here
GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def converted(source: Path, out: Path, dtype: str, shards: int = 4) -> Path:
    with open_source(source) as opened:
        write_model(opened, out, dtype, shards)
    return out


def calibrate(model: Path, *options, ranks: int = 1) -> None:
    succeed(halo(ranks, "calibrate", model, *map(str, options)))


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


@pytest.fixture(scope="session")
def light(tmp_path_factory) -> Path:
    """The tiny model in int8, which starts in half the time, without PyTorch. For tests that compare texts of the same placement at most:
    rounding to 8 bits makes more of the order in which partial sums are added."""
    folder = tmp_path_factory.mktemp("light")
    write_tiny_hf(folder / "source", replace(TINY, context=512))
    return converted(folder / "source", folder / "light.halo", "int8", shards=3)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A tiny model with work for each of eight ranks: eight heads, eight groups, two layers."""
    folder = tmp_path_factory.mktemp("small")
    write_tiny_hf(folder / "source", replace(TINY, hidden=128, heads=8, kv_heads=8, ffn=256, context=512))
    return converted(folder / "source", folder / "small.halo", "f32")


@pytest.fixture(scope="session")
def deep(tmp_path_factory) -> Path:
    """A tiny model with layers between the first and the last, which are always exact."""
    folder = tmp_path_factory.mktemp("deep")
    write_tiny_hf(folder / "source", replace(TINY, layers=5))
    return converted(folder / "source", folder / "deep.halo", "f32", shards=1)


@pytest.fixture(scope="session")
def expected(deep):
    """The deep model's logits of the simulator's text, on a perfect wire and with nothing that moves."""
    import torch

    from tests.simulator import CONTEXT, IDS, NO_STALL, QUICK, RANKS, STRICT, Simulation

    torch.set_grad_enabled(False)
    return Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, CONTEXT).text(IDS, 0)


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory) -> Path:
    """The deep model, calibrated on the text that is shipped."""
    folder = tmp_path_factory.mktemp("calibrated")
    write_tiny_hf(folder / "source", replace(TINY, layers=5))
    model = converted(folder / "source", folder / "calibrated.halo", "f32", shards=2)
    calibrate(model, "--tokens", 4000, "--window", 64)
    return model


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Path:
    """A small random model whose prompts make messages of more than 64 KiB."""
    folder = tmp_path_factory.mktemp("wide")
    write_tiny_hf(folder / "source", replace(TINY, hidden=512, layers=3, context=512))
    return converted(folder / "source", folder / "wide.halo", "f32", shards=1)


@pytest.fixture(scope="session")
def can():
    """Skips what this machine has no means for."""
    known: dict[str, str | None] = {}

    def check(backend: str, **link) -> None:
        key = f"{backend} {sorted(link)}"
        if key not in known:
            known[key] = why_not(backend, Scenario("probe", {h: Host(**link) for h in ("pi1", "pi2")}))
        if known[key]:
            pytest.skip(known[key])

    return check


def undisturbed(model: Path) -> bytes:
    """The text of a run that nothing happens to."""
    code, out, err, _ = Launched(model, *TEXT, program="halo_mpi.generate").end()
    assert code == 0, err
    return out


@pytest.fixture(scope="session")
def whole(tiny):
    return undisturbed(tiny)


@pytest.fixture(scope="session")
def whole_light(light):
    return undisturbed(light)


@pytest.fixture
def hosts(tmp_path):
    """A hostfile of this computer and two others, and an agent that reaches them until their names are in the file `dead`."""
    if not mpi_is_open_mpi():
        pytest.skip("uses the launch agent of Open MPI")
    agent, dead, hostfile = tmp_path / "agent", tmp_path / "dead", tmp_path / "hosts"
    agent.write_text(f'#!/bin/sh\ngrep -qx "$1" {dead} && exit 255\nshift\nexec /bin/sh -c "$*"\n')
    agent.chmod(0o755)
    dead.write_text("")
    hostfile.write_text("localhost slots=1\nboard-a slots=1\nboard-b slots=1\n")
    return ("-hostfile", hostfile, "--prtemca", "plm_ssh_agent", agent, "--mca", "coll", "^han"), dead
