"""`--verbose`: the table of the workers, in pipes and on a terminal."""

import os
import pty
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from halo_mpi.engine.monitor import Monitor
from tests.mpi import halo, succeed
from tests.simulator import STRICT, Simulation

pytestmark = pytest.mark.timeout(60)
RANKS, CONTEXT = 4, 32
HOSTS = [f"pi{number}" for number in range(1, RANKS + 1)]
RELAXED = replace(STRICT, mode="relaxed", quality=1.0, deadline_ms=0.5)
QUICK, SLOW = [1e-4], [3e-3]  # in time for the present sync, and for the next one
CUT_OFF = [1e-4] * 30 + [1e6]


@pytest.fixture(autouse=True)
def no_gradients():
    torch.set_grad_enabled(False)


def simulated(model, *links: list[float], **mode) -> Simulation:
    """Rank 1, 2, ... with these delays."""
    return Simulation(model, RANKS, replace(RELAXED, **mode), [[], *links], [[0.0]] * RANKS, CONTEXT)


def monitor_of(simulation: Simulation, shown: bool = True) -> Monitor:
    root = simulation.root
    return Monitor(HOSTS, root._link.peers, root.crew, root.ledger, shown)


def watched(simulation: Simulation, tokens: int, shown: bool = True) -> None:
    with monitor_of(simulation, shown) as monitor:
        for position in range(tokens):
            simulation.root.step(7, position)
            monitor.token()


def rows(text: str) -> list[list[str]]:
    """The workers' rows of the last table."""
    lines = [line.split() for line in text.splitlines()]
    start = max(number for number, words in enumerate(lines) if words[:2] == ["rank", "host"])
    return lines[start + 1 : start + RANKS]


def test_without_verbose_nothing_is_shown(deep, capfd, monkeypatch):
    monkeypatch.setattr("halo_mpi.engine.monitor.SNAPSHOT_S", 0.0)
    watched(simulated(deep, QUICK, QUICK, QUICK), 3, shown=False)
    assert capfd.readouterr() == ("", "")


def test_a_pipe_gets_a_table_every_so_often_and_at_the_end(deep, capfd, monkeypatch):
    watched(simulated(deep, QUICK, QUICK, QUICK), 5)
    out, err = capfd.readouterr()
    assert not out and err.count("rank  host") == err.count("tokens/s") == 1 and "\x1b" not in err
    monkeypatch.setattr("halo_mpi.engine.monitor.SNAPSHOT_S", 0.0)
    watched(simulated(deep, QUICK, QUICK, QUICK), 5)
    assert capfd.readouterr().err.count("tokens/s") == 5 + 1


def test_a_table_says_who_is_late_and_who_is_gone(deep, capfd):
    simulation = simulated(deep, QUICK, SLOW, CUT_OFF, max_lag=4)
    watched(simulation, 10)
    ledger = simulation.root.ledger
    err = capfd.readouterr().err
    quick, slow, gone = rows(err)
    assert [row[:3] for row in (quick, slow, gone)] == [["1", "pi2", "ok"], ["2", "pi3", "ok"], ["3", "pi4", "suspended"]]
    assert float(quick[3]) < 2 < float(slow[3])
    assert float(quick[4].rstrip("%")) == 0 < float(slow[4].rstrip("%"))
    assert quick[5:] == ["0", "0"] and int(slow[5]) > 0 == int(slow[6]) and int(gone[6]) > 0
    assert sum(int(row[5]) for row in (quick, slow, gone)) == sum(ledger.deferred.values())
    assert sum(int(row[6]) for row in (quick, slow, gone)) == ledger.substituted
    assert re.search(rf"{sum(ledger.inexact) / 10:.1%} of the work inexact", err)


def test_who_missed_a_deadline_is_suspect_in_the_table_and_ok_in_the_report(deep, capfd):
    simulation = simulated(deep, QUICK, [0.05], QUICK, late="drop")
    watched(simulation, 2)
    assert [row[2] for row in rows(capfd.readouterr().err)] == ["ok", "suspect", "ok"]
    assert simulation.root.crew.state(2) == "ok"


