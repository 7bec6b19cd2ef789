"""launch/setup-pis.sh among hosts with disks, users and an sshd of their own, and the text that they write afterwards."""

import json
from dataclasses import replace

import pytest

from bench.lab.lab import Lab
from bench.lab.scenario import Host, Scenario
from tests.conftest import converted
from tests.lab import leftovers
from tests.mpi import ROOT
from tests.pi_lab import HALO, PiLab, missing_tools
from tests.tiny_models import TINY, write_tiny_hf

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(300)]
GENERATE = (".venv/bin/python -m halo_mpi.generate --model models/tiny.halo --placement importance --wire f32"
            " --prompt 'The quick brown fox' --max-tokens 12 --ignore-eos")  # fmt: skip


@pytest.fixture
def cluster(can, tmp_path):
    """Three boards that are friends, and a fourth which does not know the first one's key."""
    can("kernel")
    if reason := missing_tools():
        pytest.skip(reason)
    write_tiny_hf(tmp_path / "source", replace(TINY, hidden=128, heads=4, kv_heads=4, head_dim=32, ffn=256, context=128))
    model = converted(tmp_path / "source", tmp_path / "tiny.halo", "int4")
    hosts = {f"pi{number}": Host() for number in (1, 2, 3, 4)}
    with Lab(Scenario("test", hosts)) as lab:
        with PiLab(lab, tmp_path, model, strangers=("pi4",)) as pis:
            (pis.halo("pi1") / "hosts").write_text("pi1 slots=1\npi2 slots=1\npi3 slots=1\n")
            (pis.halo("pi1") / "all").write_text("pi1 slots=1\npi2 slots=1\npi3 slots=1\npi4 slots=1\n")
            yield pis
        marks = lab.marks
    assert leftovers(marks) == []


def said(done) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def test_bare_hosts_write_a_text_together_after_one_command(cluster):
    first = cluster.run("bash launch/setup-pis.sh all models/tiny.halo --spread")
    told = said(first)
    assert first.returncode == 1, (first.stdout, first.stderr)
    assert told["pi1"] == "this computer"
    assert told["pi4"].startswith("not set up: pi@pi4: Permission denied") and told["pi4"].endswith("ssh-copy-id pi4")
    for name in ("pi2", "pi3"):
        assert told[name].startswith("copied code (") and told[name].endswith("halo_mpi starts there"), told
        assert (cluster.halo(name) / "halo_mpi/generate.py").read_text() == (ROOT / "halo_mpi/generate.py").read_text()
        assert len(list((cluster.halo(name) / "models/tiny.halo").iterdir())) < 5, "some shards"

    again = said(cluster.run("bash launch/setup-pis.sh all models/tiny.halo --spread"))
    assert again == told | dict.fromkeys(("pi2", "pi3"), "nothing to copy, and halo_mpi starts there")

    alone = cluster.run(f"{GENERATE}")
    assert alone.returncode == 0, alone.stderr
    together = cluster.run(f"launch/halo-mpirun -hostfile hosts {GENERATE} --json report.json")
    assert (together.returncode, together.stdout) == (0, alone.stdout), together.stderr
    report = json.loads((cluster.halo("pi1") / "report.json").read_text())
    assert [device["host"] for device in report["devices"]] == ["pi1", "pi2", "pi3"]
    assert all(device["weights_bytes"] for device in report["devices"])

    plain = cluster.run(f"export PATH={HALO}/.venv/bin:$PATH && mpirun -x PATH -hostfile hosts {GENERATE}")
    assert (plain.returncode, plain.stdout) == (0, alone.stdout), plain.stderr
