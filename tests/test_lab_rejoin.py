"""A host that reboots is left out, and taken in again, in the laboratory."""

import json

import pytest

from tests.lab import event, run, scenario_file
from tests.mpi import EVEN

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(240)]
TOKENS, PACE_MS = 150, 80.0  # four syncs: a token takes 320 ms
AWAY_S = 12
# The reboot itself is heard of only when the host is back. Meanwhile another one loses MPI's daemon, and with it the job.
LOSS = (
    event("reboot", "at_token = 5", f"value = {AWAY_S}")
    + '[[event]]\nhost = "pi3"\naction = "kill-daemon"\nat_token = 5\nafter_s = 1\n'
)


def generated(folder, model, events, pace_ms, *options):
    """Exit code, text, standard error, and the lab's record."""
    scenario, record = scenario_file(folder, f"hosts = 3\npace_ms = {pace_ms}\n{events}"), folder / "record.json"
    words = ["run", scenario, "--launcher", "halo-mpirun", "--record", record, *options, "--"]
    words += [
        "python",
        "-m",
        "halo_mpi.generate",
        *EVEN,
        "--model",
        model,
        "--prompt",
        "The dog",
        "--wire",
        "f32",
        "--ignore-eos",
    ]
    done = run(*words, "--max-tokens", TOKENS, timeout=200)
    return done.returncode, done.stdout, done.stderr, json.loads(record.read_text())


def test_a_host_that_rebooted_is_taken_in_again_and_the_text_is_the_undisturbed_one(can, small, tmp_path):
    can("kernel")
    code, whole, err, _ = generated(tmp_path, small, "", 0.0)
    assert code == 0, err
    code, text, err, record = generated(tmp_path, small, LOSS, PACE_MS, "--mpirun-options", "--rejoin")
    told = [line.strip("\0 ") for line in err.splitlines() if "going on after" in line]
    assert (code, text) == (3, whole), err
    assert len(told) == 2 and "do not answer: pi2;" in told[0] and "taken in again, since they answer: pi2;" in told[1], err
    assert record["starts"] == 3 and "on 3 ranks" in err and not record["orphans"]
