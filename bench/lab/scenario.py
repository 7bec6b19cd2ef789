"""What a laboratory looks like: hosts, the faults of their links, their speed, and what happens when.

Each host has one link to the switch. A packet between two hosts meets the faults (loss, delay, jitter) of one link only,
the worse one of the two, and of equal ones the higher-numbered host's: `loss = 0.05` loses 5 % of the packets between any two
hosts in each direction. The rate limits every link.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from bench.lab.system import LabError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

MAX_HOSTS = 64
ACTIONS = ("kill", "stop", "continue", "link-down", "link-up", "black-hole", "heal", "slowdown", "loss", "kill-daemon", "reboot",
           "nan", "oom", "terminate")  # fmt: skip
OPPOSITES = {"stop": "continue", "link-down": "link-up", "black-hole": "heal", "slowdown": "slowdown", "loss": "loss"}
WITH_VALUE = ("slowdown", "loss", "reboot")
LOSS_DURING = ("generation", "measuring", "always")  # from then on, until generation ends; always: while MPI starts, too


def check(condition: bool, key: str, rule: str) -> None:
    if not condition:
        raise LabError(f"{key} must be {rule}")


@dataclass(frozen=True)
class Burst:
    """Gilbert-Elliott: `good` and `bad` are mean spells in packets, the rest the loss within each."""

    good: float
    bad: float
    loss_good: float = 0.0
    loss_bad: float = 1.0

    def __post_init__(self):
        check(self.good >= 1, "good", "1 packet or more")
        check(self.bad >= 1, "bad", "1 packet or more")
        check(0 <= self.loss_good <= 1, "loss_good", "between 0 and 1")
        check(0 <= self.loss_bad <= 1, "loss_bad", "between 0 and 1")

    @property
    def loss(self) -> float:
        """The loss in the long run."""
        return (self.good * self.loss_good + self.bad * self.loss_bad) / (self.good + self.bad)


@dataclass(frozen=True)
class Host:
    """A host's link and its speed. `pace_ms`: the least time of a sync per unit share over one token; `row_share`: so much of it more
    for every further one in a request (the engine's int4 kernels: 0.08); `slowdown`: its speed, 1 is full; `read_mbps`: MB/s that
    its disk gives at most."""

    loss: float = 0.0
    rate_mbit: float | None = None
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    burst: Burst | None = None
    pace_ms: float = 0.0
    row_share: float = 0.0
    slowdown: float = 1.0
    read_mbps: float | None = None

    def __post_init__(self):
        check(0 <= self.loss < 1, "loss", "at least 0 and below 1")
        check(self.rate_mbit is None or self.rate_mbit > 0, "rate_mbit", "above 0")
        check(0 <= self.delay_ms <= 10_000, "delay_ms", "between 0 and 10000")
        check(0 <= self.jitter_ms <= self.delay_ms, "jitter_ms", "between 0 and delay_ms")
        check(self.pace_ms >= 0, "pace_ms", "0 or more")
        check(self.row_share >= 0, "row_share", "0 or more")
        check(0 < self.slowdown <= 1, "slowdown", "a speed above 0 and at most 1")
        check(self.read_mbps is None or self.read_mbps > 0, "read_mbps", "above 0")
        check(not (self.loss and self.burst), "loss", "absent where [burst] is given: they exclude each other")

    @property
    def mean_loss(self) -> float:
        return self.burst.loss if self.burst else self.loss


@dataclass(frozen=True)
class Event:
    """What happens to a host, `after_s` seconds after a trigger: ("begin", None), ("token", n) or ("phase", name).

    A slowdown or loss without a value goes back to what the scenario gives the host. `reboot` is followed by `boot`.
    """

    host: str
    action: str
    value: float | None = None
    trigger: tuple = ("begin", None)
    after_s: float = 0.0


@dataclass(frozen=True)
class Scenario:
    name: str
    hosts: dict[str, Host]
    events: tuple[Event, ...] = ()
    congestion: str = "cubic"
    rto_min_ms: int | None = None
    quickack: bool = False
    loss_during: str = "generation"
    source: str = field(default="", compare=False)

    def __post_init__(self):
        check(self.congestion.isalnum(), "congestion", "the name of a TCP congestion control")
        check(self.rto_min_ms is None or self.rto_min_ms > 0, "rto_min_ms", "above 0")
        check(self.loss_during in LOSS_DURING, "loss_during", " or ".join(f'"{name}"' for name in LOSS_DURING))


def load_scenario(path: str | Path, hosts: int | None = None) -> Scenario:
    """The scenario in a TOML file; `hosts` overrides its number of hosts. Errors name file and key."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LabError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LabError(f"{path}: no valid TOML: {error}") from None
    if hosts is not None:
        table["hosts"] = hosts
    try:
        return replace(_scenario(table, Path(path).stem), source=str(path))
    except LabError as error:
        raise LabError(f"{path}: {error}") from None


HOST_KEYS = {f.name: float for f in fields(Host)} | {"burst": dict}
TOP_KEYS = {"hosts": int, "event": list, "host": dict, "congestion": str, "rto_min_ms": int, "quickack": bool, "loss_during": str}
BURST_KEYS = {f.name: float for f in fields(Burst)}
EVENT_KEYS = {"host": str, "action": str, "value": float, "at_s": float, "at_token": int, "at_phase": str,
              "after_s": float, "for_s": float, "every_s": float, "times": int}  # fmt: skip
KINDS = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
KINDS |= {list: "[[...]] tables", dict: "a [table]"}


def _checked(table: dict, keys: dict, place: str) -> dict:
    """The table, if it has known keys only, and values of their types."""
    for key, value in table.items():
        if key not in keys:
            hint = "; keys of the whole scenario stand before the first [table]" if place and key in TOP_KEYS | HOST_KEYS else ""
            raise LabError(f"{place}{key}: unknown key{hint}")
        kind = (int, float) if keys[key] is float else keys[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise LabError(f"{place}{key} must be {KINDS[keys[key]]}")
    return table


def _built(kind: type, values: dict, place: str):
    try:
        return kind(**values)
    except LabError as error:
        raise LabError(f"{place}{error}") from None
    except TypeError:
        missing = [f.name for f in fields(kind) if f.name not in values and f.name in ("good", "bad")]
        raise LabError(f"{place}{missing[0]} is missing") from None


def _scenario(table: dict, name: str) -> Scenario:
    _checked(table, TOP_KEYS | HOST_KEYS, "")
    number = table.get("hosts")
    if number is None:
        raise LabError("hosts is missing")
    check(1 <= number <= MAX_HOSTS, "hosts", f"between 1 and {MAX_HOSTS}")
    names = [f"pi{i}" for i in range(1, number + 1)]
    common = _host_values(table, "")
    own = table.get("host", {})
    hosts = {}
    for host, values in own.items():
        check(host in names, f"host.{host}", f"one of pi1..pi{number}")
        if not isinstance(values, dict):
            raise LabError(f"host.{host} must be a [table]")
    _built(Host, common, "")
    for host in names:
        place = f"host.{host}."
        values = _host_values(_checked(own.get(host, {}), HOST_KEYS, place), place)
        inherited = {k: v for k, v in common.items() if not ({"loss", "burst"} & values.keys() and k in ("loss", "burst"))}
        hosts[host] = _built(Host, {**inherited, **values}, place)
    events = [e for i, entry in enumerate(table.get("event", []), 1) for e in _events(entry, f"event {i}: ", hosts)]
    rest = {k: table[k] for k in ("congestion", "rto_min_ms", "quickack", "loss_during") if k in table}
    return Scenario(name, hosts, tuple(events), **rest)


def _host_values(table: dict, place: str) -> dict:
    values = {k: v for k, v in table.items() if k in HOST_KEYS}
    if "burst" in values:
        inner = f"{place}burst."
        values["burst"] = _built(Burst, _checked(values["burst"], BURST_KEYS, inner), inner)
    return values


def _events(entry, place: str, hosts: dict[str, Host]) -> list[Event]:
    """One [[event]]. `for_s` undoes it after so long, `every_s` and `times` repeat it."""
    if not isinstance(entry, dict):
        raise LabError(f"{place}must be an [[event]] table")
    _checked(entry, EVENT_KEYS, place)
    entry = {"host": "pi1"} | entry if entry.get("action") == "terminate" else entry
    for key in ("host", "action"):
        if key not in entry:
            raise LabError(f"{place}{key} is missing")
    host, action, value = entry["host"], entry["action"], entry.get("value")
    check(host in hosts, f"{place}host", f"one of pi1..pi{len(hosts)}")
    check(action in ACTIONS, f"{place}action", "one of " + ", ".join(ACTIONS))
    if action in WITH_VALUE:
        check(value is not None, f"{place}value", f"given with {action}")
        if action == "reboot":
            check(value > 0, f"{place}value", "the seconds until it is back, above 0")
            check(host != "pi1", f"{place}host", "another one than pi1, where the command was started")
        else:
            _built(Host, {action: value}, f"{place}value: ")
    else:
        check(value is None, f"{place}value", f"absent with {action}")
    given = [key for key in ("at_s", "at_token", "at_phase") if key in entry]
    if len(given) != 1:
        raise LabError(f"{place}give one of at_s, at_token, at_phase")
    check(entry.get("at_s", 0) >= 0, f"{place}at_s", "0 or more")
    check(entry.get("at_token", 1) >= 1, f"{place}at_token", "1 or more")
    trigger = ("begin", None) if given[0] == "at_s" else (given[0][3:], entry[given[0]])
    check("after_s" not in entry or given[0] != "at_s", f"{place}after_s", "absent with at_s")
    check(entry.get("after_s", 0) >= 0, f"{place}after_s", "0 or more")
    first = entry.get("at_s", entry.get("after_s", 0.0))
    lasts, every, times = entry.get("for_s"), entry.get("every_s"), entry.get("times", 1)
    check(times >= 1, f"{place}times", "1 or more")
    check((times == 1) == (every is None), f"{place}every_s", "given together with times = 2 or more")
    check(every is None or every > 0, f"{place}every_s", "above 0")
    if lasts is not None:
        check(action in OPPOSITES, f"{place}for_s", f"absent with {action}")
        check(0 < lasts < (every or float("inf")), f"{place}for_s", "above 0 and below every_s")
    events = []
    for i in range(times):
        start = first + i * (every or 0.0)
        events.append(Event(host, action, value, trigger, start))
        if action == "reboot":
            events.append(Event(host, "boot", None, trigger, start + value))
        if lasts is not None:
            events.append(Event(host, OPPOSITES[action], None, trigger, start + lasts))
    return events
