"""Makes the hosts of a hostfile like this computer, so that halo-mpirun can start ranks on them: the code (git's files), the virtual
environment .venv and, if MODEL.halo is named, the model lie at the same paths then. The hosts need ssh without a password, rsync,
the same kind of processor and Python as this computer, and neither root rights nor the internet. Only what differs is copied."""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path

from mpirun_hosts import EXIT_FAILED, LaunchError, is_here, read_hostfile
from pis_copy import Copier, Tree, check_space, code_of, environment_of, listed, model_of, shards_of, spread
from pis_host import Commands, Host, HostError, check_kind, clock_note

AT_ONCE = 4  # hosts; more would share this computer's one cable
EXIT_DONE, EXIT_INTERRUPTED = 0, 130
EPILOG = """On the hosts, halo_mpi's folder becomes a copy: what git does not know goes from its folders of code (halo_mpi,
launch, bench, ...); all else in it stays. Exit codes: 0 all hosts are set up, 1 some are not, 2 wrong use."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise LaunchError(f"{message}; try: bash launch/setup-pis.sh --help")


def options_from(words):
    usage = "bash launch/setup-pis.sh HOSTFILE [MODEL.halo] [option ...]"
    parser = Parser(usage=usage, description=__doc__, epilog=EPILOG)
    parser.add_argument("hostfile", metavar="HOSTFILE", help="as for halo-mpirun; this computer may be in it")
    parser.add_argument("model", metavar="MODEL.halo", nargs="?", help="a model folder to copy too")
    parser.add_argument("--spread", action="store_true", help="only some shards on each host, so that each is on two")
    parser.add_argument("--verify", action="store_true", help="compare contents, not sizes and times: finds damaged files")
    parser.add_argument("--dry-run", action="store_true", help="copy nothing, and say what would be copied")
    options = parser.parse_args(words)
    if options.spread and not options.model:
        raise LaunchError("--spread is for a model: name its folder after the hostfile")
    return options


def hosts_in(hostfile):
    """Their names, whichever MPI it is for."""
    try:
        hosts = read_hostfile(hostfile, "Open MPI")
    except LaunchError as error:
        try:
            hosts = read_hostfile(hostfile, "MPICH")
        except LaunchError:
            raise error from None
    return list(dict.fromkeys(host.name for host in hosts))


def check_here(root):
    """That this computer has all that is to be copied, and what copies."""
    stamp = root / ".venv" / "halo-stamp"
    made_in = stamp.read_text().partition("\n")[0] if stamp.is_file() else None
    if made_in != str(root):
        raise LaunchError(f"{root / '.venv'} is not set up for this folder; run first: bash launch/quickstart.sh", EXIT_FAILED)
    for tool in ("ssh", "rsync", "git"):
        if shutil.which(tool) is None:
            raise LaunchError(f"{tool} is missing on this computer; sudo apt-get install {tool}", EXIT_FAILED)


class SetUp:
    """What all hosts shall have; `on` gives it to one of them."""

    def __init__(self, root: Path, model: Path | None, options, stack: ExitStack):
        self._root, self._dry_run, self._copier = root, options.dry_run, Copier(options.verify)
        self._python = os.path.realpath(root / ".venv" / "bin" / "python")
        folders = [root, root / ".venv", *([model] if model else [])]
        self._folders = [(str(folder), mark_in(folder, stack)) for folder in folders]
        self._here = Host("this computer", Commands(), is_here=True).probe(self._python, self._folders)

    def on(self, host: Host, trees: list[Tree]) -> str:
        """What was done, for the user. Raises HostError with the reason why it is not set up."""
        facts = host.probe(self._python, self._folders)
        check_kind(facts, self._here, self._python)
        own = [tree for tree in trees if facts.places[str(tree.folder)].state != "shared"]
        changes = [(tree, self._changes(host, tree, facts)) for tree in own]
        check_space(changes, facts)
        changed = [(tree, change) for tree, change in changes if change]
        note = clock_note(facts.clock_s) + ("; its folder is shared with this computer" if len(own) < len(trees) else "")
        if self._dry_run:
            return (f"would copy {listed(changed)}" if changed else "nothing to copy") + note
        if changed:
            print(f"{host.name}: copying {listed(changed)} ...", file=sys.stderr, flush=True)
            self._prepare(host, [tree for tree, _ in changed])
            changed = [(tree, self._copier.copy(tree, host)) for tree, _ in changed]
        host.try_start(str(self._root))
        return (f"copied {listed(changed)}" if changed else "nothing to copy") + ", and halo_mpi starts there" + note

    def _changes(self, host, tree, facts):
        state = facts.places[str(tree.folder)].state
        if state == "forbidden":
            raise HostError(f"you may not write in {tree.folder} there, or in the folder above it")
        if state == "there" and tree.folder == self._root:
            raise HostError(f"{tree.folder} is something else there than halo_mpi; move it away")
        return self._copier.changes(tree, host, state != "missing")

    def _prepare(self, host, trees):
        folders = shlex.join(map(str, [self._root, *(tree.folder for tree in trees)]))
        done = host.run(f"mkdir -p {folders} && touch {shlex.quote(str(self._root / '.halo-copy'))}")
        if done.returncode:
            raise HostError(host.why(done.stderr))


def mark_in(folder, stack):
    """The name of a file that lies in this folder until the end: a host that sees it shares the folder."""
    try:
        return Path(stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".halo-here-")).name).name
    except OSError:
        return ".halo-here-unknown"


def main(words):
    options = options_from(words)
    root = Path(os.path.abspath(__file__)).parent.parent
    names = hosts_in(options.hostfile)
    model = Path(os.path.abspath(options.model)) if options.model else None
    shards = shards_of(model) if model else []
    check_here(root)
    others = []
    for name in names:
        if is_here(name):
            print(f"{name}: this computer")
        else:
            others.append(name)
    both = [code_of(root), environment_of(root)]
    trees = {name: [*both] for name in others}
    if model and others:
        held = spread(shards, others) if options.spread and shards else dict.fromkeys(others, shards)
        for name in others:
            trees[name].append(model_of(model, held[name]))
    commands, failed = Commands(), []
    with ExitStack() as stack:
        set_up = SetUp(root, model, options, stack)
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            asked = {pool.submit(set_up.on, Host(name, commands), trees[name]): name for name in others}
            for done in as_completed(asked):
                try:
                    print(f"{asked[done]}: {done.result()}", flush=True)
                except HostError as error:
                    failed.append(asked[done])
                    print(f"{asked[done]}: not set up: {error}", flush=True)
        except KeyboardInterrupt:
            commands.end()
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        print(f"setup-pis: {len(failed)} of {len(others)} hosts not set up: {', '.join(sorted(failed))}", file=sys.stderr)
    return EXIT_FAILED if failed else EXIT_DONE


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (LaunchError, HostError) as error:
        print(f"setup-pis: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", EXIT_FAILED))
    except KeyboardInterrupt:
        print("setup-pis: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
