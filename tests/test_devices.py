"""Devices in a file, without MPI, and what their loss would mean."""

import json
import re

import pytest

from halo_mpi.errors import InputError
from halo_mpi.model.shapes import SHAPES
from halo_mpi.schedule.cost import Cluster, Device
from halo_mpi.model.sizes import Sizes
from halo_mpi.schedule.devices import read_devices
from halo_mpi.schedule.losses import Loss, losses_of_one, most_lost
from halo_mpi.schedule.shares import Work, best_shares
from tests.mpi import halo, succeed

SMOLLM2 = SHAPES["smollm2-135m"]

DEVICES = {"devices": [{"name": "pi5", "speed": 8.0, "memory": "6G"},
                       {"name": "pi4", "count": 3, "speed": 2.0, "link_ms": 0.4, "mbit": 100, "loss": 0.02}]}  # fmt: skip


def devices_file(folder, content):
    path = folder / "devices.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file_of_devices(tmp_path):
    cluster = read_devices(devices_file(tmp_path, DEVICES), Sizes(SMOLLM2), 512)
    root, worker = cluster.devices[0], cluster.devices[3]
    assert len(cluster.devices) == 4 and root.memory == 6 * 2**30 and worker.memory is None
    assert root.ffn_ms == pytest.approx(4 * 3 * 576 * 1536 / 8e6) and worker.ffn_ms == pytest.approx(4 * root.ffn_ms)
    assert cluster.head_ms == pytest.approx(4 * 576 * 49152 / 8e6)
    assert cluster.further_ms == 0 and worker.link_ms == pytest.approx(0.4 + 2 * 8 * 1168 / 1e5)
    assert worker.late_rate == pytest.approx(2 * 0.02**2, rel=1e-3)


@pytest.mark.parametrize(
    "content, part",
    [
        ("{", "no JSON file"),
        ([], 'must be {"devices"'),
        ({"devices": []}, 'must be {"devices"'),
        ({"devices": [{"speed": 1}], "more": 1}, 'must be {"devices"'),
        ({"devices": [{"speed": 1, "sped": 1}]}, r"device 0: \['sped'\] is unknown"),
        ({"devices": [{"speed": 1}, {}]}, "device 1 needs a speed"),
        ({"devices": [{"speed": 0}]}, "speed '0' is not a number from"),
        ({"devices": [{"speed": "fast"}]}, "speed 'fast' is not a number"),
        ('{"devices": [{"speed": NaN}]}', "speed 'nan' is not a number"),
        ({"devices": [{"speed": 10**400}]}, "speed '1000.*' is not a number"),
        ({"devices": [{"speed": 1, "loss": 2}]}, "loss '2' is not a number from 0 to 1"),
        ({"devices": [{"speed": 1, "late_rate": 0.1, "loss": 0.1}]}, "either loss or late_rate"),
        ({"devices": [{"attention_ms": 0, "ffn_ms": 0}]}, "attention_ms '0' is not"),
        ({"devices": [{"speed": 1, "count": True}]}, "count True is not"),
        ({"devices": [{"speed": 1, "count": 4000}] * 2}, "more than 4096 devices"),
        ({"devices": [{"speed": 1, "read_gbps": 0}]}, "read_gbps '0' is not a number from"),
        ({"devices": [{"speed": 1, "memory": "much"}]}, "memory 'much' is not a size"),
        ({"model": "another", "devices": [{"speed": 1}]}, "has the times of another"),
    ],
)
def test_a_wrong_file_of_devices_is_told(tmp_path, content, part):
    with pytest.raises(InputError, match=re.escape(str(tmp_path)) + ".*" + part):
        read_devices(devices_file(tmp_path, content), Sizes(SMOLLM2), 512)


def test_hundreds_of_devices_and_a_model_that_is_not_on_disk(tmp_path):
    content = {
        "devices": [{"speed": 8, "memory": "8G"}, {"count": 299, "speed": 3, "memory": "4G", "link_ms": 1}],
        "further_ms": 0.001,
    }
    options = ("--shape", "llama-2-70b", "--devices", devices_file(tmp_path, content), "--json")
    planned = json.loads(succeed(halo(1, "plan", *options)).out)
    chosen = planned["options"][planned["chosen"]]
    assert len(planned["devices"]) == 300 and sum(chosen["heads"]) == 64 and sum(chosen["groups"]) == 28672 // 128
    assert "root alone" not in planned["options"]


