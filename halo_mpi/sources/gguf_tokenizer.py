"""Tokenizers from the metadata of GGUF files, rebuilt as the tokenizers library has them.

What is not stated follows llama.cpp (src/llama-vocab.cpp).
"""

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from halo_mpi.errors import DamagedFileError, InputError
from halo_mpi.model.tokenizer import TokenizerFiles
from halo_mpi.sources.gguf_header import Header

MAX_PIECE = 512  # characters; LLaMA's longest piece has 16

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Splitting:
    """How a text is cut into words before BPE: by one expression after the other."""

    expressions: tuple[str, ...]
    add_bos: bool = False
    ignore_merges: bool = False  # a word that is a token is taken whole


DEFAULT = Splitting((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
SPLITTINGS = {
    "default": DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), Splitting((GPT2,))),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), Splitting((r"\p{N}", GPT2))
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), Splitting((LLAMA3.replace("{1,3}", ""),))),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        Splitting((LLAMA3,), add_bos=True, ignore_merges=True),
    ),
    "tekken": Splitting((TEKKEN,), add_bos=True, ignore_merges=True),
}


ENDS_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")  # of LLaMA 3 and of ChatML


class TokenType(IntEnum):
    """The values of tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens in the order of their ids, with their types and the ids that have a role."""

    path: Path
    tokens: list[str]
    types: np.ndarray  # int [tokens]
    ids: dict[str, int]
    roles: dict[str, int]  # bos, eos, eot, eom, unknown -> id, those that there are

    def text(self, role: str) -> str | None:
        return self.tokens[self.roles[role]] if role in self.roles else None


def tokenizer_files(header: Header, vocabulary: int) -> TokenizerFiles:
    """The tokenizer of a GGUF file whose embedding has this many rows.

    Raises InputError for kinds of tokenizers that are not supported, DamagedFileError for parts that do not fit together.
    """
    model = header.get("tokenizer.ggml.model", str, None)
    if model not in ("gpt2", "llama"):
        raise InputError(
            f"{header.path}: its tokenizer is of the kind {model!r}, only gpt2 and llama can be read; convert from the model's "
            "Hugging Face folder"
        )
    tokens = _vocabulary(header, vocabulary, defaults={"bos": 1, "eos": 2, "unknown": 0} if model == "llama" else {})
    try:
        tokenizer, add_bos = _byte_level(header, tokens) if model == "gpt2" else _sentence_piece(header, tokens)
    except (InputError, DamagedFileError):
        raise
    except Exception as error:  # the tokenizers library has no exception type of its own
        raise DamagedFileError(f"{header.path}: its tokenizer does not fit together ({error}); download it again") from error
    _add_tokens(tokenizer, tokens)
    add_bos = header.get("tokenizer.ggml.add_bos_token", bool, add_bos)
    add_eos = header.get("tokenizer.ggml.add_eos_token", bool, False)
    _add_template(tokenizer, tokens, add_bos, add_eos)
    return TokenizerFiles(
        json=tokenizer.to_str(),
        chat_template=header.get("tokenizer.chat_template", str, None),
        bos=tokens.text("bos"),
        eos=tokens.text("eos"),
        eos_ids=_ends(tokens),
    )


def _ends(tokens: Vocabulary) -> tuple[int, ...]:
    """Tokens that end a text: those that the file names, and the ends of a turn that many files only have as tokens."""
    stated = [tokens.roles[role] for role in ("eos", "eot", "eom") if role in tokens.roles]
    turns = [tokens.ids[text] for text in ENDS_OF_TURN if text in tokens.ids]
    return tuple(dict.fromkeys(stated + [end for end in turns if tokens.types[end] == TokenType.CONTROL]))


