"""Text to token ids and back, and text as it comes, one token after the other."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import tokenizers

from halo_mpi.errors import InputError, UsageError
from halo_mpi.model.chat import render_chat

BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")  # one byte of a character that has no token of its own
REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or none yet
CONTEXT = 8  # tokens decoded again to see how they join the next: a character has at most 4 bytes


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """All that is stored of a tokenizer.

    `json` is a tokenizer.json of the tokenizers library; bos and eos are the tokens' texts; any of `eos_ids` ends a text.
    """

    json: str
    chat_template: str | None
    bos: str | None
    eos: str | None
    eos_ids: tuple[int, ...]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "TokenizerFiles":
        """The inverse of `to_dict`, also after a trip through JSON.

        Raises InputError for unknown or missing fields.
        """
        try:
            return cls(**{**fields, "eos_ids": tuple(fields["eos_ids"])})
        except (TypeError, KeyError) as error:
            raise InputError(f"the stored tokenizer does not have the expected fields ({error})") from error


def load_tokenizer(json: str) -> tokenizers.Tokenizer:
    """A tokenizer from the text of its tokenizer.json.

    Raises InputError if the text is not one.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json)
    except Exception as error:
        raise InputError(f"the tokenizer is not one that the tokenizers library reads ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Tokenizer:
    """A model's tokenizer. Not for use by several threads at once."""

    def __init__(self, files: TokenizerFiles):
        self._tokenizer = load_tokenizer(files.json)
        self._files = files
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bos_id = None if files.bos is None else self._tokenizer.token_to_id(files.bos)
        self.eos_ids = files.eos_ids
        self.vocabulary = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text.

        With `special`, tokens such as BOS are added as the model expects, and special tokens written out in the text
        count as such. Without, nothing is added and all text is ordinary text.

        Raises InputError for text that is not valid Unicode.
        """
        return self._encode(text, special, add=special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, user: str) -> list[int]:
        """Token ids of a conversation that begins with this message, up to where the model's answer begins.

        Raises UsageError if the model has no chat template, InputError if the template fails.
        """
        files = self._files
        if files.chat_template is None:
            raise UsageError("the model has no chat template: leave out --chat, or use its instruction-tuned variant")
        ids = self._encode(render_chat(files.chat_template, user, files.bos, files.eos), special=True, add=False)
        bos = self._bos_id
        if bos is None or self.encode("")[:1] != [bos] or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    def is_visible(self, token_id: int) -> bool:
        """Whether the token appears in decoded text: it is known, and not special."""
        return token_id not in self._special and bool(self._tokenizer.id_to_token(token_id))

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is a single byte, whose text depends on its neighbours."""
        return BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "") is not None

    def _encode(self, text: str, special: bool, add: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("the prompt is not valid Unicode text; give it in UTF-8") from error
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(text, add_special_tokens=add).ids


class TextStream:
    """The text of tokens as they come, ready to print, ended by the first stop string to be complete.

    The pieces from `push` and `finish` add up to `tokenizer.decode` of all tokens, up to the stop string. Held back are
    characters with bytes still to come, single-byte tokens (a decoder sees them as a run, valid or not), and what may yet
    become a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        """Raises UsageError for an empty stop string."""
        if "" in stops:
            raise UsageError("a stop text is empty; give --stop at least one character")
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._tokens: list[int] = []  # the last few
        self._known = ""  # how much of their text was taken into account
        self._held = ""  # what may yet become a stop string
        self._emitted: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything that `push` and `finish` returned so far."""
        return "".join(self._emitted)

    def push(self, token_id: int) -> str:
        """The text that may be printed once this token is there."""
        if self.stopped or not self._tokenizer.is_visible(token_id):
            return ""
        self._tokens.append(token_id)
        if self._tokenizer.is_byte(token_id):
            return ""
        text = self._decode_settled()
        new = text[len(self._known) :]
        if len(self._tokens) > 2 * CONTEXT:
            self._tokens = self._tokens[-CONTEXT:]
            text = self._decode_settled()
        self._known = text
        return self._emit(new, last=False)

    def finish(self) -> str:
        """What was held back, at the end of the tokens."""
        if self.stopped:
            return ""
        new = self._tokenizer.decode(self._tokens)[len(self._known) :]
        self._tokens, self._known = [], ""
        return self._emit(new, last=True)

    def _decode_settled(self) -> str:
        return self._tokenizer.decode(self._tokens).removesuffix(REPLACEMENT)

    def _emit(self, new: str, last: bool) -> str:
        self._held += new
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            piece, self._held = self._held[: min(found)[1]], ""
        else:
            cut = len(self._held) if last else self._first_possible_stop()
            piece, self._held = self._held[:cut], self._held[cut:]
        self._emitted.append(piece)
        return piece

    def _first_possible_stop(self) -> int:
        held = self._held
        longest = max(map(len, self._stops), default=1) - 1
        for start in range(max(0, len(held) - longest), len(held)):
            if any(stop.startswith(held[start:]) for stop in self._stops):
                return start
        return len(held)
