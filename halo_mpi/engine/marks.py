"""Working together with a network laboratory (bench/lab): the program marks its progress, the lab breaks things and sets the pace.

Both happen through files in one folder that all ranks see. From rank 0: `progress`, with the lines measuring, generation-begin, phase
NAME, token N and generation-end; from every rank `rank-R.pid`. From the lab: `set`, `go` and `calm`, for which rank 0 waits after the
first, the second and the last mark, and `pace-R.json`, {"pace_ms": x, "slowdown": f} and maybe "row_share": r, "read_mbps": m and
"spoil": true, which may change at any time. Without a lab nothing happens.
"""

import json
import os
import time
from pathlib import Path

LAB_DIR = "HALO_MPI_LAB_DIR"
PATIENCE_S = 10.0  # for the lab to answer a mark
READ_AGAIN_S = 0.1


class Marks:
    """A rank's side of the contract. `folder`: the lab's, or None without one."""

    def __init__(self, folder: Path | None, rank: int):
        self._folder, self._rank = folder, rank
        self._tokens = 0
        self._read_at = self._changed_at = 0.0
        self._pace = {"pace_ms": 0.0, "slowdown": 1.0}
        if folder:
            (folder / f"rank-{rank}.pid").write_text(str(os.getpid()))

    @classmethod
    def from_environment(cls, rank: int) -> "Marks":
        """The lab that this process was started in, if any."""
        folder = os.environ.get(LAB_DIR)
        return cls(Path(folder) if folder else None, rank)

    def measuring(self) -> None:
        """Devices and links are measured now; waits until the lab has switched its losses on, if they are to be seen."""
        self._write("measuring", "set")

    def begin(self) -> None:
        """Generation begins; waits until the lab has switched its losses on."""
        self._write("generation-begin", "go")

    def phase(self, name: str) -> None:
        """A part of the generation begins, such as "prefill"."""
        self._write(f"phase {name}")

    def token(self) -> None:
        """One more token was generated or scored."""
        self._tokens += 1
        self._write(f"token {self._tokens}")

    def end(self) -> None:
        """Generation is over; waits until the lab has switched its losses off."""
        self._write("generation-end", "calm")

    def pace(self, begin: float, share: float, rows: int = 1) -> None:
        """Sleep until a request that began at `begin` (perf_counter) has taken as long as on the device that the lab plays.

        `share` is this rank's part of the sync's work in even shares of all ranks: with pace_ms the request takes at least
        pace_ms x share, and row_share of it more for every row but the first; that and the time computed are divided by the slowdown
        (0.25: four times as long).
        """
        pace = self.current_pace()
        if pace is None:
            return
        computed_s = time.perf_counter() - begin
        least_s = pace["pace_ms"] * share * (1 + pace.get("row_share", 0.0) * (rows - 1)) / 1e3
        wanted_s = max(computed_s, least_s) / pace["slowdown"]
        if wanted_s > computed_s:
            time.sleep(wanted_s - computed_s)

    def pace_reading(self, begin: float, size: int) -> None:
        """Sleep as for the disk that the lab plays."""
        pace = self.current_pace()
        if pace and pace.get("read_mbps"):
            sleep_as_disk(begin, size, pace["read_mbps"])

    def current_pace(self) -> dict | None:
        """The pace that the lab sets for this rank, None without a lab."""
        if self._folder is None:
            return None
        now = time.perf_counter()
        if now - self._read_at > READ_AGAIN_S:
            self._read_at = now
            path = self._folder / f"pace-{self._rank}.json"
            try:
                changed_at = path.stat().st_mtime
                if changed_at != self._changed_at:
                    self._pace, self._changed_at = json.loads(path.read_text()), changed_at
            except OSError:
                pass  # the lab sets no pace
        return self._pace

    def spoils(self) -> bool:
        """Whether the lab wants this rank to answer with NaN, as a device with broken memory might."""
        pace = self.current_pace()
        return pace is not None and pace.get("spoil", False)

    def _write(self, line: str, answer: str | None = None) -> None:
        if self._folder is None or self._rank != 0:
            return
        with open(self._folder / "progress", "a") as file:
            file.write(line + "\n")
        deadline = time.perf_counter() + PATIENCE_S
        while answer and not (self._folder / answer).exists() and time.perf_counter() < deadline:
            time.sleep(0.001)


def sleep_as_disk(begin: float, size: int, mbps: float) -> None:
    """Sleep until `size` bytes, whose reading began at `begin` (perf_counter), have taken as long as from a disk of so many MB/s."""
    time.sleep(max(0.0, begin + size / mbps / 1e6 - time.perf_counter()))
