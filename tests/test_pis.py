"""launch/setup-pis.sh with hosts that are folders of this computer: what is copied, what not, and what the user is told."""

import os
import shutil
import signal

import pytest

from tests.mpi import ROOT
from tests.pi_hosts import PiHosts
from tests.pi_lab import until

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(any(shutil.which(tool) is None for tool in ("rsync", "git", "ssh")), reason="needs rsync, git and ssh"),
]
STARTS = ", and halo_mpi starts there"


@pytest.fixture
def pis(tmp_path):
    return PiHosts(tmp_path, "board-a", "board-b", "board-c")


@pytest.fixture
def pi(tmp_path):
    return PiHosts(tmp_path, "board-a")


def test_hosts_become_like_this_computer_and_a_second_run_copies_nothing(pis):
    pis.write("notes.txt", "of nobody's interest")
    code, said, err = pis.set_up(pis.model)
    assert code == 0, (said, err)
    assert said["localhost"] == "this computer"
    for name in pis.names:
        assert said[name].startswith("copied code (") and said[name].endswith(STARTS), said
        assert "environment (" in said[name] and "model (5 files" in said[name]
        assert (pis.on(name) / "halo_mpi/engine/root.py").read_text() == "token = 1\n"
        assert pis.files(name, ".venv") == ["bin/python", "halo-stamp", "lib/package/module.py"]
        assert len(pis.files(name, "models/small.halo")) == 5 and "notes.txt" not in pis.files(name, ".")
    assert pis.set_up(pis.model) == (0, {"localhost": "this computer", **dict.fromkeys(pis.names, f"nothing to copy{STARTS}")}, "")


def test_only_what_differs_is_copied_and_what_git_does_not_know_goes_from_the_code(pi):
    pi.set_up(pi.model)
    for name in ("halo_mpi/stray.py", "halo_mpi/__pycache__/root.pyc", "report.json", ".venv/lib/other.py"):
        pi.write(name, "", host="board-a")
    pi.write("halo_mpi/engine/root.py", "token = 22\n")
    (pi.root / "halo_mpi" / "old.py").unlink()
    code, said, _ = pi.set_up(pi.model)
    told = f"copied code (1 files, 0.0 MB, 2 removed), environment (0 files, 0.0 MB, 1 removed){STARTS}"
    assert (code, said["board-a"]) == (0, told)
    assert pi.files("board-a", "halo_mpi") == ["__pycache__/root.pyc", "engine/root.py"]
    assert (pi.on("board-a") / "halo_mpi/engine/root.py").read_text() == "token = 22\n"
    assert "report.json" in pi.files("board-a", ".")


def test_spread_shards_lie_on_two_hosts_each_and_others_go(pis):
    pis.set_up(pis.model)
    code, said, _ = pis.set_up(pis.model, "--spread")
    held = [pis.files(name, "models/small.halo") for name in pis.names]
    assert code == 0 and all("model.h5" in files for files in held)
    assert [sum(f"shard-{number:02}.h5" in files for files in held) for number in range(4)] == [2, 2, 2, 2]
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_a_damaged_copy_is_found_by_its_content(pi):
    pi.set_up(pi.model)
    shard = pi.on("board-a") / "models/small.halo/shard-01.h5"
    times = shard.stat()
    shard.write_text("shard-0!" * 1000)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert pi.set_up(pi.model, "--dry-run")[1]["board-a"] == "nothing to copy"
    assert pi.set_up(pi.model, "--verify")[1]["board-a"].startswith("copied model (1 files")
    assert shard.read_text() == "shard-01" * 1000


def test_a_dry_run_says_what_would_be_copied_and_copies_nothing(pi):
    pi.hostfile.write_text("localhost:1\nboard-a:2\n")  # as for MPICH
    code, said, _ = pi.set_up("--dry-run")
    assert code == 0 and said["board-a"].startswith("would copy code (9 files") and not pi.on("board-a").exists()