def test_what_plan_prints_as_json_is_a_file_of_devices(tmp_path):
    first = succeed(halo(1, "plan", "--shape", "tinyllama", "--devices", devices_file(tmp_path, DEVICES), "--json")).out
    again = succeed(halo(1, "plan", "--shape", "tinyllama", "--devices", devices_file(tmp_path, first), "--json")).out
    assert json.loads(again) == json.loads(first)


def test_what_is_read_is_shown_and_read_again(tmp_path):
    content = {"devices": [{"speed": 8}, {"speed": 8, "memory": "200M", "read_gbps": 4}]}
    shape = ("--shape", "tinyllama", "--dtype", "f32")
    options = (*shape, "--devices", devices_file(tmp_path, content))
    table = succeed(halo(1, "plan", *options)).out
    first = succeed(halo(1, "plan", *options, "--json")).out
    again = succeed(halo(1, "plan", *shape, "--devices", devices_file(tmp_path, first), "--json")).out
    planned = json.loads(first)
    chosen = planned["options"][planned["chosen"]]
    assert planned == json.loads(again) and planned["devices"][1]["read_gbps"] == 4
    assert chosen["read_bytes"][0] == 0 < chosen["read_bytes"][1] and chosen["bytes"][1] <= 200 * 2**20
    assert "read" in table and f"│{chosen['read_bytes'][1] / 2**20:.0f}│" in table


def cluster_of(*workers: Device) -> Cluster:
    return Cluster([Device("root", 20, 20, memory=None), *workers], 0.3, 0.05)


def test_without_a_device_a_token_takes_what_the_others_take():
    slow, fast = Device("slow", 20, 20, link_ms=0.1), Device("fast", 5, 5, link_ms=0.1)
    work = Work.of(Sizes(SMOLLM2), 512)
    losses = losses_of_one(cluster_of(slow, fast, slow), work)
    assert [loss.ranks for loss in losses] == [(1, 3), (2,)]
    assert losses[1].tpot_ms == pytest.approx(best_shares(cluster_of(slow, slow), work).cost.tpot_ms)
    assert losses[0].tpot_ms < losses[1].tpot_ms and most_lost(cluster_of(slow, fast, slow), work) == 3


def test_so_many_may_be_lost_as_the_others_memory_holds():
    work = Work.of(Sizes(SMOLLM2), 512)
    root = Device("root", 20, 20, memory=200 * 2**20)
    workers = [Device("pi", 20, 20, link_ms=0.1, memory=size * 2**20) for size in (150, 150, 150, 400)]
    assert most_lost(Cluster([root, *workers]), work) == 1
    assert not [loss for loss in losses_of_one(Cluster([root, *workers]), work) if loss.tpot_ms is None]
    assert losses_of_one(Cluster([root, workers[3]]), work) == [Loss((1,), None)] and not most_lost(
        Cluster([root, workers[3]]), work
    )


def test_a_shard_that_only_one_disk_holds_is_missed():
    work, half = Work.of(Sizes(SMOLLM2), 512), Device("pi", 20, 20, link_ms=0.1, disk_heads=4, disk_groups=6)
    losses = losses_of_one(Cluster([Device("root", 20, 20, disk_heads=5, disk_groups=6), half]), work)
    assert losses == [Loss((1,), None)]


@pytest.mark.parametrize(
    "memory, line", [("6G", "One worker may be lost: a token takes at most"), ("1500M", "Without rank 1, 2 nothing goes on")]
)
def test_plan_tells_what_a_loss_would_mean(tmp_path, memory, line):
    content = {"devices": [{"speed": 8, "memory": memory}, {"speed": 4, "memory": "1500M", "count": 2}]}
    shape = ("--shape", "tinyllama", "--dtype", "f32")
    options = (*shape, "--devices", devices_file(tmp_path, content))
    assert line in " ".join(succeed(halo(1, "plan", *options)).out.split())
