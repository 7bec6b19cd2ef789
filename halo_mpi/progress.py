"""A progress bar on a terminal, silence elsewhere, even where FORCE_COLOR asks for colours in a pipe."""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.progress import track


def progress(steps: Iterable, total: int, label: str, shown: bool = True) -> Iterable:
    """Iterate over `steps`, drawn on standard error if that is a terminal, if `shown`."""
    drawn = shown and sys.stderr.isatty()
    return track(steps, label, total=total, console=Console(file=sys.stderr), transient=True, disable=not drawn)
