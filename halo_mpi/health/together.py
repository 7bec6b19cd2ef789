"""What the hosts say of themselves, put together: is it the same on all, and is it enough?"""

from dataclasses import dataclass, replace

from halo_mpi.health import flavours, models, software
from halo_mpi.health.finding import OK, WARNING, Finding
from halo_mpi.health.fit import Place, fit

APART_S = 2.0  # between clocks; texts, moves and deadlines are timed on each host by itself, so that this much does not matter


@dataclass(slots=True)
class Seen:
    """A host that answered. `said`: see examine; `ranks`: how many are to run there; `ahead_s`: its clock before the first host's."""

    host: str
    said: dict
    ranks: int = 1
    ahead_s: float = 0.0


def diagnose(hosts: list[Seen], order: list[str], context: int) -> list[Finding]:
    """Findings about hosts that answered, the root's first. `order`: the host of each rank, as far as they answered; `context`: tokens
    that the KV cache holds."""
    own = hosts[0].said["software"]
    others = [seen.host for seen in hosts if not software.is_same_program(own, seen.said["software"])]
    found = software.compared({seen.host: seen.said["software"] for seen in hosts})
    alike = [seen for seen in hosts if seen.host not in others]  # what another version says may mean something else
    found += flavours.compared({seen.host: seen.said["mpi"] for seen in alike})
    said = [replace(Finding(**finding), host=seen.host) for seen in alike for finding in seen.said["findings"]]
    unusable = {finding.host for finding in said if finding.check == "model"}
    facts = {seen.host: seen.said["model"] for seen in alike if seen.said["model"] or seen.host in unusable}
    found += [finding for finding in said if finding.check == "model"] + models.compared(facts)
    if facts.get(hosts[0].host):
        places = {seen.host: _place(seen) for seen in alike if seen.said["model"]}
        if here := [places[host] for host in order if host in places]:
            found.append(fit(facts[hosts[0].host], here, context))
    found += [finding for finding in said if finding.check != "model"]
    return found + _clocks(hosts)


def _place(seen: Seen) -> Place:
    said, model = seen.said, seen.said["model"]
    return Place(seen.host, said["available"], seen.ranks, said["resident"], model["heads"], model["groups"])


def _clocks(hosts: list[Seen]) -> list[Finding]:
    apart = [seen for seen in hosts if abs(seen.ahead_s) > APART_S]
    do = "run `sudo timedatectl set-ntp true` there; dates in logs and files mislead until then"
    found = []
    for seen in apart:
        where = "ahead of" if seen.ahead_s > 0 else "behind"
        says = f"its clock is {abs(seen.ahead_s):.0f} s {where} {hosts[0].host}'s"
        found.append(Finding("time", WARNING, says, do, seen.host))
    return found or ([Finding("time", OK, f"clocks agree to {APART_S:.0f} s")] if len(hosts) > 1 else [])
