"""docs/troubleshooting.md quotes messages as the program has them."""

import ast
import re
from functools import cache

import pytest

from tests.mpi import ROOT

DOCUMENT = ROOT / "docs" / "troubleshooting.md"
OTHERS = "## Messages of other programs"
VARIABLE = re.compile(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+")


def quoted() -> list[str]:
    """The first column of the tables of the program's own messages."""
    rows = re.findall(r"^\| `(.+?)` \|", DOCUMENT.read_text().partition(OTHERS)[0], re.M)
    assert len(rows) > 40
    return rows


@cache
def messages() -> str:
    """All texts of the program and its launchers, a line each; … for what is filled in."""
    texts = []
    for path in [*ROOT.glob("halo_mpi/**/*.py"), *ROOT.glob("launch/*.py"), ROOT / "launch" / "halo-mpirun"]:
        texts += literals(ast.parse(path.read_text()))
    for path in ROOT.glob("launch/*.sh"):
        texts.append(VARIABLE.sub("…", path.read_text()))
    return "\n".join(texts)


def literals(tree: ast.AST) -> list[str]:
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(re.sub(r"\{\w*\}", "…", node.value))
    return texts


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_of_the_programs(message):
    assert message in messages()


def test_what_is_no_message_is_found_out():
    assert "…: the hostfile names no guest" not in messages()


def test_the_messages_of_a_document_have_no_typing_errors_in_their_table():
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows), "three columns"
