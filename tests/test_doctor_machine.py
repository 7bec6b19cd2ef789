"""What doctor says of a host: a board that is hot, badly supplied, slow, or short of something, as its files tell."""

import resource
import socket
from dataclasses import replace

import pytest

from halo_mpi.health import cooling as health_cooling
from halo_mpi.health.cooling import cooling
from halo_mpi.health.finding import ERROR, OK, WARNING, Finding
from halo_mpi.health.fit import Place, fit
from halo_mpi.health.flavours import apart, installed, running
from halo_mpi.health.kernel import judged
from halo_mpi.health.limits import limits
from halo_mpi.health.links import Link
from halo_mpi.health.links import judged as judged_links
from halo_mpi.health.models import compared, model
from halo_mpi.health.shown import print_findings
from halo_mpi.health.software import compared as software_compared
from halo_mpi.health.software import software
from halo_mpi.health.together import Seen, diagnose
from halo_mpi.wire.sockets import accepted_options, sent_segments, tune_sockets
from tests.boards import pi, write

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(health_cooling, "BUSY_S", 0.0)


def of(findings: list[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == check]
    return found


def test_a_cool_pi_with_a_good_supply_is_fine(tmp_path):
    findings = [*cooling(pi(tmp_path)), *limits(tmp_path)]
    assert {finding.level for finding in findings} == {OK}
    assert not any(finding.do for finding in findings)
    assert of(findings, "cooling").says == "below 60 °C, not throttled" and of(findings, "clock").says == "1800 MHz"


@pytest.mark.parametrize(
    "board, check, says, do",
    [
        ({"throttled": 0x4, "degrees": 85.2}, "cooling", "throttled now, 85 °C", "fan"),
        ({"throttled": 0x40000}, "cooling", "throttled at times since it started, 52 °C", "fan"),
        ({"throttled": 0x20000}, "cooling", "its clock is capped at times since it started, 52 °C", "fan"),
        ({"throttled": None, "degrees": 81.0}, "cooling", "81 °C, at which boards throttle", "fan"),
        ({"throttled": 0x50005}, "power", "under-voltage now", "power supply"),
        ({"throttled": 0x50000}, "power", "under-voltage at times since it started", "power supply"),
        (
            {"mhz": 600, "governor": "powersave"},
            "clock",
            "600 of 1800 MHz while computing (governor powersave)",
            "scaling_governor",
        ),
        ({"mhz": 1000}, "clock", "1000 of 1800 MHz while computing (governor ondemand)", "heat"),
        ({"mhz": 600, "allowed": 600}, "clock", "limited to 600 of 1800 MHz", "lift the limit"),
        ({"swap_mib": (200, 120)}, "swap", "120 of 200 MiB in use", "swapoff"),
    ],
)
def test_what_ails_a_board_is_told_with_what_to_do(tmp_path, board, check, says, do):
    findings = [*cooling(pi(tmp_path, **board)), *limits(tmp_path)]
    found = of(findings, check)
    assert found.level == WARNING and says in found.says and do in found.do
    assert found.do.count("\n") == 0


def test_sensors_of_newer_kernels_are_read_too(tmp_path):
    board = pi(tmp_path, throttled=None)
    write(board / "sys/class/hwmon/hwmon1/name", "rpi_volt")
    write(board / "sys/class/hwmon/hwmon1/in0_lcrit_alarm", 1)
    for name, value in {"type": "cpufreq-cpu0", "cur_state": 3, "max_state": 10}.items():
        write(board / "sys/class/thermal/cooling_device0" / name, value)
    findings = cooling(board)
    assert "under-voltage now" in of(findings, "power").says
    assert "slows its processor down for heat (step 3 of 10, 52 °C)" in of(findings, "cooling").says


def test_a_machine_that_tells_nothing_is_no_warning(tmp_path):
    assert {finding.level for finding in [*cooling(tmp_path), *limits(tmp_path)]} == {OK}


def test_few_open_files_are_a_warning(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        found = of(limits(tmp_path), "files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.level == WARNING and "only 100 files" in found.says and "ulimit -n 512" in found.do


def test_a_kernel_that_refuses_options_is_a_warning_with_the_route_to_change():
    accepted, route = {"user_timeout": True, "rto_min": False, "rto_max": False}, "10.0.0.0/24 dev eth0 src 10.0.0.1"
    assert judged(dict.fromkeys(accepted, True), [route], "6.18").level == OK
    found = judged(accepted, [f"{route} rto_min lock 5ms", route], "6.1")
    assert found.level == WARNING and "Linux 6.1 refuses rto_max, rto_min" in found.says
    assert f"sudo ip route change {route} rto_min 5ms quickack 1" in found.do
    assert judged(accepted, [f"{route} rto_min lock 5ms"], "6.1").level == OK
    assert judged(accepted, [], "6.1").level == WARNING


def test_options_are_tried_on_a_real_connection():
    assert accepted_options()["thin_linear_timeouts"]


def test_segments_are_counted_by_connection():
    with socket.create_server(("127.0.0.9", 0)) as server, socket.create_connection(server.getsockname()) as client:
        end = server.accept()[0]
        tune_sockets({"127.0.0.9"})
        before = sent_segments({"127.0.0.9"})
        for _ in range(5):
            client.sendall(b"x")
            end.recv(10)
        after = sent_segments({"127.0.0.9"})
        end.close()
    if not after:
        pytest.skip("this kernel does not tell")
    grown = [after[each][0] - before[each][0] for each in after]
    assert sorted(grown) == [5] and not any(lost for _, lost in after.values())


def test_another_version_or_other_libraries_are_told():
    own = software()
    assert {finding.level for finding in software_compared({"pi1": own, "pi2": own})} == {OK}
    others = {
        "pi2": {**own, "halo_mpi": "0.0.9"}, "pi3": {**own, "numpy": "2.0.0"}, "pi4": {**own, "sources": "0" * 12}, "pi5": {},
    }  # fmt: skip
    found = {finding.host: finding for finding in software_compared({"pi1": own, **others})}
    assert (
        found["pi2"].level == ERROR and f"halo_mpi 0.0.9, protocol {own['protocol']}, but {own['halo_mpi']}" in found["pi2"].says
    )
    assert found["pi3"].level == WARNING and f"numpy 2.0.0 (not {own['numpy']})" in found["pi3"].says
    assert found["pi4"].level == WARNING and "other source files" in found["pi4"].says
    assert found["pi5"].level == ERROR


def test_a_model_that_differs_lacks_shards_or_is_not_there_is_told(tiny, tmp_path):
    facts, none = model(tiny)
    assert not none and facts["shards"] == [0, 1, 2]
    assert {finding.level for finding in compared({"pi1": facts, "pi2": facts})} == {OK}
    lacking, other = {**facts, "shards": [0, 2]}, {**facts, "digest": "0" * 64, "version": "000000000000"}
    found = {finding.host: finding for finding in compared({"pi1": facts, "pi2": lacking, "pi3": other})}
    assert found["pi2"].level == WARNING and "shard-01.h5" in found["pi2"].says and "copy" in found["pi2"].do
    assert found["pi3"].level == ERROR and "000000000000" in found["pi3"].says
    (nowhere, *_) = [finding for finding in compared({"pi1": lacking, "pi2": lacking}) if finding.level == ERROR]
    assert nowhere.says == "shard-01.h5 on no host"
    nothing, (absent,) = model(tmp_path / "none.halo")
    assert nothing is None and absent.level == ERROR and "does not exist" in absent.says and "convert" in absent.do


def test_memory_that_does_not_hold_the_model_is_told(tiny):
    facts = model(tiny)[0]
    facts["config"] = {**facts["config"], "layers": 250}  # 30 MB in f32
    rich = Place("pi1", 2**30, 1, 2**29, facts["heads"], facts["groups"])
    poor = replace(rich, host="pi2", available=2**22)
    assert fit(facts, [rich, rich], 512).level == OK
    uneven = fit(facts, [rich, poor], 512)
    assert uneven.level == WARNING and "even shares do not fit" in uneven.says
    nobody = fit(facts, [poor, poor], 512)
    assert nobody.level == ERROR and "memory" in nobody.says and "int4" in nobody.do


def test_what_mpi_survives_is_told():
    assert running("Open MPI 5.0.11", True, 4).level == OK
    assert running("Open MPI 5.0.11", False, 4).level == WARNING and "--with-ft ulfm" in running("Open MPI 5.0.11", False, 4).do
    assert running("MPICH 4.2.0", False, 4).level == WARNING
    assert installed("Open MPI 5.0.11", "Open MPI 5.0.11").level == OK
    assert installed("Open MPI 4.1.6", "Open MPI 4.1.6").level == WARNING
    assert installed("MPICH 4.2.0", "Open MPI 5.0.11").level == ERROR
    assert installed("Open MPI 5.0.11", None).level == ERROR


def test_ranks_that_another_mpis_mpirun_has_started_are_told():
    assert apart("Open MPI 5.0.11", 4, {"OMPI_COMM_WORLD_SIZE": "4"}) == apart("Open MPI 5.0.11", 1, {}) == []
    (alone,) = apart("Open MPI 5.0.11", 1, {"PMI_SIZE": "4"})
    assert alone.level == ERROR and "4 ranks" in alone.says and "halo-mpirun" in alone.do


def test_clocks_that_differ_are_told():
    said = {"software": software(), "mpi": "Open MPI 5.0.11", "model": None, "findings": []}
    hosts = [Seen("pi1", said), Seen("pi2", said, ahead_s=-40.0), Seen("pi3", said, ahead_s=0.5)]
    found = of(diagnose(hosts, ["pi1", "pi2", "pi3"], 512), "time")
    assert (found.level, found.host) == (WARNING, "pi2") and "40 s behind pi1's" in found.says and "set-ntp" in found.do


def test_people_see_what_hosts_have_in_common_once_and_what_is_wrong_last(capsys):
    findings = [
        Finding("clock", WARNING, "600 of 1800 MHz", "raise it", "pi1"),
        *(Finding("swap", OK, "none", host=f"pi{number}") for number in (1, 2)),
        Finding("version", ERROR, "another one", "install it", "pi2"),
    ]
    link = Link(1, "pi2", 2, 0.4, 1.5, 9.0, 0.01, 0.02, None, 8, 93.0, 94.0, 0.0)
    print_findings(findings, [link], 2)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (
        lines[0] == ["ok", "swap", "all", "none"]
        and lines[1][:3] == ["warning", "clock", "pi1"]
        and lines[2] == ["->", "raise", "it"]
    )
    assert lines[3][:3] == ["error", "version", "pi2"] and lines[-1] == ["1", "error,", "1", "warning"]
    assert lines[-2] == ["1", "pi2", "0.40", "1.50", "9.00", "1.0%", "2.0%", "-", "93", "94", "2"]


def test_links_that_are_slow_lossy_or_single_are_told():
    good = Link(1, "pi2", 2, 0.4, 1.5, 9.0, 0.01, 0.0, 0.0, 0, 93.0, 94.0, 0.0)
    assert [finding.level for finding in judged_links([good], 60)] == [OK]
    for change, says, do in (
        ({"loss_there": 0.02, "lost": 8}, "packets lost: 2.0% on the way there, 0.0% on the way back", "cable"),
        ({"loss_there": 0.02, "loss_back": None, "lost": 8}, "packets lost: 2.0% on the way there", "cable"),
        ({"late_rate": 0.1, "rtt_p99_ms": 30.0}, "10.0% of answers late: 30.0 ms (p99) instead of 0.40", "power_save off"),
        ({"rtt_p50_ms": 6.0}, "a token waits for 60 of them: 360 ms", "cable"),
        ({"mbit_back": 9.0}, "93 Mbit/s there, 9 back", "WiFi"),
        ({"connections": 1}, "not sent twice", "btl_tcp_if_include"),
    ):
        (found,) = judged_links([replace(good, **change)], 60)
        assert found.level == WARNING and found.host == "pi2" and says in found.says and do in found.do
