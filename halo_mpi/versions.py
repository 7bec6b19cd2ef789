"""What `--version` tells: this program, its MPI and the libraries that it computes with. MPI is not started, PyTorch not loaded."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from halo_mpi import __version__

LIBRARIES = ("torch", "numba", "llvmlite", "numpy", "h5py", "mpi4py")


def git_revision() -> str | None:
    """The revision of the checkout that this program runs from, with a + if it was changed; None outside a checkout."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def mpi_name() -> str:
    """The library that mpi4py loads, for example "Open MPI 5.0.11"; it need not be started. Raises ImportError, RuntimeError."""
    from mpi4py import MPI

    name, numbers = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, numbers))}"


def versions() -> str:
    """Two lines, the first of this program alone."""
    revision = git_revision()
    ours = f"halo_mpi {__version__}" + (f" ({revision})" if revision else "")
    libraries = ", ".join(f"{name} {installed_version(name) or 'missing'}" for name in LIBRARIES)
    return f"{ours}\nPython {platform.python_version()}, {_mpi_without_start()}, {libraries}"


def version_option(command: click.Command) -> click.Command:
    """Add `--version` to a command."""

    def tell(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
        if asked:
            click.echo(versions())
            context.exit()

    return click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=tell,
                        help="Show the versions of halo_mpi, MPI and libraries and exit.")(command)  # fmt: skip


def installed_version(name: str) -> str:
    """Of a library; empty if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _mpi_without_start() -> str:
    import mpi4py

    mpi4py.rc.initialize = False
    try:
        return mpi_name()
    except (ImportError, RuntimeError):
        return "no MPI library"
