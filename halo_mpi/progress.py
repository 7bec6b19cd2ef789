"""A progress bar on a terminal, silence elsewhere."""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.progress import track


def progress(steps: Iterable, total: int, label: str, shown: bool = True) -> Iterable:
    """Iterate over `steps`, drawn on standard error if that is a terminal, if `shown`."""
    console = Console(file=sys.stderr)
    return track(steps, label, total=total, console=console, transient=True, disable=not shown or not console.is_terminal)
