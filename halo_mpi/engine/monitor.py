"""`--verbose`: how the workers are doing, drawn between tokens on the root's standard error. On a terminal that is one table
below the text, elsewhere (mpirun's pipes) a new one now and then."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable

from rich.cells import chop_cells
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from halo_mpi.engine.crew import Crew
from halo_mpi.engine.ledger import Ledger
from halo_mpi.wire.peer import Peer

LIVE_S, SNAPSHOT_S = 0.25, 10.0  # between two drawings
RECENT = 32  # tokens whose speed is shown


class Monitor:
    """Watches the loop inside its `with` block. `shown`: else it does nothing. `hosts`: names, by rank."""

    def __init__(self, hosts: list[str], peers: dict[int, Peer], crew: Crew, ledger: Ledger, shown: bool):
        self._hosts, self._peers, self._crew, self._ledger, self._shown = hosts, peers, crew, ledger, shown
        self._console = Console(file=sys.stderr)
        on_terminal = shown and sys.stderr.isatty() and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False) if on_terminal else None
        self._every_s = LIVE_S if self._live else SNAPSHOT_S
        self._line = ""  # of the text, unfinished
        self._ends: deque[float] = deque(maxlen=RECENT)
        self._drawn_at = time.perf_counter()

    def __enter__(self) -> "Monitor":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *failure) -> None:
        if self._shown:
            self._draw()
        if self._live:
            self._live.stop()

    def token(self) -> None:
        """One more token was generated or scored."""
        now = time.perf_counter()
        self._ends.append(now)
        if self._shown and now - self._drawn_at >= self._every_s:
            self._drawn_at = now
            self._draw()

    def above(self, show: Callable[[str], None]) -> Callable[[str], None]:
        """How to show text meanwhile: as `show` does, but above the table if both are on one terminal."""
        shares = self._live and sys.stdout.isatty() and os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
        return self._write if shares else show

    def _write(self, text: str) -> None:
        width, lines = self._console.width, (self._line + text).split("\n")
        *done, self._line = [row for line in lines for row in chop_cells(line, width) or [""]]
        for row in done:
            self._console.print(Text(row))

    def _draw(self) -> None:
        table = Table("rank", "host", "state", "usual ms", "late", "deferred", "substituted", box=None, pad_edge=False)
        for rank, peer in self._peers.items():
            usual, late = f"{peer.deadline.usual_s * 1e3:.2f}", f"{self._ledger.late_rate(rank):.1%}"
            counts = (str(of[rank]) for of in (self._ledger.deferred_of, self._ledger.substituted_of))
            table.add_row(str(rank), self._hosts[rank], self._crew.state_now(rank), usual, late, *counts)
        ends, inexact = self._ends, self._ledger.inexact
        speed = (len(ends) - 1) / (ends[-1] - ends[0]) if len(ends) > 1 else 0.0
        summary = Text(f"{speed:.2f} tokens/s, {sum(inexact) / max(1, len(inexact)):.1%} of the work inexact")
        if self._live:
            self._live.update(Group(Text(self._line), table, summary), refresh=True)
        else:
            self._console.print(Group("", table, summary))
