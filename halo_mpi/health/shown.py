"""Findings and links for people."""

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halo_mpi.health.finding import ERROR, OK, WARNING, Finding
from halo_mpi.health.links import Link

STYLES = {OK: "green", WARNING: "yellow", ERROR: "bold red"}
NAME_WIDTH = 14
PIPE_WIDTH = 132  # of lines where nobody has a screen of some width


def print_findings(findings: list[Finding], links: list[Link], hosts: int) -> None:
    """A line for each finding, the same ones of several hosts together; a table of links; how many of what there are.

    `hosts`: how many answered.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    table, several = Table.grid(padding=(0, 2, 0, 0)), len({finding.host for finding in findings if finding.host}) > 1
    for _ in range(3 if several else 2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for (level, check, says, do), where in _alike(findings).items():
        named = ["all" if len(where) == hosts > 1 else escape(", ".join(where))] if several else []
        what = escape(says) + (f"\n-> {escape(do)}" if do else "")
        table.add_row(f"[{STYLES[level]}]{level}[/]", check, *named, what)
    with console.capture() as captured:
        console.print(table)
        if links:
            console.print(_links(links))
        console.print(summary(findings))
    click.echo(captured.get(), nl=False)


def summary(findings: list[Finding]) -> str:
    """How many errors and warnings."""
    counts = [(sum(finding.level == level for finding in findings), level) for level in (ERROR, WARNING)]
    told = [f"{count} {level}{'s' * (count != 1)}" for count, level in counts if count]
    return ", ".join(told) or "all good"


def _alike(findings: list[Finding]) -> dict[tuple[str, str, str, str], list[str]]:
    """Where what was found: what is well first, findings of one check one after the other."""
    levels, checks = list(STYLES), list(dict.fromkeys(finding.check for finding in findings))
    alike: dict[tuple[str, str, str, str], list[str]] = {}
    for finding in sorted(findings, key=lambda finding: (levels.index(finding.level), checks.index(finding.check))):
        where = alike.setdefault((finding.level, finding.check, finding.says, finding.do), [])
        if finding.host:
            where.append(finding.host)
    return alike


def _links(links: list[Link]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))  # all columns in 80
    columns = (
        "rank",
        "host",
        "round\ntrip ms",
        "p99",
        "max",
        "late",
        "lost\nthere",
        "\nback",
        "Mbit/s\nthere",
        "\nback",
        "conn.",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "host" else "right", no_wrap=True, max_width=NAME_WIDTH)
    for link in links:
        times = (f"{ms:.2f}" for ms in (link.rtt_p50_ms, link.rtt_p99_ms, link.rtt_max_ms))
        losses = ("-" if loss is None else f"{loss:.1%}" for loss in (link.loss_there, link.loss_back))
        speeds = (f"{mbit:.0f}" for mbit in (link.mbit_there, link.mbit_back))
        connections = str(link.connections or "-")
        table.add_row(str(link.rank), escape(link.host), *times, f"{link.late_rate:.1%}", *losses, *speeds, connections)
    return table