class Screen:
    """A terminal that is high enough and knows what rich needs."""

    def __init__(self):
        self.lines, self.row, self.column, self.cursor_shown = [""], 0, 0, True

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part.endswith("A"):
                self.row -= int(part[2:-1])
            elif part == "\x1b[2K":
                self.lines[self.row] = ""
            elif part in ("\x1b[?25l", "\x1b[?25h"):
                self.cursor_shown = part.endswith("h")
            elif not part.endswith("m") or part[0] != "\x1b":
                assert part[0] != "\x1b", f"unknown sequence {part!r}"
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + part + line[self.column + len(part) :]
                self.column += len(part)


@contextmanager
def terminal(monkeypatch, columns: int, *streams: str) -> Iterator[Screen]:
    """These streams of sys become a terminal; the screen shows what it shows when the block is over."""
    ours, theirs = pty.openpty()
    screen, seen = Screen(), []

    def read() -> None:
        try:
            while data := os.read(ours, 1 << 16):
                seen.append(data)
        except OSError:  # closed
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    try:
        with open(theirs, "w") as stream:
            for name in streams:
                monkeypatch.setattr(sys, name, stream)
            yield screen
    finally:
        monkeypatch.undo()
        reader.join(10)
        os.close(ours)
        screen.feed(b"".join(seen).decode())


def write_with_table(simulation: Simulation, pieces: list[str], show) -> None:
    monitor = monitor_of(simulation)
    show = monitor.above(show)
    with monitor:
        for position, piece in enumerate(pieces):
            simulation.root.step(7, position)
            show(piece)
            monitor.token()
        show("\n")


PIECES = "Once| upon a time| there was a [b]|\n\n|  東京 and nothing else else else else else else| in| the| whole| world|.\nEnd".split(
    "|"
)
SHOWN = "Once upon a time there was a [b]||  東京 and nothing else else else else else else in the whol|e world.|End".split("|")


def test_on_one_terminal_the_text_is_above_the_table(deep, monkeypatch):
    simulation = simulated(deep, QUICK, SLOW, QUICK)
    monkeypatch.setattr("halo_mpi.engine.monitor.LIVE_S", 0.0)
    with terminal(monkeypatch, 60, "stdout", "stderr") as screen:
        write_with_table(simulation, PIECES, lambda text: pytest.fail("not past the table"))
    assert screen.lines[: len(SHOWN)] == SHOWN
    rest = [line for line in screen.lines[len(SHOWN) :] if line.strip()]
    assert len(rest) == 1 + (RANKS - 1) + 1 and rest[0].startswith("rank  host") and "tokens/s" in rest[-1]
    assert screen.cursor_shown


def test_the_text_in_a_file_is_the_text_alone(deep, monkeypatch):
    simulation, written = simulated(deep, QUICK, QUICK, QUICK), []
    with terminal(monkeypatch, 80, "stderr") as screen:
        write_with_table(simulation, PIECES, written.append)
    assert "".join(written) == "".join(PIECES) + "\n"
    assert len(rows("\n".join(screen.lines))) == RANKS - 1 and "Once" not in "".join(screen.lines)


def test_an_interrupted_run_gives_the_cursor_back(deep, monkeypatch):
    simulation = simulated(deep, QUICK, QUICK, QUICK)
    with pytest.raises(KeyboardInterrupt), terminal(monkeypatch, 80, "stderr") as screen:
        with monitor_of(simulation):
            raise KeyboardInterrupt
    assert screen.cursor_shown


@pytest.mark.mpi
@pytest.mark.slow
def test_the_table_of_a_run_is_on_standard_error(tiny):
    options = ("--model", tiny, "--prompt", "The dog", "--max-tokens", 8, "--ignore-eos")
    quiet, verbose = (succeed(halo(3, "generate", *options, *more)) for more in ((), ("--verbose",)))
    assert verbose.out == quiet.out and "tokens/s" not in quiet.err and verbose.err.count("tokens/s") == 1
    table = [line.split()[:3] for line in verbose.err.splitlines()]
    start = table.index(["rank", "host", "state"])
    host = socket.gethostname()
    assert table[start + 1 : start + 3] == [["1", host, "ok"], ["2", host, "ok"]]


@pytest.mark.mpi
def test_evaluate_has_the_table_too(tiny, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog")
    finished = succeed(halo(2, "evaluate", "--model", tiny, "--text", tmp_path / "text.txt", "--verbose"))
    assert finished.err.count("tokens/s") == 1 and "tokens/s" not in finished.out
