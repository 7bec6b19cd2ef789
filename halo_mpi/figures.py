"""What all figures share."""

from contextlib import contextmanager
from pathlib import Path

import click

MISSING = "figures need matplotlib: pip install halo-mpi[bench]"


@contextmanager
def figure(path: Path, panels: int = 1, width: float = 5.0):
    """Axes side by side, saved to `path` at the end.

    Raises ClickException where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise click.ClickException(MISSING) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, panels, figsize=(width * panels, 4), squeeze=False, layout="constrained")
    try:
        yield axes[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=130)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None
    finally:
        pyplot.close(drawn)


def require_matplotlib(wanted: Path | None) -> None:
    """Before a benchmark that takes minutes, not after."""
    if wanted:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise click.ClickException(MISSING) from None
