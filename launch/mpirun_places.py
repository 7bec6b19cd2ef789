"""For halo-mpirun: which of the hosts that the command line names a start uses."""

from dataclasses import dataclass, field
from itertools import accumulate

from mpirun_hosts import read_host_list, read_hostfile
from mpirun_request import COUNTS, HOST_LISTS, HOSTFILES, MAPPINGS, PER_HOST


@dataclass
class Places:
    """The hosts, in order. A start uses the first of them that `count` ranks need (None: all); those behind are spare. `lost`: the names of
    those that did not answer."""

    hosts: list
    count: int | None = None
    per_host: int | None = None  # ranks, instead of its slots
    spread: bool = True  # each host gets a rank before any gets a second
    spares: bool = True
    lost: set = field(default_factory=set)

    @classmethod
    def of(cls, request, kind):
        files = [host for name in request.values(HOSTFILES) for host in read_hostfile(name, kind)]
        hosts = files or [host for text in request.values(HOST_LISTS) for host in read_host_list(text, kind)]
        count = min(map(int, request.values(COUNTS)), default=None)
        per_host = next(map(int, request.values(PER_HOST)), None)
        return cls(hosts, count, per_host, kind == "Open MPI", not request.has(MAPPINGS | PER_HOST))

    @property
    def in_use(self):
        return self._first([host for host in self.hosts if host.name not in self.lost])

    @property
    def ranks(self):
        return self._ranks_on(self.in_use)

    def ranks_with(self, names):
        """How many ranks there would be if these hosts were not lost."""
        return self._ranks_on(self._first([host for host in self.hosts if host.name not in self.lost - names]))

    def _first(self, hosts):
        if self.count is None or not self.spares:
            return hosts
        if self.spread:
            return hosts[: self.count]
        before = accumulate((host.slots for host in hosts), initial=0)
        return [host for host, slots in zip(hosts, before) if slots < self.count]

    def _ranks_on(self, hosts):
        if self.per_host:
            return self.per_host * len(hosts)
        if self.count and hosts == self.hosts:
            return self.count
        return min([sum(host.slots for host in hosts)] + [self.count] * bool(self.count))
