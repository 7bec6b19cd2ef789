"""The real model: SmolLM2-135M-Instruct, against transformers on the same GGUF file."""

import json
import pydoc_data.topics
from functools import cache

import numpy as np
import pytest

from halo_mpi.model.tokenizer import Tokenizer, TokenizerFiles
from halo_mpi.sources import open_source
from halo_mpi.store.encoding import decode_blocks
from halo_mpi.store.reader import ModelStore
from tests.mpi import halo, report_of, run, succeed

pytest.importorskip("transformers")
pytestmark = [pytest.mark.mpi, pytest.mark.timeout(600)]

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Packet loss matters on a wireless network because",
    "Water boils at 100 degrees; ice melts at",
)
TEXT = "\n\n".join(pydoc_data.topics.topics[topic] for topic in ("assert", "exceptions", "naming", "typesmapping"))


@pytest.fixture(scope="module")
def reference(smollm2_gguf):
    from tests.reference import Reference

    return Reference(smollm2_gguf)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return Tokenizer(TokenizerFiles.from_dict(ModelStore(smollm2("f32")).meta["tokenizer"]))


@pytest.fixture(scope="module")
def expected(reference, tokenizer):
    """The reference's ids and margins of a prompt's first tokens."""
    return cache(lambda prompt, tokens: reference.greedy(tokenizer.encode(prompt), tokens, tokenizer.eos_ids[0]))


SLOW = pytest.mark.slow
SHORT = [(4, PROMPTS[:2], 24)]
WHOLE = [pytest.param(ranks, PROMPTS, 64, marks=SLOW) for ranks in (1, 2, 3, 4, 5, 8)]


@pytest.mark.parametrize("ranks, prompts, tokens", SHORT + WHOLE)
def test_greedy_ids_are_those_of_transformers_on_any_number_of_ranks(smollm2, expected, ranks, prompts, tokens, tmp_path):
    from tests.reference import same_until_uncertain

    lines = [json.dumps({"id": number, "prompt": prompt}) for number, prompt in enumerate(prompts)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = ("--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--max-tokens", tokens, "--ignore-eos")
    succeed(halo(ranks, "generate", "--model", smollm2("f32"), "--wire", "f32", *options, timeout=500))
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [result["id"] for result in results] == list(range(len(prompts)))
    for prompt, result in zip(prompts, results):
        assert len(result["token_ids"]) == tokens
        assert same_until_uncertain(result["token_ids"], *expected(prompt, tokens)), prompt


@pytest.mark.parametrize("ranks", [pytest.param(ranks, marks=SLOW) for ranks in (1, 3)])
def test_logits_of_the_first_32_positions(smollm2, reference, tokenizer, ranks, tmp_path):
    ids = tokenizer.encode(TEXT)[:32]
    (tmp_path / "jobs.json").write_text(
        json.dumps([{"model": str(smollm2("f32")), "ids": ids, "out": str(tmp_path / "out.npz")}])
    )
    succeed(run(ranks, "-m", "tests.programs.logits", tmp_path / "jobs.json"))
    difference = np.abs(np.load(tmp_path / "out.npz")["steps"] - reference.logits(ids)).max()
    assert difference < 1e-3


@pytest.mark.parametrize("ranks", [pytest.param(ranks, marks=SLOW) for ranks in (1, 3)])
def test_perplexity_is_that_of_transformers(smollm2, reference, tokenizer, ranks, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    options = ("--text", tmp_path / "text", "--tokens", 130, "--context", 100, "--logprobs", tmp_path / "scores.npy")
    report = report_of(ranks, "evaluate", tmp_path, "--model", smollm2("f32"), "--wire", "f32", *options, timeout=300)
    ids = tokenizer.encode(TEXT, special=False)[:130]
    assert len(ids) == 130
    assert report["perplexity"] == pytest.approx(reference.perplexity(ids, 100), rel=1e-3)
    scores = np.load(tmp_path / "scores.npy")
    assert scores.dtype == np.float32 and len(scores) == report["scored_tokens"] == 130 - 2
    assert np.exp(-scores.mean()) == pytest.approx(report["perplexity"], rel=1e-5)


def test_the_blocks_of_the_gguf_file_come_through_bit_equal(smollm2, smollm2_gguf):
    """Every 4-bit and 8-bit block in the shards dequantizes to what the gguf package makes of the file."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(smollm2_gguf).tensors}
    store = ModelStore(smollm2("int4"))
    layers, dim, group = 30, 64, 128

    def stored(table, layer, entry, name):
        layout = store.layout(table)
        part, start = layout.parts[name], layout.offsets[name]
        return decode_blocks(store.read(table, layer, entry)[start:], part.rows, part.columns, part.dtype).dequantize()

    def original(name):
        tensor = tensors[name]
        return dequantize(tensor.data, tensor.tensor_type)

    for layer in range(0, layers, 7):
        q = (
            original(f"blk.{layer}.attn_q.weight").reshape(9, dim // 2, 2, 576).swapaxes(1, 2).reshape(576, 576)
        )  # GGUF interleaves
        o, down = original(f"blk.{layer}.attn_output.weight"), original(f"blk.{layer}.ffn_down.weight")
        for head in range(9):
            own = slice(head * dim, (head + 1) * dim)
            assert np.array_equal(stored("query", layer, head, "q"), q[own])
            assert np.array_equal(stored("query", layer, head, "o"), o[:, own])
        for entry in range(12):
            own = slice(entry * group, (entry + 1) * group)
            assert np.array_equal(stored("ffn", layer, entry, "down"), down[:, own])
            for name in ("gate", "up"):
                assert np.array_equal(stored("ffn", layer, entry, name), original(f"blk.{layer}.ffn_{name}.weight")[own])
    embedding = original("token_embd.weight")
    for block in range(12):
        assert np.array_equal(stored("embedding", 0, block, "rows"), embedding[block * 4096 : (block + 1) * 4096])


def test_f32_and_int4_of_this_source_are_the_same_model(smollm2):
    """The source is Q4_1 with a Q8_0 vocabulary, which the int4 form keeps: no second rounding anywhere."""
    f32, int4 = ModelStore(smollm2("f32")), ModelStore(smollm2("int4"))
    for table, name in (("query", "q"), ("query", "o"), ("kv", "k"), ("kv", "v"), ("ffn", "gate"), ("ffn", "down")):
        for layer in (0, 13, 29):
            matrices = [store.layout(table).unpack(store.read(table, layer, 2), name) for store in (f32, int4)]
            assert np.array_equal(*matrices), (table, name, layer)
    assert (f32.meta["dtype"], int4.meta["dtype"]) == ("f32", "int4")


def test_a_source_without_a_dtype_given_keeps_its_own(smollm2_gguf):
    with open_source(smollm2_gguf) as source:
        assert source.native_dtype == "int4"


def test_chat_answers_and_streams_to_standard_output(smollm2):
    options = ("--prompt", "Hello! What is 2 + 2?", "--chat", "--max-tokens", 24)  # not a close call between two answers
    finished = succeed(halo(2, "generate", "--model", smollm2("int4"), *options))
    assert "= 4" in finished.out
    assert "generated on 2 ranks" in finished.err
    assert "<|im_" not in finished.out
