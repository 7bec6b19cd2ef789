"""The failures that halo_mpi understands. Each is one sentence that names the file, rank or option and says what to do."""

EXIT_DONE = 0
EXIT_FAILED = 1  # the run failed (disk full included)
EXIT_USAGE = 2  # wrong use or bad input
EXIT_LOST = 3  # done, but with devices lost on the way
EXIT_INTERRUPTED = 130  # the shell's convention for SIGINT: 128 + 2
EXIT_TERMINATED = 143  # and for SIGTERM: 128 + 15


class HaloError(Exception):
    """A failure with a one-line message for the user and the exit code of the program."""

    exit_code = EXIT_FAILED


class UsageError(HaloError):
    """A wrong option value, or options that do not go together."""

    exit_code = EXIT_USAGE


class InputError(HaloError):
    """A file given by the user cannot be used: missing, of an unknown kind, damaged, or not matching another one."""

    exit_code = EXIT_USAGE


class DamagedFileError(InputError):
    """A file ends too early, or its content disagrees with its checksum or with itself."""


class MemoryBudgetError(HaloError):
    """The memory of a rank or host does not hold its share of the model; found out before anything is loaded."""

    exit_code = EXIT_USAGE


class DiskFullError(HaloError):
    """The disk does not hold what is to be written."""


class RanksLostError(HaloError):
    """Ranks are gone, and the others cannot go on without them; another start can. `ranks`: whose message nobody waits for."""

    def __init__(self, message: str, ranks: set[int], exit_code: int = EXIT_FAILED):
        super().__init__(message)
        self.ranks, self.exit_code = ranks, exit_code

    def on(self, hosts: list[str] | None) -> "RanksLostError":
        """The same, with the names of the hosts."""
        return self


def describe(error: BaseException, verbose: bool) -> str:
    """The one line for the user about any failure; with `verbose` the traceback was shown before it."""
    if isinstance(error, HaloError):
        return str(error)
    if isinstance(error, BrokenPipeError):
        return "standard output was closed before the end"
    hint = "" if verbose else "; run again with --verbose for the traceback, and report it"
    return f"unexpected {type(error).__name__}: {' '.join(str(error).split())}{hint}"
