"""Tokenizers from GGUF metadata against other implementations, and chat templates."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from halo_mpi.errors import DamagedFileError, InputError, UsageError
from halo_mpi.model.tokenizer import Tokenizer, TokenizerFiles
from halo_mpi.sources import open_source
from tests.tiny_models import CHAT_TEMPLATE, TINY, sentence_piece_vocabulary, tiny_tokenizer, write_tiny_gguf

TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  two  spaces   and\ttabs\t\tand\n\n\nnewlines \n ",
    "The year 2024 has 366 days; pi is 3.14159, ½ and Ⅷ.",
    "def f(x):\n    return {'a': x[0] ** 2, \"b\": x is not None}\n",
    "naïve café Über straße ÀÉÎ",
    "東京と大阪 한국어 русский العربية हिन्दी",
    "👩‍👩‍👧‍👦🏳️‍🌈 🙂🙂",
    "don't I'LL we've they're 'tis o'clock",
    "a\u0300 e\u0301 \u00a0nbsp\u2003em\u200bzero\r\nCRLF\r",
    "https://example.org/a?b=c&d=%20#e_f-g  $x^2 <= y|z~`",
    "\x00\x01\x7f\ufffd\U0010ffff",
)


@pytest.fixture
def gguf(tmp_path):
    def write(**options):
        path = tmp_path / "tiny.gguf"
        write_tiny_gguf(path, **options)
        return open_source(path).tokenizer

    return write


@pytest.fixture(scope="module")
def smollm2_files(smollm2_gguf):
    return open_source(smollm2_gguf).tokenizer


@pytest.fixture(scope="module")
def byte_level():
    files = TokenizerFiles(tiny_tokenizer(512).to_str(), CHAT_TEMPLATE, "<|im_start|>", "<|im_end|>", (2,))
    return Tokenizer(files)


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.gguf"
    write_tiny_gguf(path, replace(TINY, vocabulary=400), tokenizer="llama")
    return Tokenizer(open_source(path).tokenizer)


def merge_by_score(text, tokens, scores):
    """SentencePiece's BPE as its paper has it: join the best-scored neighbours, the leftmost first, until none are left."""
    scored = {token: score for token, score in zip(tokens, scores) if not token.startswith(("<0x", "[PAD", "<s", "</s", "<unk"))}
    ids = {token: number for number, token in enumerate(tokens)}
    pieces = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = [(-scored[left + right], i) for i, (left, right) in enumerate(zip(pieces, pieces[1:])) if left + right in scored]
        if not joined:
            break
        _, i = min(joined)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    found = []
    for piece in pieces:
        found += [ids[piece]] if piece in scored else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


def test_byte_level_tokens_equal_those_of_the_original_tokenizer(gguf):
    ours, original = Tokenizer(gguf()), tiny_tokenizer(320)
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


