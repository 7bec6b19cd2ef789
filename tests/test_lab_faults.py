"""What the laboratory breaks beyond links and ranks: daemons, whole hosts, memory, answers; and runs that are started again."""

import json
import socket
import subprocess
import sys
import threading
import time

import pytest

from bench.lab.director import Director
from bench.lab.lab import Lab
from bench.lab.memory import kill_for_memory
from bench.lab.scenario import Event, Host, Scenario
from bench.lab.system import inside
from tests.lab import event, lab_of, leftovers, program, run, scenario_file

pytestmark = [pytest.mark.lab, pytest.mark.timeout(60)]


@pytest.fixture
def three(can):
    can("kernel")
    hosts = {"pi1": Host(), "pi2": Host(pace_ms=2.0), "pi3": Host(pace_ms=3.0)}
    with Lab(Scenario("test", hosts, (Event("pi3", "nan", trigger=("token", 5)),))) as lab:
        yield lab


def pace(lab: Lab, rank: int) -> dict:
    return json.loads((lab.marks / f"pace-{rank}.json").read_text())


def connected(lab: Lab) -> tuple[subprocess.Popen, socket.socket]:
    """A process on pi2, and a connection from pi1 to it."""
    code = (
        "import socket; s = socket.create_server(('', 7010)); print(flush=True); c = s.accept()[0]; c.sendall(b'1'); s.accept()"
    )
    server = subprocess.Popen([lab.agent, "pi2", f'{sys.executable} -c "{code}"'], stdout=subprocess.PIPE)
    server.stdout.readline()
    client = inside(lab.names.namespace("pi1"), lambda: socket.create_connection((lab.names.address("pi2"), 7010), 5))
    assert client.recv(1) == b"1"
    return server, client


def test_a_rebooting_host_dies_in_silence_and_comes_back_without_its_connections(three):
    director = Director(three)
    server, client = connected(three)
    with client:
        director._do(Event("pi2", "reboot", 3.0), 0.0)
        with pytest.raises(TimeoutError):
            client.settimeout(1.5)
            client.recv(1)
        assert server.poll() is None, "the connection that started it hears of nothing either"
        away = subprocess.run([three.agent, "pi2", "true"], capture_output=True, text=True)
        assert (away.returncode, away.stderr) == (255, "connect to host pi2: Connection timed out\n")
        director._do(Event("pi2", "boot"), 3.0)
        client.settimeout(10)
        with pytest.raises(ConnectionResetError):
            client.sendall(b"2")
            client.recv(1)
    assert server.wait(5) and subprocess.run([three.agent, "pi2", "true"]).returncode == 0
    assert not any("failed" in entry for entry in director.log)


def test_a_process_without_memory_is_ended_by_the_kernel_or_by_a_signal(three):
    code = "import time; print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    reaper = threading.Thread(target=process.wait)
    reaper.start()
    assert kill_for_memory(process.pid, f"{three.names.lab}-test") in ("kernel", "signal")
    reaper.join()
    assert process.returncode == -9


def test_answers_are_spoiled_on_the_host_that_the_event_names(three):
    director = Director(three)
    director.begin(0.0)
    director.token(5, 1.0)
    director.act(1.0)
    assert [pace(three, rank).get("spoil", False) for rank in range(3)] == [False, False, True]


def test_a_second_start_fires_nothing_twice_and_ranks_go_by_where_they_are(three):
    director = Director(three)
    director.begin(0.0)
    director.token(5, 1.0)
    director.act(1.0)
    director.rank_is_on(0, "pi1")
    director.rank_is_on(1, "pi3")  # without pi2
    director.begin(3.0)
    director.token(5, 4.0)
    director.act(4.0)
    assert [entry["action"] for entry in director.log] == ["nan"]
    assert pace(three, 1) == {"pace_ms": 3.0, "slowdown": 1.0, "spoil": True, "row_share": 0.0}


def test_a_killed_daemon_ends_the_run_and_leaves_nobody(can, tmp_path):
    can("kernel")
    file, record = scenario_file(tmp_path, "hosts = 3\n" + event("kill-daemon", "at_s = 0.3")), tmp_path / "record.json"
    done = run("run", file, "--timeout", 20, "--marks", "--record", record, *program("lab_marks.py", 100_000, 1))
    written = json.loads(record.read_text())
    assert [(e["host"], e["action"], e.get("failed")) for e in written["events"]] == [("pi2", "kill-daemon", None)]
    assert written["exit_code"] == done.returncode != 124 and written["orphans"] is not None
    assert leftovers(lab_of(done.stdout)) == []


def test_halo_mpirun_in_a_lab_passes_its_exit_code_on(can, tmp_path):
    can("kernel")
    record = tmp_path / "record.json"
    words = ("run", scenario_file(tmp_path, "hosts = 3\n"), "--launcher", "halo-mpirun", "--record", record)
    done = run(*words, *program("lab_hosts.py", 3, "own"))
    assert done.returncode == 3, done.stderr
    said, written = json.loads(done.stdout), json.loads(record.read_text())
    assert said["hosts"] == ["pi1", "pi2", "pi3"] and leftovers(said["lab"]) == []
    assert (written["launcher"], written["orphans"]) == ("halo-mpirun", [])


def test_the_launcher_can_be_told_to_end(can, tmp_path):
    can("kernel")
    file, record = scenario_file(tmp_path, 'hosts = 2\n[[event]]\nat_s = 0.3\naction = "terminate"\n'), tmp_path / "record.json"
    words = ("--launcher", "halo-mpirun", "--timeout", 30, "--marks", "--record", record)
    begin = time.monotonic()
    done = run("run", file, *words, *program("lab_marks.py", 100_000, 1))
    assert done.returncode not in (0, 124) and time.monotonic() - begin < 30
    assert [entry["action"] for entry in json.loads(record.read_text())["events"]] == ["terminate"]
    assert leftovers(lab_of(done.stdout)) == []