def test_each_host_that_cannot_be_set_up_is_named_with_its_reason_and_the_others_are_set_up(tmp_path):
    pis = PiHosts(tmp_path, "good", "closed", "other-kind", "no-rsync", "full", "other-folder", "late", "shared")
    pis.write(".venv/lib/big.so", "x" * 10_000_000)
    pis.write("halo_mpi/new.py", "not yet known to git")
    pis.refuse("closed", "** a banner **\npi@closed: Permission denied (publickey,password).\n")
    pis.tool("other-kind", "uname", "echo armv7l")
    pis.tool("no-rsync", "rsync", None)
    pis.tool("full", "df", "echo Filesystem; echo /dev/mmcblk0p2 9 9 70000 99% /")
    pis.write("thesis.txt", "mine", host="other-folder")
    pis.tool("late", "date", "echo 1700000000")
    pis.on("shared").symlink_to(pis.root)
    code, said, err = pis.set_up(pis.model)
    assert code == 1
    assert err.splitlines()[-1] == "setup-pis: 5 of 8 hosts not set up: closed, full, no-rsync, other-folder, other-kind"
    told = "not set up: pi@closed: Permission denied (publickey,password).; give it your key: ssh-copy-id closed"
    assert said["closed"] == told
    assert said["other-kind"].startswith("not set up: is a armv7l, this computer a ")
    assert said["no-rsync"] == "not set up: has no rsync; run there: sudo apt-get install rsync"
    assert said["full"].startswith("not set up: 10.") and said["full"].endswith(" MB are to be copied, and its / has 71.7 MB free")
    assert said["other-folder"].endswith("is something else there than halo_mpi; move it away")
    assert said["good"].startswith("copied code") and said["good"].endswith(STARTS)
    assert said["late"].startswith("copied code") and said["late"].endswith(" h behind: look at `timedatectl` there")
    assert said["shared"] == f"nothing to copy{STARTS}; its folder is shared with this computer"
    assert not any(pis.on(name).exists() for name in ("closed", "other-kind", "no-rsync", "full"))
    assert pis.files("other-folder", ".") == ["thesis.txt"]
    assert (pis.root / "halo_mpi/new.py").exists() and not list(pis.root.rglob(".halo-here-*"))


@pytest.mark.parametrize(
    "errors, told",
    [
        ("Warning: old\nHost key verification failed.", "Host key verification failed.; log in once by hand and say yes: ssh pi2"),
        ("ssh: connect to host pi2 port 22: Connection refused", "; is ssh turned on there? sudo systemctl enable --now ssh"),
        ("ssh: connect to host pi2 port 22: Connection timed out", "timed out; is it on, and in this network?"),
        ("ssh: Could not resolve hostname pi2: Name or service not known", "; correct the name in the hostfile, or put it into"),
        ("rsync: [receiver] write failed: No space left on device (28)\nrsync error: x", "rsync: [receiver] write failed: No space"),
        ("", "no reason is given"),
    ],
)
def test_errors_of_ssh_and_rsync_become_one_line_with_advice(monkeypatch, errors, told):
    monkeypatch.syspath_prepend(ROOT / "launch")
    from pis_host import Commands, Host

    assert told in Host("pi2", Commands()).why(errors) and "\n" not in Host("pi2", Commands()).why(errors)


def test_a_program_that_does_not_start_there_is_told(pi):
    pi.write("launch/halo-mpirun", "import halo_missing\n")
    code, said, _ = pi.set_up()
    assert code == 1
    assert said["board-a"].endswith("it does not start there: ModuleNotFoundError: No module named 'halo_missing'")


@pytest.mark.parametrize(
    "hosts, options, complaint",
    [
        ("board-a slots=1\n", ("--spread",), "--spread is for a model"),
        ("board-a slots=1\n", ("/none.halo",), "/none.halo holds no model.h5"),
        ("board-a slots=1\n", ("--fast",), "unrecognized arguments: --fast"),
        ("board-a slot=s x\n", (), "is not understood"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(pi, hosts, options, complaint):
    pi.hostfile.write_text(hosts)
    code, said, err = pi.set_up(*options)
    assert (code, said) == (2, {}) and err.startswith("setup-pis: ") and err.count("\n") == 1 and complaint in err


def test_without_an_environment_it_says_how_to_make_one(pi):
    (pi.root / ".venv" / "halo-stamp").unlink()
    code, _, err = pi.set_up()
    assert code == 1 and err.endswith("run first: bash launch/quickstart.sh\n")


def test_ctrl_c_ends_it_with_one_line(pi, tmp_path):
    begun = tmp_path / "begun"
    pi.tool("board-a", "date", f"touch {begun}; exec sleep 20")
    process = pi.start()
    until(begun.exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, "setup-pis: interrupted; the same command goes on where it stopped\n")
