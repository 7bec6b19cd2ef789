"""The laboratory does what it says, and leaves nothing behind."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from statistics import mean, median

import pytest

from bench.lab.costs import round_trips_us, udp_socket
from bench.lab.director import Director
from bench.lab.lab import Lab, is_owned
from bench.lab.run import marks_progress
from bench.lab.scenario import Burst, Event, Host, Scenario, load_scenario
from bench.lab.system import LabError, inside
from tests.mpi import ROOT

PROGRAMS = ROOT / "tests" / "programs"
SCENARIOS = ROOT / "bench" / "scenarios"
ONE_IN_A_MILLION = 4.89  # standard deviations
BACKENDS = ("kernel", "relay")
SO_RCVBUFFORCE = 33
ETH_P_ALL = 3

pytestmark = [pytest.mark.lab, pytest.mark.timeout(60)]


def why_not(backend: str, scenario: Scenario) -> str | None:
    try:
        with Lab(scenario, backend):
            return None
    except (LabError, OSError) as error:
        return str(error)


@pytest.fixture(scope="module")
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


@contextmanager
def lossy_lab(backend: str, *links: Host, seed: int = 0, **scenario):
    hosts = {f"pi{i}": link for i, link in enumerate(links, 1)}
    with Lab(Scenario("test", hosts, **scenario), backend, seed) as lab:
        round_trips_us(lab, 2)  # address resolution
        lab.conditions.lossy = True
        lab.apply()
        yield lab


def numbers_received(lab: Lab, number: int, sender: str = "pi1", receiver: str = "pi2", size: int = 64) -> list[int]:
    """Sends numbered UDP packets, a few at a time so that no queue overflows; the numbers in order of arrival."""
    with udp_socket(lab, sender) as outgoing, udp_socket(lab, receiver) as incoming:
        incoming.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        incoming.settimeout(0.3)
        there = incoming.getsockname()
        for i in range(number):
            outgoing.sendto(i.to_bytes(4, "big").ljust(size, b"."), there)
            if i % 50 == 49:
                time.sleep(0.0005)
        received = []
        try:
            while True:
                received.append(int.from_bytes(incoming.recv(2048)[:4], "big"))
        except TimeoutError:
            return received


def lanes(lab: Lab) -> dict:
    return {(lane.host, lane.direction): lane for lane in lab.links.lanes()}


# Losses


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_are_as_many_as_the_scenario_says_and_as_the_counters_tell(can, backend):
    can(backend)
    number, loss = 10_000, 0.1
    with lossy_lab(backend, Host(loss=loss), Host(loss=loss)) as lab:
        there, back = len(numbers_received(lab, number)), len(numbers_received(lab, number, "pi2", "pi1"))
        counted = lanes(lab)
    spread = ONE_IN_A_MILLION * sqrt(number * loss * (1 - loss))
    for received, direction in ((there, "down"), (back, "up")):
        assert abs(number - received - number * loss) <= spread
        lane = counted["pi2", direction]
        assert (lane.judged, lane.dropped) == (number, number - received)
    assert counted["pi1", "up"].judged == counted["pi1", "down"].judged == 0, "each packet is judged once"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_worse_link_of_two_hosts_judges(can, backend):
    can(backend)
    number = 1000
    with lossy_lab(backend, Host(), Host(loss=0.5), Host()) as lab:
        assert len(numbers_received(lab, number, "pi1", "pi3")) == number
        received = len(numbers_received(lab, number, "pi2", "pi3"))
        counted = lanes(lab)
        lab.conditions.lossy = False
        lab.apply()
        assert len(numbers_received(lab, number)) == number, "losses can be switched off"
    assert abs(received - number / 2) <= ONE_IN_A_MILLION * sqrt(number / 4)
    assert (counted["pi2", "up"].judged, counted["pi2", "up"].dropped) == (number, number - received)


def test_bursts_have_the_length_and_the_loss_that_the_scenario_says(can):
    can("relay")
    number, burst = 30_000, Burst(good=50, bad=10)
    with lossy_lab("relay", Host(burst=burst), Host(burst=burst)) as lab:
        received = set(numbers_received(lab, number))
    lost = "".join("." if i in received else "x" for i in range(number))
    lengths = [len(run) for run in re.findall("x+", lost)]
    assert abs(mean(lengths) - 10) <= ONE_IN_A_MILLION * sqrt(10 * 9 / len(lengths))
    persistence = 1 - 1 / burst.good - 1 / burst.bad
    spread = sqrt(burst.loss * (1 - burst.loss) / number * (1 + persistence) / (1 - persistence))
    assert abs(lost.count("x") / number - burst.loss) <= ONE_IN_A_MILLION * spread


def test_a_seed_decides_which_packets_the_relay_drops(can):
    can("relay")
    survivors = []
    for seed in (7, 7, 8):
        with lossy_lab("relay", Host(loss=0.2), Host(loss=0.2), seed=seed) as lab:
            survivors.append(numbers_received(lab, 300))
    assert survivors[0] == survivors[1] != survivors[2]


# Delay, rate, size


@pytest.mark.parametrize("backend", BACKENDS)
def test_delays_are_as_long_as_the_scenario_says_and_do_not_reorder(can, backend):
    link = Host(delay_ms=20.0, jitter_ms=5.0)
    can(backend, delay_ms=20.0, jitter_ms=5.0)
    with lossy_lab(backend, link, link) as lab:
        times_ms = [us / 1000 for us in round_trips_us(lab, 40)]
        arrived = numbers_received(lab, 200)
    assert min(times_ms) >= 30
    assert 38 <= median(times_ms) <= 44, "40 plus what the machine adds"
    assert arrived == list(range(200))


def transfer_s(lab: Lab, size: int) -> float:
    """How long a TCP connection takes to carry so many bytes from pi1 to pi2."""

    def listen():
        return socket.create_server((lab.names.address("pi2"), 7008))

    def connect():
        return socket.create_connection((lab.names.address("pi2"), 7008))

    with inside(lab.names.namespace("pi2"), listen) as server, inside(lab.names.namespace("pi1"), connect) as sender:
        receiver, _ = server.accept()
        with receiver:
            for end in (sender, receiver):
                assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"cubic"
            started = time.perf_counter()
            thread = threading.Thread(target=sender.sendall, args=(bytes(size),))
            thread.start()
            while size > 0:
                size -= len(receiver.recv(1 << 20))
            thread.join()
            return time.perf_counter() - started


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_limits_a_transfer(can, backend):
    can(backend, rate_mbit=20)
    with lossy_lab(backend, Host(rate_mbit=20), Host(rate_mbit=20)) as lab:
        took_s = transfer_s(lab, 1_000_000)
    assert 0.38 <= took_s <= 0.65, "8 Mbit and 5 % of headers at 20 Mbit/s"


@pytest.mark.parametrize("backend", BACKENDS)
def test_packets_on_the_links_are_no_larger_than_the_mtu(can, backend):
    can(backend)
    sizes = []

    def listen():
        return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))

    with lossy_lab(backend, Host(), Host()) as lab, inside(lab.names.namespace("pi2"), listen) as capture:
        capture.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        capture.settimeout(0.2)
        transfer_s(lab, 500_000)
        try:
            while True:
                sizes.append(len(capture.recv(1 << 16)))
        except TimeoutError:
            pass
    assert sum(sizes) > 500_000 and max(sizes) == 1514


def test_the_route_carries_the_tuning_of_a_root(can):
    can("kernel")
    with lossy_lab("kernel", Host(), Host(), rto_min_ms=5, quickack=True) as lab:
        route = subprocess.run(["ip", "-n", lab.names.namespace("pi2"), "route"], capture_output=True, text=True).stdout
    assert "rto_min lock 5ms" in route and "quickack 1" in route and "congctl cubic" in route


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", ("black_holes", "unplugged"))
def test_a_host_that_is_cut_off_comes_back(can, backend, fault):
    can(backend)
    with lossy_lab(backend, Host(), Host(), Host()) as lab:
        getattr(lab.conditions, fault).add("pi2")
        lab.apply()
        state = subprocess.run(["ip", "-n", lab.names.namespace("pi2"), "link", "show", "eth0"], capture_output=True, text=True)
        assert ("NO-CARRIER" in state.stdout) == (fault == "unplugged")
        assert numbers_received(lab, 10) == []
        assert len(numbers_received(lab, 10, "pi1", "pi3")) == 10
        getattr(lab.conditions, fault).clear()
        lab.apply()
        assert round_trips_us(lab, 1)
        assert len(numbers_received(lab, 10)) == 10
        if fault == "black_holes":
            assert lanes(lab)["pi2", "down"].cut >= 10


# Scenario files


@pytest.mark.parametrize("file", sorted(SCENARIOS.glob("*.toml")), ids=lambda file: file.stem)
def test_scenarios_of_the_repository_are_valid(file):
    assert load_scenario(file).hosts


def test_the_number_of_hosts_can_be_overridden():
    assert list(load_scenario(SCENARIOS / "loss-5.toml", hosts=8).hosts.values()) == [Host(loss=0.05)] * 8


def test_a_scenario_file_means_what_it_says(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text(
        "hosts = 3\nloss = 0.05\npace_ms = 0.7\n[host.pi3]\nslowdown = 0.25\n[host.pi3.burst]\ngood = 90\nbad = 10\n"
        '[[event]]\nat_s = 1.0\nhost = "pi2"\naction = "link-down"\nfor_s = 0.5\nevery_s = 2.0\ntimes = 2\n'
        '[[event]]\nat_phase = "prefill"\nhost = "pi2"\naction = "loss"\nvalue = 0.3\n'
    )
    scenario = load_scenario(file)
    plain = Host(loss=0.05, pace_ms=0.7)
    assert scenario.hosts == {"pi1": plain, "pi2": plain, "pi3": Host(pace_ms=0.7, slowdown=0.25, burst=Burst(90, 10))}
    assert scenario.events == (
        Event("pi2", "link-down", after_s=1.0),
        Event("pi2", "link-up", after_s=1.5),
        Event("pi2", "link-down", after_s=3.0),
        Event("pi2", "link-up", after_s=3.5),
        Event("pi2", "loss", 0.3, ("phase", "prefill")),
    )


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "hosts is missing"),
        ("hosts = 0", "hosts must be between"),
        ("hosts = true", "hosts must be a whole number"),
        ("hosts = 2\nlos = 0.1", "los: unknown key"),
        ("hosts = 2\nloss = 5", "loss must be at least 0 and below 1"),
        ("hosts = 2\nloss = '5 %'", "loss must be a number"),
        ("hosts = 2\njitter_ms = 1", "jitter_ms must be between 0 and delay_ms"),
        ("hosts = 2\n[burst]\ngood = 9", "burst.bad is missing"),
        ("hosts = 2\n[burst]\ngood = 9\nbad = 2\npace_ms = 1", "burst.pace_ms: unknown key; keys of the whole scenario"),
        ("hosts = 2\nloss = 0.1\n[burst]\ngood = 9\nbad = 2", "exclude each other"),
        ("hosts = 2\n[host.pi3]\nloss = 0.1", "host.pi3 must be one of pi1..pi2"),
        ("hosts = 2\n[host.pi2]\nslowdown = 4", "host.pi2.slowdown must be a speed"),
        ("hosts = 2\nloss_during = 'never'", "loss_during must be"),
        ("hosts = 2\n[[event]]\nat_s = 1\nhost = 'pi2'", "event 1: action is missing"),
        ("hosts = 2\n[[event]]\nhost = 'pi2'\naction = 'kill'", "event 1: give one of at_s"),
        ("hosts = 2\n[[event]]\nat_s = 1\nhost = 'pi2'\naction = 'loss'", "event 1: value must be given with loss"),
        ("hosts = 2\n[[event]]\nat_s = 1\nhost = 'pi2'\naction = 'kill'\nfor_s = 1", "event 1: for_s must be absent with kill"),
        ("hosts 2", "no valid TOML"),
    ],
)
def test_a_wrong_scenario_is_one_line_with_file_and_key(tmp_path, text, complaint):
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(LabError) as caught:
        load_scenario(file)
    assert str(caught.value).startswith(f"{file}: ") and complaint in str(caught.value) and "\n" not in str(caught.value)


def test_commands_of_halo_mpi_are_known_to_mark_their_progress():
    assert marks_progress(["python", "-m", "halo_mpi.generate"]) and marks_progress(["/x/bin/halo-mpi", "generate"])
    assert not marks_progress(["python", "program.py"])


# Whole runs


def lab_command(*words) -> list[str]:
    return [sys.executable, "-m", "bench.lab", *map(str, words)]


def start(*words, **popen) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(lab_command(*words), cwd=ROOT, text=True, **{**pipes, **popen})


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run(lab_command(*words), cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=50)


def program(name: str, *words) -> list[str]:
    return ["--", "python", str(PROGRAMS / name), *map(str, words)]


def scenario_file(folder: Path, text: str) -> Path:
    file = folder / "scenario.toml"
    file.write_text(text)
    return file


def machine_state() -> list[str]:
    """What a lab must leave as it was; other labs may run meanwhile."""
    commands = ("ip -o link", "tc qdisc", "nft list ruleset")
    return [subprocess.run(command.split(), capture_output=True, text=True).stdout for command in commands]


def leftovers(folder: str) -> list[str]:
    """What there is of a lab that had this HALO_MPI_LAB_DIR."""
    home = Path(folder).parent
    found = [str(path) for path in Path("/run/netns").glob(f"{home.name}-*")] + [str(p) for p in (home,) if p.exists()]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if bytes(home) in (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes():
                found.append(f"process {entry.name}")
        except OSError:
            pass
    return found


def lab_of(output: str) -> str:
    return json.loads(output.splitlines()[0])["lab"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mpirun_starts_a_rank_per_host_and_its_traffic_crosses_the_links(can, tmp_path, backend):
    can(backend)
    before, record = machine_state(), tmp_path / "record.json"
    options = ["--hosts", 3, "--backend", backend, "--record", record]
    done = run("run", SCENARIOS / "clean-4.toml", *options, *program("lab_hosts.py"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hosts"] == ["pi1", "pi2", "pi3"]
    assert leftovers(lab_of(done.stdout)) == [] and machine_state() == before
    links = {(link["host"], link["direction"]): link for link in json.loads(record.read_text())["links"]}
    for host in ("pi2", "pi3"):  # 20 broadcasts of 50 kB came in
        assert 1_000_000 < links[host, "down"]["bytes"] < 2_500_000
        assert links[host, "up"]["packets"] > 20


def test_the_daemons_speak_over_the_links_too(can, tmp_path):
    can("kernel")
    record = tmp_path / "record.json"
    done = run("run", SCENARIOS / "clean-4.toml", "--hosts", 2, "--record", record, "--", "hostname")
    assert (done.returncode, sorted(done.stdout.split())) == (0, ["pi1", "pi2"])
    assert all(link["packets"] > 10 for link in json.loads(record.read_text())["links"]), "no rank spoke MPI"


@pytest.mark.parametrize("way", ("own", "mpirun"))
def test_the_exit_code_is_the_commands_own(can, way):
    can("kernel")
    before = machine_state()
    done = run("run", SCENARIOS / "clean-4.toml", "--hosts", 2, *program("lab_hosts.py", 3, way))
    assert done.returncode == 3, done.stderr
    assert leftovers(lab_of(done.stdout)) == [] and machine_state() == before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_an_interrupted_run_leaves_nothing(can, number, backend):
    can(backend)
    before = machine_state()
    process = start("run", SCENARIOS / "loss-5.toml", "--marks", "--backend", backend, *program("lab_marks.py", 100_000, 1))
    folder = json.loads(process.stdout.readline())["lab"]
    time.sleep(0.3)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert leftovers(folder) == [] and machine_state() == before


def test_down_removes_what_a_killed_lab_left(can):
    can("kernel")
    process = start("run", SCENARIOS / "clean-4.toml", "--marks", *program("lab_marks.py", 100_000, 1))
    folder = json.loads(process.stdout.readline())["lab"]
    name = Path(folder).parent.name
    assert is_owned(name), "down without a name spares it"
    process.kill()
    process.wait()
    assert not is_owned(name) and leftovers(folder)
    assert run("down", name).returncode == 0
    assert leftovers(folder) == []


def test_a_run_that_takes_too_long_is_ended(can):
    can("kernel")
    done = run("run", SCENARIOS / "clean-4.toml", "--timeout", 1.5, "--marks", *program("lab_marks.py", 100_000, 1))
    assert done.returncode == 124 and "not done after 1.5 s" in done.stderr
    assert leftovers(lab_of(done.stdout)) == []


def test_two_labs_run_side_by_side(can):
    can("kernel")
    both = [start("run", SCENARIOS / "clean-4.toml", "--marks", *program("lab_marks.py", 50, 10)) for _ in range(2)]
    outputs = [process.communicate(timeout=40)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len({lab_of(output) for output in outputs}) == 2
    assert [leftovers(lab_of(output)) for output in outputs] == [[], []]


@pytest.mark.parametrize("backend", BACKENDS)
def test_up_leaves_a_network_until_down(can, backend):
    can(backend)
    shown = run("up", SCENARIOS / "clean-4.toml", "--backend", backend)
    name = shown.stdout.partition(":")[0]
    agent = re.search(r"/\S+/agent", shown.stdout)[0]
    try:
        assert subprocess.run([agent, "pi2", "hostname"], capture_output=True, text=True).stdout == "pi2\n"
    finally:
        done = run("down", name)
    assert done.returncode == 0 and leftovers(f"{Path(agent).parent}/marks") == []


# Marks and events


def marked_run(folder: Path, text: str, tokens: int, ms: float, *options) -> tuple[dict, dict, subprocess.CompletedProcess]:
    """The program's own last line, the lab's record, and the end of a run of lab_marks.py in a scenario."""
    record = folder / "record.json"
    file = scenario_file(folder, text)
    done = run("run", file, "--marks", "--record", record, *options, *program("lab_marks.py", tokens, ms))
    assert leftovers(lab_of(done.stdout)) == []
    return json.loads(done.stdout.splitlines()[-1]), json.loads(record.read_text()), done


def event(action: str, trigger: str, more: str = "") -> str:
    return f'[[event]]\nhost = "pi2"\naction = "{action}"\n{trigger}\n{more}\n'


def test_losses_last_from_the_begin_to_the_end_of_generation(can, tmp_path):
    can("kernel")
    program_said, record, done = marked_run(tmp_path, "hosts = 2\nloss = 0.05\n", 100, 0)
    assert done.returncode == 0 and record["tokens"] == 100
    assert 0 < record["generation_s"]["begin"] < record["generation_s"]["end"] < record["duration_s"]
    judged = {link["direction"]: link for link in record["links"] if link["host"] == "pi2"}
    for link in judged.values():  # at least 100 packets each of warm-up and of generation
        assert 100 <= link["judged"] <= link["packets"] + link["dropped"] - 100
        assert link["measured_loss"] < 0.2 and link["offered_loss"] == 0.05
    assert sum(link["dropped"] for link in judged.values())
    assert max(program_said["token_ms"]) > 150, "a lost packet costs the kernel's retransmission time"


@pytest.mark.parametrize("action, backend", [("link-down", "kernel"), ("link-down", "relay"), ("black-hole", "kernel"),
                                             ("black-hole", "relay"), ("stop", "kernel")])  # fmt: skip
def test_an_outage_by_token_stalls_the_run_until_it_ends(can, tmp_path, action, backend):
    can(backend)
    text = "hosts = 2\n" + event(action, "at_token = 10", "for_s = 0.5")
    program_said, record, done = marked_run(tmp_path, text, 60, 5, "--backend", backend)
    assert done.returncode == 0, done.stderr
    assert 400 < max(program_said["token_ms"]) < 4000 and median(program_said["token_ms"]) < 100
    opposite = {"link-down": "link-up", "black-hole": "heal", "stop": "continue"}[action]
    assert [e["action"] for e in record["events"]] == [action, opposite]
    assert 0.45 < record["events"][1]["t_s"] - record["events"][0]["t_s"] < 1.0


def test_slowdown_and_loss_change_by_time_and_phase(can, tmp_path):
    can("kernel")
    text = "hosts = 2\n" + event("slowdown", "at_s = 0.2", "value = 0.25\nfor_s = 0.2")
    text += event("loss", 'at_phase = "prefill"', "value = 0.000001")
    program_said, record, done = marked_run(tmp_path, text, 100, 6)
    assert done.returncode == 0, done.stderr
    seen = [answers[0] for answers in program_said["slowdowns"]]
    assert seen[0] == 1.0 == seen[-1] and 0.25 in seen
    assert [(e["action"], e.get("value")) for e in record["events"]] == [("loss", 0.000001), ("slowdown", 0.25), ("slowdown", None)]
    assert any(link["judged"] for link in record["links"])


def test_what_is_broken_at_the_end_of_generation_is_mended(can):
    can("kernel")
    events = (Event("pi2", "link-down"), Event("pi2", "link-up", after_s=60), Event("pi1", "black-hole", after_s=60))
    with Lab(Scenario("test", {"pi1": Host(), "pi2": Host()}, events)) as lab:
        director = Director(lab)
        director.begin(0.0)
        director.act(0.0)
        assert lab.conditions.unplugged == {"pi2"}
        director.end(1.0)
        assert not lab.conditions.unplugged and not lab.conditions.black_holes
        assert [entry["action"] for entry in director.log] == ["link-down", "link-up"]


def test_a_killed_rank_is_recorded(can, tmp_path):
    can("kernel")
    before = machine_state()
    file, record = scenario_file(tmp_path, "hosts = 3\n" + event("kill", "at_s = 0.3")), tmp_path / "record.json"
    done = run("run", file, "--marks", "--record", record, *program("lab_marks.py", 1000, 5))
    written = json.loads(record.read_text())
    assert done.returncode != 0 and written["exit_code"] == done.returncode
    assert [(e["host"], e["action"]) for e in written["events"]] == [("pi2", "kill")]
    assert 0.3 <= written["events"][0]["t_s"] < 1.0 and written["tokens"] < 1000
    assert leftovers(lab_of(done.stdout)) == [] and machine_state() == before


def test_the_record_lies_beside_the_report_of_the_command(can, tmp_path):
    can("kernel")
    report = tmp_path / "report.json"
    done = run("run", SCENARIOS / "clean-4.toml", "--hosts", 2, "--", "python", "-c", "", "--json", report)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "report.lab.json").read_text())
    assert written["scenario"]["name"] == "clean-4" and written["backend"] in ("nft", "relay") and written["exit_code"] == 0


# Where it cannot work


def test_without_root_there_is_a_reason_in_one_line():
    drop_rights = "import os; from bench.lab.__main__ import guarded; os.geteuid() or os.seteuid(65534); guarded()"
    command = [sys.executable, "-c", drop_rights, "up", str(SCENARIOS / "clean-4.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lab: the lab makes network namespaces: run it as root (sudo)\n"


def test_without_a_compiler_bursts_have_a_reason_and_losses_still_work(can, monkeypatch, tmp_path):
    can("kernel")
    monkeypatch.setattr("bench.lab.relay_links.COMPILERS", ("no-such-compiler",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(LabError, match="needs a C compiler; install gcc .*bursts"):
        Lab(load_scenario(SCENARIOS / "wifi.toml")).__enter__()
    with Lab(load_scenario(SCENARIOS / "loss-5.toml")) as lab:
        assert lab.links.name == "nft"


def test_the_real_program_gives_the_same_tokens_with_and_without_losses(can, tiny, tmp_path):
    """Strict: what the network does changes the time, not the text. Losses are on only between the marks."""
    can("kernel")
    reports = []
    for loss in (0.0, 0.05):
        scenario = tmp_path / f"loss-{loss}.toml"
        scenario.write_text(f"hosts = 3\nloss = {loss}\n")
        report = tmp_path / f"report-{loss}.json"
        command = [sys.executable, "-m", "halo_mpi.generate", "--model", str(tiny), "--prompt", "The dog"]
        options = ["--max-tokens", "12", "--ignore-eos", "--json", str(report)]
        run = [sys.executable, "-m", "bench.lab", "run", str(scenario), "--backend", "kernel", "--", *command, *options]
        finished = subprocess.run(run, capture_output=True, text=True, timeout=50, cwd=ROOT)
        assert finished.returncode == 0, finished.stderr
        reports.append((json.loads(report.read_text()), json.loads(report.with_suffix(".lab.json").read_text())))
    (clean, _), (lossy, record) = reports
    assert clean["token_ids"] == lossy["token_ids"] and len(clean["token_ids"]) == 12
    assert [device["host"] for device in lossy["devices"]] == ["pi1", "pi2", "pi3"]
    assert sum(link["dropped"] for link in record["links"]) > 0
