"""The scenario's events: when they are due, and how each is done to a running lab."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bench.lab.lab import Lab
from bench.lab.links import number_of
from bench.lab.scenario import Event, Host
from bench.lab.system import LabError

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
        broken = {"link-up": self.lab.conditions.unplugged, "heal": self.lab.conditions.black_holes}
        for due in later:
            event = due.event
            if event.host in broken.get(event.action, ()) or event.action == "continue":
                self._do(event, now)

    def _do(self, event: Event, now: float) -> None:
        entry = {"t_s": round(now - (self.began_at or now), 3), "host": event.host, "action": event.action}
        try:
            self._change(event)
        except (LabError, ProcessLookupError) as error:
            entry["failed"] = str(error)
            print(f"lab: {event.action} on {event.host}: {error}", file=sys.stderr)
        self.log.append(entry | ({} if event.value is None else {"value": event.value}))

    def _change(self, event: Event) -> None:
        host, conditions = event.host, self.lab.conditions
        if event.action in SIGNALS:
            pid = self.lab.rank_on(host)
            if pid is None:
                raise LabError("there is no rank")
            os.kill(pid, SIGNALS[event.action])
            return
        own = self.lab.scenario.hosts[host]
        if event.action == "slowdown":
            speed = own.slowdown if event.value is None else event.value
            conditions.hosts[host] = replace(conditions.hosts[host], slowdown=speed)
            write_pace(self.lab.marks, host, conditions.hosts[host])
            return
        if event.action == "loss":
            loss, burst = (own.loss, own.burst) if event.value is None else (event.value, None)
            conditions.hosts[host] = replace(conditions.hosts[host], loss=loss, burst=burst)
        elif event.action == "link-down":
            conditions.unplugged.add(host)
        elif event.action == "link-up":
            conditions.unplugged.discard(host)
        elif event.action == "black-hole":
            conditions.black_holes.add(host)
        elif event.action == "heal":
            conditions.black_holes.discard(host)
        self.lab.apply()


def write_pace(marks: Path, host: str, values: Host) -> None:
    """Tells the host's rank its pace; the program looks at the file's time."""
    path = marks / f"pace-{number_of(host) - 1}.json"
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"pace_ms": values.pace_ms, "slowdown": values.slowdown}))
    fresh.replace(path)
