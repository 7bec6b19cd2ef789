"""The prompts of a run: from the command line, from a text file, or many from a JSON Lines file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from halo_mpi.engine.sampling import Sampling
from halo_mpi.errors import HaloError, InputError, UsageError
from halo_mpi.model.tokenizer import Tokenizer

RESULT_BEGIN = b'{"id":'  # of every line that ResultFile writes
_OPTIONS = {field.name for field in fields(Sampling)}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One text to continue."""

    id: str | int | None
    tokens: list[int]
    sampling: Sampling

    @property
    def longest(self) -> int:
        """Tokens of the text when it has become as long as it may."""
        return len(self.tokens) + self.sampling.max_tokens


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises InputError that names the file, and for other encodings the place."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}; convert it with iconv"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def encode_prompt(tokenizer: Tokenizer, text: str, sampling: Sampling, chat: bool, id: str | int | None = None) -> Prompt:
    """Tokenize one prompt, as one turn of a conversation if `chat`. Raises UsageError if nothing is in it,
    InputError if it is not Unicode text."""
    tokens = [] if not text else tokenizer.chat(text) if chat else tokenizer.encode(text)
    if not tokens:
        raise UsageError("the prompt is empty" if id is None else f"the prompt with id {id!r} is empty")
    return Prompt(id, tokens, sampling)


def check_context(prompts: list[Prompt], longest: int) -> None:
    """Raise UsageError if a text needs more positions than the model was made for."""
    for prompt in prompts:
        tokens = prompt.longest
        if tokens > longest:
            which = "the prompt" if prompt.id is None else f"the prompt with id {prompt.id!r}"
            raise UsageError(
                f"{which} has {len(prompt.tokens)} tokens, and with --max-tokens {prompt.sampling.max_tokens} the text may reach {tokens}, "
                f"but the model's context is {longest}; shorten the prompt or lower --max-tokens"
            )


def read_prompts(path: Path, tokenizer: Tokenizer, sampling: Sampling, chat: bool) -> list[Prompt]:
    """Prompts from JSON Lines: {"id": ..., "prompt": ...} and any sampling options of its own, by their names.

    Raises InputError that names file and line.
    """
    prompts, seen = [], set()
    for number, line in _lines(path, read_text(path)):
        if not isinstance(line, dict) or not isinstance(line.get("prompt"), str) or not isinstance(line.get("id"), (str, int)):
            raise InputError(f'{path}, line {number}: expected an object {{"id": ..., "prompt": "..."}}')
        own = {key: value for key, value in line.items() if key not in ("id", "prompt")}
        if unknown := sorted(own.keys() - _OPTIONS):
            raise InputError(f"{path}, line {number}: unknown option {unknown[0]!r}; there are {', '.join(sorted(_OPTIONS))}")
        if line["id"] in seen:
            raise InputError(f"{path}, line {number}: the id {line['id']!r} is used twice")
        seen.add(line["id"])
        try:
            prompts.append(encode_prompt(tokenizer, line["prompt"], _override(sampling, own), chat, line["id"]))
        except (HaloError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    return prompts


def _override(sampling: Sampling, own: dict) -> Sampling:
    for name, value in own.items():
        usual = type(getattr(sampling, name))
        if name == "stop":
            value = [value] if isinstance(value, str) else value
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                raise UsageError("stop must be a text or a list of texts")
            own = {**own, "stop": tuple(value)}
        elif isinstance(value, bool) != (usual is bool) or not isinstance(value, (int, float) if usual is float else usual):
            raise UsageError(f"{name} must be of type {usual.__name__}, not {value!r}")
    return replace(sampling, **own)


def _lines(path: Path, text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from error


class ResultFile:
    """Results as JSON Lines, each on disk before the next text is begun."""

    def __init__(self, path: Path, resume: bool, prompts: Path):
        """Open for writing; with `resume` keep what is there, but for a last line that was cut off.

        Raises UsageError if the file exists and is not to be continued.
        """
        self.path = path
        self.done: set[str | int] = set()
        if path.exists() and path.samefile(prompts):
            raise UsageError(f"--out {path} is the file of the prompts; choose another one")
        if path.exists() and not resume:
            raise UsageError(f"{path} exists already; add --resume to continue it, or choose another --out")
        try:
            self._file = open(path, "a+b")
            self._keep_whole_lines()
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error

    def _keep_whole_lines(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        end = content.rfind(b"\n") + 1
        foreign = InputError(f"{self.path} holds something other than results; choose another --out")
        if not (content[end:].startswith(RESULT_BEGIN) or RESULT_BEGIN.startswith(content[end:])):
            raise foreign
        try:
            results = [result for _, result in _lines(self.path, content[:end].decode())]
            if not all({"id", "token_ids", "finish_reason"} <= result.keys() for result in results):
                raise foreign
            self.done = {result["id"] for result in results}
        except (AttributeError, TypeError, UnicodeDecodeError) as error:
            raise foreign from error
        self._file.truncate(end)

    def write(self, result: dict) -> None:
        """Append one result and flush it. Raises HaloError if the disk is full."""
        try:
            self._file.write(json.dumps(result, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            self._file.flush()
        except OSError as error:
            raise HaloError(
                f"cannot write {self.path}: {error.strerror}; what is finished is kept, go on with --resume"
            ) from error
