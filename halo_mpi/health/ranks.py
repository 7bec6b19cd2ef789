"""The ranks of a job, asked over MPI: the hosts' own examinations, and the lines between them."""

import json
import time
from collections.abc import Callable

from mpi4py import MPI

from halo_mpi.engine.machine import this_machine
from halo_mpi.health.finding import OK, Finding
from halo_mpi.health.links import Link, measure, say_stop, serve, silent
from halo_mpi.health.talk import SilentError, Talk
from halo_mpi.health.together import Seen
from halo_mpi.wire.exchange import ROOT
from halo_mpi.wire.polling import sharpen_timers

LEAST_S = 1.0


def answer(comm: MPI.Comm, examination: Callable[[], dict]) -> bool:
    """A worker's part; whether MPI's own end would wait for somebody then."""
    sharpen_timers()
    talk = Talk(comm, ROOT)
    try:
        talk.send(this_machine().encode(), 60.0)
        said = examination()
        talk.send(json.dumps(said).encode(), 60.0)
        return serve(talk, set(said["addresses"]))
    except SilentError:  # nobody is left who could be told
        return True


class Ranks:
    """All ranks, as the root gets to know them. `hosts`: those that answered, the root's first; `order`: the host of each rank that did;
    `links`: to workers; `findings`: who is silent."""

    def __init__(self, comm: MPI.Comm, examination: Callable[[], dict], most_s: float):
        sharpen_timers()
        self.findings: list[Finding] = []
        self._talks = [Talk(comm, rank) for rank in range(comm.size) if rank != ROOT]
        begin = time.perf_counter()
        self._machines = {ROOT: this_machine()}
        self._ask(lambda talk: self._machines.update({talk.peer: talk.receive(most_s, begin).decode()}))
        said = {ROOT: examination()}
        begin = max(begin, time.perf_counter() + LEAST_S - most_s)  # a silent rank takes nobody else's time away
        self._ask(lambda talk: said.update({talk.peer: json.loads(talk.receive(most_s, begin))}))
        self._said = said
        by_host: dict[str, Seen] = {}
        for rank in sorted(said):
            host = self._label(rank)
            if host in by_host:
                by_host[host].ranks += 1
            else:
                by_host[host] = Seen(host, said[rank])
        self.hosts, self.order = list(by_host.values()), [self._label(rank) for rank in sorted(said)]
        if not self.findings and comm.size > 1:
            self.findings.append(
                Finding("hosts", OK, f"{comm.size} ranks on {len(self.hosts)} host{'s' * (len(self.hosts) > 1)} answer")
            )
        self.links: list[Link] = []
        self._ask(self._measure)

    def stop(self) -> bool:
        """Let the workers end; whether some are missing, so that MPI's own end would wait for them."""
        missing = any(finding.level != OK for finding in self.findings)
        say_stop(self._talks, missing)
        return missing

    def _measure(self, talk: Talk) -> None:
        host, here, there = self._label(talk.peer), *(set(self._said[rank]["addresses"]) for rank in (ROOT, talk.peer))
        link = measure(talk, host, here, there)
        self.links.append(link)
        next(seen for seen in self.hosts if seen.host == host).ahead_s = link.ahead_s

    def _ask(self, step: Callable[[Talk], None]) -> None:
        """Do this with every worker that answers still."""
        for talk in list(self._talks):
            try:
                step(talk)
            except SilentError as error:
                self._talks.remove(talk)
                self.findings.append(silent(talk.peer, self._label(talk.peer), str(error)))

    def _label(self, rank: int) -> str:
        """The name of a rank's host; with its first rank, if two have the same."""
        if rank not in self._machines:
            return f"rank {rank}"
        machine = self._machines[rank]
        name = machine.partition(" ")[0]
        others = {other for other in self._machines.values() if other.partition(" ")[0] == name}
        first = min(rank for rank, other in self._machines.items() if other == machine)
        return name if len(others) == 1 else f"{name} (rank {first})"
