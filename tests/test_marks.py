"""The program's side of the laboratory's contract."""

import json
import os
import threading
import time

import pytest

from halo_mpi.engine.marks import Marks


def took(marks: Marks, share: float, computed_s: float = 0.0, rows: int = 1) -> float:
    begin = time.perf_counter()
    time.sleep(computed_s)
    marks.pace(begin, share, rows)
    return time.perf_counter() - begin


def set_pace(folder, **pace):
    (folder / "pace-0.json.new").write_text(json.dumps(pace))
    os.replace(folder / "pace-0.json.new", folder / "pace-0.json")


def test_without_a_lab_nothing_is_written_and_nobody_waits(monkeypatch):
    monkeypatch.delenv("HALO_MPI_LAB_DIR", raising=False)
    marks = Marks.from_environment(0)
    begin = time.perf_counter()
    marks.begin()
    marks.token()
    marks.end()
    assert marks.current_pace() is None and took(marks, 1.0) < 0.01 and time.perf_counter() - begin < 0.1


def test_a_request_takes_at_least_the_pace_of_its_share(tmp_path):
    set_pace(tmp_path, pace_ms=20, slowdown=1.0)
    marks = Marks(tmp_path, 0)
    assert took(marks, 1.0) == pytest.approx(0.02, abs=0.006)
    assert took(marks, 2.0) == pytest.approx(0.04, abs=0.006)
    assert took(marks, 1.0, computed_s=0.05) == pytest.approx(0.05, abs=0.006)


def test_further_rows_take_their_share_of_the_pace(tmp_path):
    set_pace(tmp_path, pace_ms=20, row_share=0.25, slowdown=1.0)
    assert took(Marks(tmp_path, 0), 1.0, rows=5) == pytest.approx(0.04, abs=0.006)


def test_a_slow_device_takes_its_compute_time_times_the_factor(tmp_path):
    set_pace(tmp_path, pace_ms=0, slowdown=0.25)
    assert took(Marks(tmp_path, 0), 1.0, computed_s=0.01) == pytest.approx(0.04, abs=0.01)


def test_a_change_of_pace_is_heeded(tmp_path):
    set_pace(tmp_path, pace_ms=0, slowdown=1.0)
    marks = Marks(tmp_path, 0)
    assert took(marks, 1.0) < 0.01
    time.sleep(0.15)
    set_pace(tmp_path, pace_ms=30, slowdown=1.0)
    assert took(marks, 1.0) == pytest.approx(0.03, abs=0.006)


def test_a_device_spoils_its_answers_when_the_lab_says_so(tmp_path):
    set_pace(tmp_path, pace_ms=0, slowdown=1.0)
    marks = Marks(tmp_path, 0)
    assert not marks.spoils() and not Marks(None, 0).spoils() and not Marks(tmp_path, 1).spoils()
    time.sleep(0.15)
    set_pace(tmp_path, pace_ms=0, slowdown=1.0, spoil=True)
    assert marks.spoils()


def test_marks_are_written_in_order_and_the_lab_is_waited_for(tmp_path):
    marks = Marks(tmp_path, 0)
    (tmp_path / "set").touch()
    marks.measuring()
    threading.Timer(0.2, (tmp_path / "go").touch).start()
    begin = time.perf_counter()
    marks.begin()
    assert time.perf_counter() - begin >= 0.19
    marks.phase("prefill")
    marks.token()
    marks.token()
    (tmp_path / "calm").touch()
    marks.end()
    lines = ["measuring", "generation-begin", "phase prefill", "token 1", "token 2", "generation-end"]
    assert (tmp_path / "progress").read_text().splitlines() == lines
    assert int((tmp_path / "rank-0.pid").read_text()) == os.getpid()


def test_only_the_root_marks(tmp_path):
    Marks(tmp_path, 1).begin()
    assert not (tmp_path / "progress").exists() and (tmp_path / "rank-1.pid").exists()


def test_reading_takes_as_long_as_from_the_disk_that_the_lab_plays(tmp_path):
    begin = time.perf_counter()
    Marks(tmp_path, 0).pace_reading(begin, 10**9)
    assert time.perf_counter() - begin < 0.01, "the lab sets no pace for it"
    set_pace(tmp_path, pace_ms=0, slowdown=1.0, read_mbps=5)
    marks, begin = Marks(tmp_path, 0), time.perf_counter()
    marks.pace_reading(begin, 100_000)
    assert time.perf_counter() - begin == pytest.approx(0.02, abs=0.006)
