"""How many rows of the head each rank gets."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from halo_mpi.engine.root import PREFILL_ROWS
from halo_mpi.model.shapes import SHAPES
from halo_mpi.model.sizes import Sizes
from halo_mpi.plan import plan
from halo_mpi.schedule.cost import Cluster, Device
from halo_mpi.schedule.head import MOST_VECTORS, HeadSplit, best_head, head_ms, most_rows
from halo_mpi.schedule.shares import Work, with_cost

SMOLLM2 = SHAPES["smollm2-135m"]
WORK = Work.of(Sizes(SMOLLM2, "int4", "int8"), 512)
MOST = most_rows(SMOLLM2.hidden)
PI = Device("pi", 1.0, 1.0, link_ms=0.3, kb_ms=0.008)


def cluster(*workers: Device, root: Device = replace(PI, link_ms=0.0), head_ms: float = 9.0, kb_ms: float = 0.008) -> Cluster:
    return Cluster([root, *workers], 0.1, 0.05, head_ms, kb_ms)


def best(devices: Cluster, **options) -> HeadSplit:
    ranks = len(devices.devices)
    shares = with_cost(devices, WORK, [9] + [0] * (ranks - 1), [12] + [0] * (ranks - 1))
    return best_head(devices, WORK, shares, MOST, **options)


def test_devices_that_are_alike_share_the_head_and_the_root_has_most():
    found = best(cluster(PI, PI, PI))
    root, *workers = found.rows
    assert sum(found.rows) == 49152 and all(rows % 16 == 0 for rows in workers)
    assert max(workers) - min(workers) <= 16 and 1.0 < root / min(workers) < 1.5
    assert found.ms < 0.4 * found.alone_ms and found.ms == head_ms(cluster(PI, PI, PI), WORK, found.rows)


@pytest.mark.parametrize("step", [16, 512, 4096])
def test_no_other_rows_are_much_faster(step):
    devices = cluster(PI, replace(PI, ffn_ms=3.0), replace(PI, kb_ms=0.08), replace(PI, link_ms=2.0), kb_ms=0.02)
    found = best(devices)
    for giver in range(5):
        for taker in range(5):
            rows = list(found.rows)
            if rows[giver] >= step and giver != taker:
                rows[giver] -= step
                rows[taker] += step
                assert head_ms(devices, WORK, rows) > 0.98 * found.ms


def test_slow_devices_get_less_and_slow_links_nothing():
    found = best(cluster(PI, replace(PI, ffn_ms=4.0), replace(PI, link_ms=8.0), replace(PI, kb_ms=1.0)))
    root, like, slow, far, narrow = found.rows
    assert like > 2 * slow > 0 and far == 0 and narrow < 0.1 * like


@pytest.mark.parametrize(
    "devices",
    [
        cluster(replace(PI, kb_ms=None), replace(PI, kb_ms=None)),
        cluster(replace(PI, late_rate=0.1), replace(PI, late_rate=0.1)),
        cluster(replace(PI, memory=0), replace(PI, memory=2**10)),
        cluster(PI, PI, head_ms=0.4),
        cluster(PI, PI, kb_ms=1.0),
        cluster(PI, PI, root=replace(PI, memory=20 * 2**20, read_gbps=1.0)),
        cluster(),
    ],
    ids=[
        "unknown links",
        "unstable links",
        "no memory",
        "hardly worth it",
        "the root's narrow line",
        "a root that reads",
        "alone",
    ],
)
def test_the_root_scores_all_where_splitting_does_not_pay(devices):
    found = best(devices)
    assert not found.is_split and found.rows[0] == 49152 and found.ms == found.alone_ms


def test_memory_limits_the_rows():
    found = best(cluster(replace(PI, memory=3_000_000), PI))
    assert 0 < found.rows[1] * WORK.output_bytes / 49152 <= 3_000_000 and found.rows[2] > 2 * found.rows[1]


def test_longer_messages_are_worth_it_for_fewer_tokens_at_once():
    narrow, wide = best(cluster(PI, PI, kb_ms=0.03)), best(cluster(PI, PI, kb_ms=0.003))
    assert 1 <= narrow.tokens < wide.tokens
    assert best(cluster(PI, PI, kb_ms=0.03), score_bytes=4).ms > narrow.ms


def test_an_answer_fits_into_a_message():
    assert MOST_VECTORS == PREFILL_ROWS and MOST == 64 * 576 - 16
    assert max(best(cluster(replace(PI, ffn_ms=0.01), head_ms=90)).rows[1:]) <= MOST


def test_plan_tells_the_rows_and_reads_them_again(tmp_path):
    file = tmp_path / "devices.json"
    worker = {"name": "pi4", "count": 3, "speed": 3, "link_ms": 0.3, "mbit": 1000}
    file.write_text(json.dumps({"devices": [{"name": "root", "speed": 3, "mbit": 1000}, worker]}))
    options = ["--shape", "smollm2-135m", "--devices", str(file)]
    told = CliRunner().invoke(plan, options, obj=None)
    assert "with --head auto: " in " ".join(told.output.split()), told.output
    printed = json.loads(CliRunner().invoke(plan, [*options, "--json"], obj=None).output)
    rows = printed["head"]["rows"]
    assert sum(rows) == 49152 and min(rows) > 0
    file.write_text(json.dumps(printed))
    assert json.loads(CliRunner().invoke(plan, [*options, "--json"], obj=None).output)["head"]["rows"] == rows
    file.write_text(json.dumps({"devices": [{"speed": 3}, {"speed": 3, "link_ms": 0.3}]}))
    assert "is not known without kb_ms or mbit" in " ".join(CliRunner().invoke(plan, options, obj=None).output.split())
