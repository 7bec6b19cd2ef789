"""Text as it streams: never a split character, never a stop string, and in sum the decoded text."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halo_mpi.errors import UsageError
from halo_mpi.model.tokenizer import TextStream, Tokenizer, TokenizerFiles
from halo_mpi.sources import open_source
from tests.tiny_models import TINY, tiny_tokenizer, write_tiny_gguf

byte_level_ids = st.lists(st.integers(0, 511), max_size=60)
multi_byte_ids = st.lists(st.sampled_from([*range(128, 262), 65, 66, 67]), max_size=60)
sentence_piece_ids = st.lists(st.one_of(st.integers(0, 258), st.integers(259, 399)), max_size=60)
texts = st.text(alphabet=st.sampled_from("ab é東🙂 \ufffd"), max_size=30)
stop_strings = st.lists(st.text(alphabet="abe \ufffdhtn", min_size=1, max_size=3), max_size=3)


@pytest.fixture(scope="module")
def byte_level():
    return Tokenizer(TokenizerFiles(tiny_tokenizer(512).to_str(), None, None, None, ()))


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.gguf"
    write_tiny_gguf(path, replace(TINY, vocabulary=400), tokenizer="llama")
    return Tokenizer(open_source(path).tokenizer)


def cut_at_first_stop(text, stops):
    """The stop string that is complete first ends the text."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def stream_all(tokenizer, ids, stops=()):
    stream = TextStream(tokenizer, stops)
    pieces = [stream.push(token_id) for token_id in ids] + [stream.finish()]
    assert stream.text == "".join(pieces)
    return pieces, stream


@settings(deadline=None, max_examples=300)
@given(ids=st.one_of(byte_level_ids, multi_byte_ids))
def test_streamed_byte_level_text_equals_the_decoded_text(byte_level, ids):
    assert "".join(stream_all(byte_level, ids)[0]) == byte_level.decode(ids)


@settings(deadline=None, max_examples=300)
@given(ids=sentence_piece_ids)
def test_streamed_sentencepiece_text_equals_the_decoded_text(sentence_piece, ids):
    assert "".join(stream_all(sentence_piece, ids)[0]) == sentence_piece.decode(ids)


@settings(deadline=None, max_examples=300)
@given(ids=byte_level_ids, stops=stop_strings)
def test_streamed_text_ends_before_the_first_stop_string(byte_level, ids, stops):
    pieces, stream = stream_all(byte_level, ids, stops)
    assert ("".join(pieces), stream.stopped) == cut_at_first_stop(byte_level.decode(ids), stops)


@settings(deadline=None)
@given(text=texts)
def test_no_character_is_ever_split(byte_level, sentence_piece, text):
    for tokenizer in (byte_level, sentence_piece):
        pieces, _ = stream_all(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text
        assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_text_is_printed_as_soon_as_it_is_certain(byte_level):
    stream = TextStream(byte_level, ["END"])
    ids = byte_level.encode("dog 🙂 EN")
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) == "dog 🙂 " and stream.finish() == "EN"


def test_a_stop_string_may_span_tokens_and_ends_inside_of_one(byte_level):
    ids = [byte_level.encode(text, special=False) for text in ("the fox", " and", " the", " dog")]
    pieces, stream = stream_all(byte_level, sum(ids, []), ["d the d", "never"])
    assert stream.stopped and "".join(pieces) == "the fox an"
    assert stream.push(65) == stream.finish() == ""


def test_special_and_unknown_tokens_add_no_text(byte_level):
    ids = byte_level.encode("the<|im_end|> dog") + [100_000]
    assert "".join(stream_all(byte_level, ids)[0]) == "the dog"


def test_an_empty_stop_string_is_refused(byte_level):
    with pytest.raises(UsageError, match="--stop"):
        TextStream(byte_level, ["a", ""])


@pytest.mark.parametrize("repeated", ["the", "\ufffd", "bytes"])
def test_the_work_per_token_does_not_grow(byte_level, sentence_piece, repeated, monkeypatch):
    tokenizer = sentence_piece if repeated == "bytes" else byte_level
    ids = [3 + 0xE2] * 2000 if repeated == "bytes" else byte_level.encode(repeated) * 2000
    decoded = 0
    decode = tokenizer.decode

    def count(some):
        nonlocal decoded
        decoded += len(some)
        return decode(some)

    monkeypatch.setattr(tokenizer, "decode", count)
    assert "".join(stream_all(tokenizer, ids)[0]) == decode(ids)
    assert decoded < 20 * len(ids)