def test_smollm2_tokens_equal_those_of_transformers(smollm2_files, smollm2_gguf):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer(smollm2_files)
    reference = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    assert ours.vocabulary == len(reference) == 49152
    backend = reference.backend_tokenizer  # of SmolLM2's own pre-tokenizer, transformers 5.23 forgets the first half for GGUF
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    for text in TEXTS:
        expected = reference(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == expected, text
        assert ours.decode(expected) == text
    assert smollm2_files.eos_ids == (2,) and (smollm2_files.bos, smollm2_files.eos) == ("<|im_start|>", "<|im_end|>")
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    rendered = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ours.chat("What is 2 + 2?") == reference(rendered, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    "pre, text, words",
    [
        ("gpt-2", "a 1234'll", ["a", " 1234", "'ll"]),
        ("smollm", "a 1234'll", ["a", " ", "1", "2", "3", "4", "'ll"]),
        ("llama-bpe", "a 12345'LL", ["a", " ", "123", "45", "'LL"]),
        ("qwen2", "a 12'LL", ["a", " ", "1", "2", "'LL"]),
        ("tekken", "a 12 HelloWORLD", ["a", " ", "1", "2", " Hello", "WORLD"]),
        ("default", "a 1234, b=c", ["a", " ", "123", "4", ",", " b", "=", "c"]),
    ],
)
def test_texts_are_cut_into_words_as_the_model_was_trained(gguf, pre, text, words):
    pre_tokenizer = Tokenizer(gguf(pre=pre))._tokenizer.pre_tokenizer
    decode = decoders.ByteLevel().decode
    assert [decode([word]) for word, _ in pre_tokenizer.pre_tokenize_str(text)] == words


def test_llama3_takes_whole_words_and_adds_bos(gguf):
    files = gguf(pre="llama-bpe", metadata={"tokenizer.ggml.add_bos_token": True})
    assert json.loads(files.json)["model"]["ignore_merges"] is True
    tokenizer = Tokenizer(files)
    assert tokenizer.encode("the") == [1, *tokenizer.encode("the", special=False)]
    assert not json.loads(gguf().json)["model"]["ignore_merges"]


def test_unknown_tokenizers_are_named(tmp_path):
    for options, words in (
        ({"pre": "martian"}, "'martian'.*Hugging Face folder"),
        ({"metadata": {"tokenizer.ggml.model": "bert"}}, "'bert'.*Hugging Face folder"),
        ({"metadata": {"tokenizer.ggml.bos_token_id": 320}}, "bos token is number 320 of 320"),
        ({"tokenizer": "llama", "metadata": {"tokenizer.ggml.eot_token_id": 999}}, "eot token is number 999"),
    ):
        write_tiny_gguf(tmp_path / "tiny.gguf", **options)
        with pytest.raises(InputError, match=f"tiny.gguf: .*{words}"):
            open_source(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("old, new", [(b"tokenizer.ggml.scores", b"tokenizer.ggml.scoreZ"), (b"<0x41>", b"<0x42>")])
def test_parts_that_do_not_fit_together_are_damage(tmp_path, old, new):
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, tokenizer="llama")
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(DamagedFileError, match="tiny.gguf"):
        open_source(path)


def test_every_end_token_ends_a_text(gguf):
    assert gguf(metadata={"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 2}).eos_ids == (2, 0)


@pytest.mark.parametrize("text", [text for text in TEXTS if "\ufffd" not in text] + ["the other brother  and the mother "])
def test_merges_derived_from_scores_tokenize_as_sentencepiece(sentence_piece, text):
    tokens, scores, _ = sentence_piece_vocabulary(400)
    expected = merge_by_score(text, tokens, scores)
    assert sentence_piece.encode(text, special=False) == expected
    assert sentence_piece.encode(text) == [1, *expected]
    assert sentence_piece.decode([1, *expected]) == text


@settings(deadline=None)
@given(text=st.text(alphabet="abcdehimnorst .T", max_size=40))
def test_merges_derived_from_scores_tokenize_random_words_as_sentencepiece(sentence_piece, text):
    assert sentence_piece.encode(text, special=False) == merge_by_score(text, *sentence_piece_vocabulary(400)[:2])


def test_sentencepiece_without_a_space_prefix(gguf):
    options = {"config": replace(TINY, vocabulary=400), "tokenizer": "llama"}
    tokenizer = Tokenizer(gguf(**options, metadata={"tokenizer.ggml.add_space_prefix": False}))
    assert tokenizer.decode(tokenizer.encode(" the dog")) == " the dog"
    assert len(tokenizer.encode(" the dog")) < len(Tokenizer(gguf(**options)).encode(" the dog"))


def test_eos_is_added_only_if_the_file_says_so(gguf):
    options = {"config": replace(TINY, vocabulary=400), "tokenizer": "llama"}
    tokenizer = Tokenizer(gguf(**options, metadata={"tokenizer.ggml.add_eos_token": True}))
    assert tokenizer.encode("the")[0] == 1 and tokenizer.encode("the")[-1] == 2
    assert Tokenizer(gguf(**options)).encode("the")[-1] != 2


def test_special_tokens_in_text_count_only_if_asked_for(byte_level):
    text = "a<|im_end|>b"
    assert 2 in byte_level.encode(text)
    assert 2 not in byte_level.encode(text, special=False)
    assert byte_level.decode(byte_level.encode(text)) == "ab"
    assert byte_level.decode(byte_level.encode(text, special=False)) == text


def test_text_that_is_not_unicode_is_refused(byte_level):
    with pytest.raises(InputError, match="UTF-8"):
        byte_level.encode("a\udc80")


def test_a_stored_tokenizer_is_the_same_after_json(byte_level, gguf):
    files = gguf()
    assert TokenizerFiles.from_dict(json.loads(json.dumps(files.to_dict()))) == files
    with pytest.raises(InputError):
        TokenizerFiles.from_dict({"json": "{}"})
    with pytest.raises(InputError, match="tokenizers library"):
        Tokenizer(replace(files, json="{}"))


def test_limits_stored_with_a_tokenizer_are_ignored():
    tokenizer = tiny_tokenizer.__wrapped__(320)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    text = "The quick brown fox"
    assert Tokenizer(TokenizerFiles(tokenizer.to_str(), None, None, None, ())).decode(tokenizer.encode(text).ids)
    ids = Tokenizer(TokenizerFiles(tokenizer.to_str(), None, None, None, ())).encode(text)
    assert ids == tiny_tokenizer(320).encode(text).ids


def test_a_chat_begins_with_one_bos(sentence_piece, gguf):
    files = sentence_piece._files
    plain = Tokenizer(replace(files, chat_template="{{ messages[0].content }}")).chat("the dog")
    written = Tokenizer(replace(files, chat_template="{{ bos_token }}{{ messages[0].content }}")).chat("the dog")
    assert plain == written == sentence_piece.encode("the dog")


def test_chat_templates_have_what_transformers_gives_them(byte_level):
    template = (
        "{%- for m in messages %}{% if m.role == 'none' %}{% continue %}{% endif %}{{ m.content | tojson }}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}{{ eos_token }}{{ add_generation_prompt }}"
    )
    tokenizer = Tokenizer(replace(byte_level._files, chat_template=template))
    assert tokenizer.decode(tokenizer.chat("<é>")) == '"<é>"4TrueTrue'


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('system role needed') }}", "system role needed"),
        ("{% for %}", "chat template"),
        ("{{ messages[5].content.x.y }}", "chat template"),
        ("{{ ''.__class__.__mro__ }}", "chat template"),
        ("{{ messages.append(1) }}", "chat template"),
        ("{{ 1 // 0 }}", "chat template"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "chat template"),
    ],
)
def test_a_chat_template_that_fails_is_an_input_error(byte_level, template, words):
    with pytest.raises(InputError, match=words) as caught:
        Tokenizer(replace(byte_level._files, chat_template=template)).chat("hello")
    assert "\n" not in str(caught.value)


def test_chat_without_a_template_says_what_to_do(byte_level):
    with pytest.raises(UsageError, match="--chat"):
        Tokenizer(replace(byte_level._files, chat_template=None)).chat("hello")
