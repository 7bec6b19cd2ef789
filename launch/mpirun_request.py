"""For halo-mpirun: its command line, which is mpirun's with a few options more."""

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from mpirun_hosts import DEFAULT_AGENT, LaunchError

CHECKPOINT = "HALO_MPI_CHECKPOINT"  # the file in which the program keeps the text under way
GRACE_S = 25.0
SWITCHES = {
    "--dry-run": ("dry_run", True),
    "--no-restart": ("may_restart", False),
    "--rejoin": ("rejoin", True),
}  # without values

# mpirun options that take values, without their dashes; every other option is taken to stand alone.
TAKE_ONE = set(
    "n np c N H host hosts f hostfile machinefile machine map-by rank-by bind-to x wdir wd prefix path tune am display output "
    "output-filename output-directory xterm timeout app stdin with-ft personality runtime-options rtos launch-agent report-uri "
    "npernode npersocket cpus-per-proc cpu-set cpu-list max-restarts default-hostfile add-host add-hostfile envlist genvlist ppn "
    "launcher launcher-exec iface rmk topolib membind demux order-nodes configfile nameserver localhost usize profile rankmap "
    "prepend-pattern outfile-pattern errfile-pattern pmi-port memory-alloc-kinds gpus-per-proc".split()
)
TAKE_TWO = {"mca", "gmca", "omca", "prtemca", "pmixmca", "env", "genv"}
COUNTS = {"n", "np", "c"}
HOSTFILES = {"hostfile", "machinefile", "f", "machine"}
HOST_LISTS = {"H", "host", "hosts"}
PLACES = HOSTFILES | HOST_LISTS | {"default-hostfile"}
MAPPINGS = {"map-by", "N", "npernode", "npersocket", "ppr", "oversubscribe", "nooversubscribe"}
PER_HOST = {"N", "npernode", "ppn"}
AGENTS = ("plm_ssh_agent", "plm_rsh_agent")  # Open MPI's parameters
CHANGE_OUTPUT = {"output", "tag-output", "timestamp-output", "xml", "prepend-rank", "l", "prepend-pattern", "output-filename"}


@dataclass
class Request:
    """What the user asked for: mpirun's options as (name, words), and the command."""

    options: list
    command: list
    dry_run: bool = False
    may_restart: bool = True
    rejoin: bool = False
    grace_s: float = GRACE_S

    def values(self, names):
        """The values of all options of these names, `--name=value` included."""
        for name, words in self.options:
            if name in names:
                yield words[1] if len(words) > 1 else words[0].partition("=")[2]

    def has(self, names):
        return any(name in names for name, _ in self.options)

    def mca(self, key):
        """Whether the user chose this MCA parameter, on the command line or in the environment."""
        return f"OMPI_MCA_{key}" in os.environ or any(name in TAKE_TWO and words[1] == key for name, words in self.options)

    def agent(self):
        """What starts a command on another host, as mpirun does it."""
        given = [words[2] for name, words in self.options if name in TAKE_TWO and words[1] in AGENTS]
        given += list(self.values({"launcher-exec"}))
        places = [f"{kind}_MCA_{key}" for kind in ("PRTE", "OMPI") for key in AGENTS] + ["HYDRA_LAUNCHER_EXEC"]
        given += [os.environ[place] for place in places if os.environ.get(place)]
        return given[0].partition(" : ")[0] if given else DEFAULT_AGENT

    @property
    def restarts(self):
        """Whether a lost job is started again; bytes that mpirun adds to the output could not be told from the text's."""
        return self.may_restart and not self.changes_output

    @property
    def changes_output(self):
        return self.has(CHANGE_OUTPUT)

    def checkpoint(self):
        """The checkpoint's file that the user named, or None."""
        for word, following in zip(self.command, [*self.command[1:], ""]):
            if word == "--checkpoint" or word.startswith("--checkpoint="):
                return Path(word.partition("=")[2] or following)
        return Path(os.environ[CHECKPOINT]) if os.environ.get(CHECKPOINT) else None

    def on(self, places, hostfile):
        """The same on the hosts in use only, for which a hostfile is written; on all: as it was."""
        hosts = places.in_use
        if hosts == places.hosts:
            return self
        hostfile.write_text("".join(host.line + "\n" for host in hosts))
        options = [(name, words) for name, words in self.options if name not in HOSTFILES | HOST_LISTS | COUNTS]
        if not self.has(PER_HOST):
            options.append(("n", ["-n", str(places.ranks)]))
        return replace(self, options=[*options, ("hostfile", ["-hostfile", str(hostfile)])])


def parse(arguments, usage):
    """Splits the command line into mpirun's options and the command, which begins at the first word that is no option.
    `usage`: for --help."""
    request, i = Request([], []), 0
    while i < len(arguments) and arguments[i].startswith("-") and not request.command:
        word = arguments[i]
        name, equals, _ = word.lstrip("-").partition("=")
        if word in ("-h", "-help", "--help"):
            print(usage.rstrip())
            sys.exit(0)
        if word in SWITCHES:
            setattr(request, *SWITCHES[word])
            i += 1
            continue
        if name == "grace":
            i += 1 if equals else 2
            request.grace_s = seconds(arguments[i - 1].rpartition("=")[2] if i <= len(arguments) else "")
            continue
        if word == "--":
            i += 1
            break
        length = 1 if equals else 3 if name in TAKE_TWO else 2 if name in TAKE_ONE else 1
        if i + length > len(arguments):
            raise LaunchError(f"{word} needs a value")
        request.options.append((name, arguments[i : i + length]))
        i += length
    request.command = arguments[i:]
    for count in request.values(COUNTS):
        if not re.fullmatch(r"[1-9][0-9]*", count):
            raise LaunchError(f"-n {count}: the number of ranks must be a whole number, 1 or more")
    if not request.command:
        raise LaunchError("there is no command to run; for example: halo-mpirun -n 4 python -m halo_mpi.generate --help")
    return request


def seconds(text):
    if not re.fullmatch(r"\d+(\.\d*)?", text):
        raise LaunchError(f"--grace {text}: give a number of seconds, for example 25")
    return float(text)
