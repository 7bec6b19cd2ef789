"""`python -m halo_mpi.doctor`: is this cluster ready for a run? Under mpirun, on one computer, or over ssh for the hosts of a hostfile."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from halo_mpi import __version__
from halo_mpi.cli import run_command
from halo_mpi.engine.parting import Parting
from halo_mpi.engine.stage import RANKS
from halo_mpi.errors import EXIT_DONE, EXIT_FAILED, UsageError
from halo_mpi.health.finding import ERROR, OK, Finding
from halo_mpi.health.hosts import DEFAULT_SSH
from halo_mpi.versions import version_option

EXAMPLES = """\b
Examples:
  launch/halo-mpirun -hostfile hostfiles/pis.txt python -m halo_mpi.doctor --model models/smollm2-135m.halo
  halo-mpi doctor --hostfile hostfiles/pis.txt
"""


@click.command(epilog=EXAMPLES, short_help="Look whether a cluster is ready for a run, and say what to do where it is not.")
@click.option("--model", type=click.Path(path_type=Path), metavar="DIR",
              help="Look whether this model is on all hosts, and fits their memory.")  # fmt: skip
@click.option("--context", type=click.IntRange(1), default=2048, show_default=True, metavar="C",
              help="With --model: tokens that the KV cache must hold.")  # fmt: skip
@click.option("--hostfile", type=click.Path(path_type=Path), metavar="FILE",
              help="Without mpirun: ask the hosts of this file over ssh. Tells of those that are down, for which mpirun only fails; links "
                   "are measured under mpirun.")  # fmt: skip
@click.option("--ssh", default=DEFAULT_SSH, show_default=True, metavar="CMD",
              help="With --hostfile: what starts a command on a host, as SSH HOST COMMAND.")  # fmt: skip
@click.option("--patience", "patience_s", type=click.FloatRange(1), default=30.0, show_default=True, metavar="S",
              help="Seconds that hosts may take to examine themselves; who takes longer is reported as silent.")  # fmt: skip
@click.option("--json", "wanted", is_flag=True, help="Print one JSON object.")
@click.option("--examine", is_flag=True, hidden=True, help="Print what this host says of itself as JSON.")
@click.option("--sysfs", type=click.Path(path_type=Path), default="/", hidden=True, metavar="DIR",
              help="Where the machine's sys and proc are.")  # fmt: skip
@click.option("--verbose", is_flag=True, help="Show a traceback if something fails.")
@version_option
@click.pass_obj
def doctor(comm, model: Path | None, context: int, hostfile: Path | None, ssh: str, patience_s: float, wanted: bool, examine: bool,
           sysfs: Path, verbose: bool) -> Parting | None:  # fmt: skip
    """Check a cluster before a run: MPI, versions, model, memory, clocks, heat, power, kernel, links. Says what is wrong, and what to do.

    Exit code 0 if there are no errors (warnings do not count), 1 if there are, 2 after wrong use.
    """
    if examine or hostfile:
        import mpi4py

        mpi4py.rc.initialize = False  # its version is known without starting it
    from halo_mpi.health.examine import examine as examination

    own = partial(examination, model, sysfs)
    if examine:
        click.echo(json.dumps(own()))
        return None
    if hostfile:
        words = ["--sysfs", str(sysfs)] + (["--model", str(model)] if model else [])
        findings, hosts = _over_ssh(hostfile, ssh, patience_s, words, own, context)
        sys.exit(_tell(findings, [], hosts, wanted))

    from halo_mpi.engine.machine import survives_ends
    from halo_mpi.health import flavours, links, together
    from halo_mpi.health.ranks import Ranks, answer

    if comm.rank:
        return Parting(alone=answer(comm, own))
    ranks = Ranks(comm, own, patience_s)
    name = ranks.hosts[0].said["mpi"]
    findings = flavours.apart(name, comm.size, os.environ)
    findings += [flavours.running(name, survives_ends(), len(ranks.hosts)), *ranks.findings]
    findings += together.diagnose(ranks.hosts, ranks.order, context)
    said = ranks.hosts[0].said["model"]
    findings += links.judged(ranks.links, 2 * said["config"]["layers"] if said else 0)
    code = _tell(findings, ranks.links, len(ranks.hosts), wanted)
    return Parting(code, ranks.stop())


def _over_ssh(
    hostfile: Path, ssh: str, most_s: float, words: list[str], own: Callable[[], dict], context: int
) -> tuple[list[Finding], int]:
    """Findings, and the number of hosts that answered. `words`: options for doctor there; `own`: this computer's examination."""
    from halo_mpi.health import flavours, hosts, together

    if any(name in os.environ for name in RANKS):
        raise UsageError("--hostfile is for a start without mpirun; with it, give the hostfile to mpirun")
    mine = together.Seen("", own())
    named, findings = hosts.read_hosts(hostfile, mine.said["mpi"])
    if mine.said["mpi"]:
        findings.insert(0, flavours.installed(mine.said["mpi"], flavours.mpirun_version()))
    if not named:
        return findings, 0
    here = next((host for host in named if host.here), None)
    mine.host, mine.ranks = (here.name, here.slots) if here else (mine.said["host"], 0)
    seen, silent = hosts.ask([host for host in named if host is not here], ssh, words, most_s)
    findings += silent or [Finding("hosts", OK, f"{len(named)} of {len(named)} answer")]
    everybody = [mine, *seen]
    order = [each.host for each in everybody for _ in range(each.ranks)]
    return findings + together.diagnose(everybody, order, context), len(everybody)


def _tell(findings: list[Finding], links: list, hosts: int, wanted: bool) -> int:
    """Print it; the exit code."""
    from halo_mpi.health.shown import print_findings

    errors = sum(finding.level == ERROR for finding in findings)
    if wanted:
        told = {
            "halo_mpi": __version__,
            "findings": [finding.to_dict() for finding in findings],
            "links": [link.to_dict() for link in links],
        }
        click.echo(json.dumps({**told, "errors": errors}))
    else:
        print_findings(findings, links, hosts)
    return EXIT_FAILED if errors else EXIT_DONE


if __name__ == "__main__":
    run_command(doctor)
