"""The tokenizer of a Hugging Face model: tokenizer.json and the files that go with it."""

import json
from pathlib import Path
from typing import Any

from halo_mpi.errors import DamagedFileError, InputError
from halo_mpi.model.tokenizer import TokenizerFiles, load_tokenizer
from halo_mpi.sources.huggingface_config import read_json


def tokenizer_files(folder: Path, config: dict, vocabulary: int) -> TokenizerFiles:
    """The tokenizer of a folder whose embedding has this many rows; `config` is what config.json holds.

    Raises InputError if there is no tokenizer.json or it is of an unknown kind, DamagedFileError for contradictions.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder}: has no tokenizer.json; download it, or save the tokenizer again with transformers")
    fields = read_json(path)
    added = fields.get("added_tokens")
    if isinstance(added, list):  # some have more tokens than the embedding has rows, for padding in training
        fields["added_tokens"] = [token for token in added if not _is_beyond(token, vocabulary)]
    text = json.dumps(fields, ensure_ascii=False)
    try:
        tokenizer = load_tokenizer(text)
    except InputError as error:
        raise InputError(f"{path}: {error}; download it again") from error
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= highest < vocabulary:
        raise DamagedFileError(f"{path}: its token {highest} has no row in an embedding of {vocabulary}; download it again")
    settings = _optional_json(folder / "tokenizer_config.json")
    eos = _token_text(settings.get("eos_token"))
    ids = _optional_json(folder / "generation_config.json").get("eos_token_id")
    ids = config.get("eos_token_id") if ids is None else ids
    if ids is None and eos is not None:
        ids = tokenizer.token_to_id(eos)
    return TokenizerFiles(
        json=text,
        chat_template=_chat_template(folder, settings),
        bos=_token_text(settings.get("bos_token")),
        eos=eos,
        eos_ids=_eos_ids(folder, ids, vocabulary),
    )


def _is_beyond(token: Any, vocabulary: int) -> bool:
    return isinstance(token, dict) and isinstance(token.get("id"), int) and token["id"] >= vocabulary


def _optional_json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _token_text(token: Any) -> str | None:
    """A token is stored as its text, or as an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, settings: dict) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DamagedFileError(f"{path}: is not valid UTF-8; download it again") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _eos_ids(folder: Path, ids: Any, vocabulary: int) -> tuple[int, ...]:
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocabulary:
            raise DamagedFileError(
                f"{folder}: eos_token_id {str(token_id)[:40]!r} is not one of the {vocabulary} tokens; download it again"
            )
    return tuple(dict.fromkeys(ids))
