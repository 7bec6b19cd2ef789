"""For halo-mpirun: what to do when a job is lost, and starting it again on the hosts that still answer.

Lost is a job whose mpirun was killed, or ends though rank 0 is still at work: one of its daemons was killed, with which Open MPI ends the
job (with exit code 0). So is one in whose start a rank ends or does not answer; as long as the work has not begun, there need be no text.
If rank 0 ended before mpirun, it was killed itself, which would happen again. But an MPI without fault tolerance ends rank 0 when
another rank ends; there the job is lost if a host does not answer.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from mpirun_hosts import EXIT_FAILED, LaunchError, hosts_that_answer
from mpirun_places import Places
from mpirun_start import MPI_STARTS_S, written_since

MOST_RESTARTS = 3  # without a new token in between


@dataclass
class Restarts:
    """What became of the hosts of a run. `checkpoint`: where its text is kept; `own`: in a file that the user named."""

    places: Places
    agent: str
    checkpoint: Path | None
    own: bool
    allowed: bool
    tolerant: bool  # the MPI goes on when a rank ends
    left_out: bool = False
    marks: list = field(default_factory=list)  # of the starts that have ended: their processes are to be ended
    _count: int = 0
    _starts_failed: int = 0
    _progress: tuple | None = None

    @property
    def most_s(self):
        """How long MPI may take in the next start."""
        return MPI_STARTS_S[min(self._starts_failed, len(MPI_STARTS_S) - 1)]

    def after(self, end, stopped):
        """What to tell the user before the job is started again on the hosts in use. None: mpirun's exit code is to be returned.

        Raises LaunchError if it was lost and cannot go on.
        """
        has_text = written_since(self.checkpoint, end.began) or end.innocent and self.checkpoint and self.checkpoint.exists()
        blameless, why = end.innocent, f"the job was lost (mpirun ended with code {end.code} before the program did)"
        if end.somebody_missing:
            if not self.allowed and end.own_code is not None:
                return None  # the program has said who is missing
            blameless, why = True, end.hung or "a rank was missing"
        if blameless and end.stage:
            self._starts_failed += 1
        if not has_text and (end.shown or not end.stage):  # what was shown would come a second time
            if not blameless or end.own_code is not None:
                return None
            raise LaunchError(
                f"the job was lost: mpirun ended with code {end.code} before the program did; {self._advice()}", EXIT_FAILED
            )
        if not blameless and (self.tolerant or not self.places.hosts):
            who = "rank 0" if self.tolerant else "a rank"
            how = "ended while the run started" if end.stage else "was killed"
            raise LaunchError(f"{who} {how} (was there too little memory?); {self._advice()}", EXIT_FAILED)
        if not self.allowed:
            raise LaunchError(f"{why}; {self._advice()}", EXIT_FAILED)
        progress = self._read_progress()
        self._count = 1 if progress != self._progress else self._count + 1
        self._progress = progress
        if self._count > MOST_RESTARTS:
            raise LaunchError(f"{why} for the {self._count}th time without a new token; {self._advice()}", EXIT_FAILED)
        changes = self._leave_out(stopped)
        if not (blameless or changes):
            raise LaunchError(f"a rank was killed (was there too little memory?); {self._advice()}", EXIT_FAILED)
        return f"{why}{changes}; " + (f"going on after {progress[1]} tokens" if has_text or progress[1] else "starting again")

    def take_in(self, names, stopped):
        """What to tell the user before the job, which was asked to end, is started again with these hosts too."""
        self.places.lost -= names
        changes = self._leave_out(stopped)
        return f"taken in again, since they answer: {', '.join(sorted(names))}{changes}; going on after {self._read_progress()[1]} tokens"

    def _leave_out(self, stopped):
        """Leave out the hosts that do not answer, for spare ones if there are any. In words, if that changes the hosts in use."""
        used = [host.name for host in self.places.in_use]
        names = {host.name for host in self.places.hosts} - self.places.lost
        self.places.lost |= names - hosts_that_answer(names, self.agent, self.marks, stopped)
        silent = [name for name in dict.fromkeys(used) if name in self.places.lost]
        if not silent:
            return ""
        if silent[0] == used[0]:
            raise LaunchError(f"{silent[0]}, the host of rank 0, does not answer; {self._advice()} once it does", EXIT_FAILED)
        self.left_out = True
        instead = [host.name for host in self.places.in_use if host.name not in used]
        return f"; left out, since they do not answer: {', '.join(silent)}" + (
            f"; instead: {', '.join(instead)}" if instead else ""
        )

    def _advice(self):
        if not self.own:
            return "with --checkpoint FILE the same command could go on where it stopped"
        return f"the same command goes on with the text in {self.checkpoint}" if self.checkpoint.exists() else "start it again"

    def _read_progress(self):
        try:
            text = json.loads(self.checkpoint.read_text())
            return text["id"], len(text["token_ids"])
        except (OSError, ValueError, KeyError, TypeError):
            return None, 0
