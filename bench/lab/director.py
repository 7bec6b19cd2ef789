"""The scenario's events: when they are due, and how each is done to a running lab."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, replace

from bench.lab.lab import Lab
from bench.lab.links import number_of
from bench.lab.memory import kill_for_memory
from bench.lab.processes import end_processes
from bench.lab.scenario import Event
from bench.lab.system import LabError, inside, set_kernel_value

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "continue": signal.SIGCONT}


@dataclass(frozen=True)
class Due:
    at: float  # monotonic seconds
    event: Event


class Director:
    """Keeps the agenda and a log of what was done. Each trigger (begin, a token, a phase) fires once."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self.waiting = list(lab.scenario.events)
        self.agenda: list[Due] = []
        self.log: list[dict] = []
        self.began_at: float | None = None
        self.launcher: int | None = None  # the process that `terminate` tells to end
        self.ranks = {host: number_of(host) - 1 for host in lab.scenario.hosts}
        self.spoiled: set[str] = set()
        for host in self.ranks:
            self.write_pace(host)

    def rank_is_on(self, rank: int, host: str) -> None:
        """A rank has started; after a restart without some host the numbers are others."""
        if self.ranks.get(host) != rank:
            self.ranks = {other: number for other, number in self.ranks.items() if number != rank} | {host: rank}
            self.write_pace(host)

    def begin(self, now: float) -> None:
        if self.began_at is None:
            self.began_at = now
            self._fire(now, lambda trigger: trigger == ("begin", None))

    def token(self, number: int, now: float) -> None:
        self._fire(now, lambda trigger: trigger[0] == "token" and trigger[1] <= number)

    def phase(self, name: str, now: float) -> None:
        self._fire(now, lambda trigger: trigger == ("phase", name))

    def _fire(self, now: float, has_come) -> None:
        fired = [event for event in self.waiting if has_come(event.trigger)]
        if fired:
            self.waiting = [event for event in self.waiting if not has_come(event.trigger)]
            self.agenda = sorted(self.agenda + [Due(now + event.after_s, event) for event in fired], key=lambda due: due.at)

    def act(self, now: float) -> None:
        """Does what is due."""
        while self.agenda and self.agenda[0].at <= now:
            self._do(self.agenda.pop(0).event, now)

    def end(self, now: float) -> None:
        """After generation nothing more happens, but what the agenda would have mended later is mended at once."""
        later, self.agenda, self.waiting = self.agenda, [], []
        unplugged = self.lab.conditions.unplugged
        broken = {"link-up": unplugged, "boot": unplugged, "heal": self.lab.conditions.black_holes}
        for due in later:
            event = due.event
            if event.host in broken.get(event.action, ()) or event.action == "continue":
                self._do(event, now)

    def _do(self, event: Event, now: float) -> None:
        entry = {"t_s": round(now - (self.began_at or now), 3), "host": event.host, "action": event.action}
        try:
            entry |= self._change(event) or {}
        except (LabError, ProcessLookupError) as error:
            entry["failed"] = str(error)
            print(f"lab: {event.action} on {event.host}: {error}", file=sys.stderr)
        self.log.append(entry | ({} if event.value is None else {"value": event.value}))

    def _change(self, event: Event) -> dict | None:
        """Does it; what the log should say beyond that."""
        host, conditions, action = event.host, self.lab.conditions, event.action
        if action in SIGNALS:
            os.kill(found(self.lab.rank_on(host), "rank"), SIGNALS[action])
        elif action == "kill-daemon":
            os.kill(found(self.lab.daemon_on(host), "daemon"), signal.SIGKILL)
        elif action == "terminate":
            os.kill(found(self.launcher, "launcher"), signal.SIGTERM)
        elif action == "oom":
            return {"by": kill_for_memory(found(self.lab.rank_on(host), "rank"), f"{self.lab.names.lab}-{host}")}
        elif action == "nan":
            self.spoiled.add(host)
            self.write_pace(host)
        elif action == "slowdown":
            speed = self.lab.scenario.hosts[host].slowdown if event.value is None else event.value
            conditions.hosts[host] = replace(conditions.hosts[host], slowdown=speed)
            self.write_pace(host)
        else:
            self._change_links(event)
        return None

    def _change_links(self, event: Event) -> None:
        host, conditions, own = event.host, self.lab.conditions, self.lab.scenario.hosts[event.host]
        if event.action == "loss":
            loss, burst = (own.loss, own.burst) if event.value is None else (event.value, None)
            conditions.hosts[host] = replace(conditions.hosts[host], loss=loss, burst=burst)
        elif event.action in ("link-down", "reboot"):
            conditions.unplugged.add(host)
        elif event.action in ("link-up", "boot"):
            conditions.unplugged.discard(host)
        elif event.action == "black-hole":
            conditions.black_holes.add(host)
        elif event.action == "heal":
            conditions.black_holes.discard(host)
        self.lab.apply()
        if event.action == "reboot":
            # Nobody hears of it: the links are cut before, and the kernel soon forgets what was connected.
            namespace = self.lab.names.namespace(host)
            inside(namespace, lambda: set_kernel_value("net/ipv4/tcp_orphan_retries", 1))
            end_processes(namespace)

    def write_pace(self, host: str) -> None:
        """Tells the host's rank its pace, and whether to spoil its answers; the program looks at the file's time."""
        values, rank = self.lab.conditions.hosts[host], self.ranks.get(host)
        if rank is None:
            return
        path = self.lab.marks / f"pace-{rank}.json"
        fresh = path.with_suffix(".new")
        spoil = {"spoil": True} if host in self.spoiled else {}
        pace = {"pace_ms": values.pace_ms, "row_share": values.row_share, "slowdown": values.slowdown}
        disk = {"read_mbps": values.read_mbps} if values.read_mbps else {}
        fresh.write_text(json.dumps(pace | disk | spoil))
        fresh.replace(path)


def found(pid: int | None, what: str) -> int:
    if pid is None:
        raise LabError(f"there is no {what}")
    return pid