def _vocabulary(header: Header, size: int, defaults: dict[str, int]) -> Vocabulary:
    path = header.path
    stored = header.get("tokenizer.ggml.tokens", list)
    if len(stored) != size:
        raise DamagedFileError(f"{path}: has {len(stored)} tokens for an embedding of {size}; download it again")
    tokens = [token or f"[EMPTY_{token_id}]" for token_id, token in enumerate(stored)]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) != size:
        raise DamagedFileError(f"{path}: two of its tokens have the same text; download it again")
    types = header.get("tokenizer.ggml.token_type", np.ndarray, np.full(size, TokenType.NORMAL))
    if len(types) != size:
        raise DamagedFileError(f"{path}: has {len(types)} token types for {size} tokens; download it again")
    roles = {}
    for role in ("bos", "eos", "eot", "eom", "unknown"):
        token_id = header.get(f"tokenizer.ggml.{role}_token_id", int, defaults.get(role))
        if token_id is None:
            continue
        if not 0 <= token_id < size:
            raise DamagedFileError(f"{path}: its {role} token is number {token_id} of {size}; download it again")
        roles[role] = token_id
    return Vocabulary(path, tokens, types, ids, roles)


def _byte_level(header: Header, vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether BOS is added unless the file says otherwise."""
    path = header.path
    name = header.get("tokenizer.ggml.pre", str, "default")
    splitting = SPLITTINGS.get(name)
    if splitting is None:
        raise InputError(f"{path}: its pre-tokenizer {name!r} is not known; convert from the model's Hugging Face folder")
    merges = [tuple(merge.split(" ")) for merge in header.get("tokenizer.ggml.merges", list)]
    for merge in merges:
        if len(merge) != 2:
            raise DamagedFileError(f"{path}: one of its BPE merges is not a pair: {' '.join(merge)!r}; download it again")
    tokenizer = Tokenizer(BPE(vocabulary.ids, merges, ignore_merges=splitting.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(expression), "isolated") for expression in splitting.expressions),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splitting.add_bos


def _sentence_piece(header: Header, vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether BOS is added unless the file says otherwise."""
    scores = header.get("tokenizer.ggml.scores", np.ndarray)
    if len(scores) != len(vocabulary.tokens):
        raise DamagedFileError(
            f"{header.path}: has {len(scores)} token scores for {len(vocabulary.tokens)} tokens; download it again"
        )
    if not np.isfinite(scores).all():
        raise DamagedFileError(f"{header.path}: one of its token scores is NaN or infinite; download it again")
    merges = _merges(vocabulary, scores)
    unknown = vocabulary.text("unknown")
    tokenizer = Tokenizer(BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    add_space = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace] if add_space else [replace])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_space else steps)
    return tokenizer, True


def _merges(vocabulary: Vocabulary, scores: np.ndarray) -> list[tuple[str, str]]:
    """The BPE merges that SentencePiece's scores stand for: whatever two pieces make a piece, the best score first."""
    pieces = {vocabulary.tokens[token_id]: token_id for token_id in np.flatnonzero(vocabulary.types == TokenType.NORMAL).tolist()}
    merges = []
    for piece, token_id in pieces.items():
        if len(piece) > MAX_PIECE:
            raise DamagedFileError(f"{vocabulary.path}: token {token_id} has {len(piece)} characters; download it again")
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                merges.append((-float(scores[token_id]), pieces[left], pieces[right], left, right))
    merges.sort()
    return [merge[3:] for merge in merges]


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary):
    """Have control tokens, and those that users defined, recognized in text."""
    special = set(np.flatnonzero(np.isin(vocabulary.types, (TokenType.CONTROL, TokenType.UNKNOWN))).tolist())
    special.update(token_id for role, token_id in vocabulary.roles.items() if role != "unknown")
    defined = set(np.flatnonzero(vocabulary.types == TokenType.USER_DEFINED).tolist()) - special
    tokenizer.add_special_tokens([_added(vocabulary.tokens[token_id], True) for token_id in sorted(special)])
    tokenizer.add_tokens([_added(vocabulary.tokens[token_id], False) for token_id in sorted(defined)])


def _added(text: str, special: bool) -> AddedToken:
    return AddedToken(text, special=special, normalized=False)


def _add_template(tokenizer: Tokenizer, vocabulary: Vocabulary, add_bos: bool, add_eos: bool):
    before = ["bos"] if add_bos and "bos" in vocabulary.roles else []
    after = ["eos"] if add_eos and "eos" in vocabulary.roles else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[
                {"id": role, "ids": [vocabulary.roles[role]], "tokens": [vocabulary.text(role)]} for role in before + after
            ],
        )
