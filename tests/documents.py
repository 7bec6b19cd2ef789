"""The commands in the project's documents: those of fenced blocks, line by line, and those named within sentences."""

import re
import shlex
from dataclasses import dataclass

from tests.mpi import ROOT

DOCUMENTS = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))
SHELL = {"bash", "sh", "shell", "console"}
PROGRAMS = {"bash", "python", "python3", "halo-mpi", "mpirun", "source", "export", "git", "pip", "sbatch", "srun", "qsub", "ssh", "scp",
            "rsync", "sudo", "apt-get", "systemctl", "docker", "curl", "cd", "sysctl", "ip"}  # fmt: skip
FENCE = re.compile(r"^ {0,3}```")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document. `shown`: its lines; `commands`: those of them to type, without prompts and comments."""

    document: str
    line: int
    shown: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def output(self) -> list[str]:
        """What the block shows below its only command, behind a prompt."""
        return [line for line in self.shown if not line.startswith("$ ")]


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[Block]:
    """All fenced blocks, those without commands included."""
    found, inside, language, begin = [], [], "", None
    for number, line in enumerate(read(document).splitlines(), 1):
        if begin is None and FENCE.match(line):
            begin, inside, language = number, [], line.strip().strip("`").strip()
        elif begin is not None and FENCE.match(line):
            found.append(Block(document, begin, tuple(inside), tuple(_commands(language, inside))))
            begin = None
        elif begin is not None:
            inside.append(line)
    assert begin is None, f"{document}:{begin}: a block that does not end"
    return found


def _commands(language: str, lines: list[str]) -> list[str]:
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    if prompted:
        return prompted
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    typed = [" ".join(_without_comment(line).split()) for line in joined]
    typed = [line for line in typed if line]
    is_shell = language in SHELL or not language and typed and is_command(typed[0])
    return typed if is_shell else []


def _without_comment(line: str) -> str:
    quoted = re.match(r"""(?:[^"'#]|"[^"]*"|'[^']*'|(?<=\S)#)*""", line)
    return quoted[0]


def is_command(text: str) -> bool:
    """Whether a line or a span begins with a program, perhaps after settings like NAME=value."""
    words = [word for word in text.split() if not re.match(r"[A-Z_]+=", word)]
    return bool(words) and (words[0] in PROGRAMS or words[0].startswith("launch/"))


def spans(document: str) -> list[str]:
    """What stands in backquotes within sentences and tables, on one line each."""
    prose, fenced = [], False
    for line in read(document).splitlines():
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            prose.append(line)
    paragraphs = re.split(r"\n\s*\n", "\n".join(prose))
    return [" ".join(span.replace("\\|", "|").split()) for text in paragraphs for span in re.findall(r"`([^`]+)`", text)]


def words_of(command: str) -> list[str]:
    """The command's words, those of an option that may be left out or chosen included: [--dtype f32|f16]."""
    return [part for word in shlex.split(command.replace("[", " ").replace("]", " ")) for part in word.split("|") if part]
