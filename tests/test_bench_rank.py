"""One rank against the memory and against a peer, and what a token costs beside the products."""

import json
import stat
from itertools import count

import pytest

from bench import exactness, overhead, rank, report
from bench.cells import generation, run_locally
from bench.opponent import Opponent
from bench.rank_cases import CASES, Texts, fit_prompt
from bench.shapes import config_of, meta_of
from bench.ticks import part_of, parts_of, phase_of, read_ticks, shown_parts
from click.testing import CliRunner
from halo_mpi.model.records import VOCABULARY_BLOCK
from halo_mpi.model.tokenizer import Tokenizer, TokenizerFiles
from tests.mpi import ROOT
from tests.test_bench import run_of

pytestmark = pytest.mark.timeout(60)
SYSTEM = "AVX2 = 1"


def ours(decode: list[float], ttft_ms: float = 100.0, repeat: int = 0, **cell) -> dict:
    cases = {"decode": {"ttft_ms": 9.0, "tpot_ms": decode}, "prefill-512": {"ttft_ms": ttft_ms, "tpot_ms": []}}
    cell = {"who": "ours", "dtype": "int4", "kernel": "auto", "kernel_used": "reference", "load_average": 0.5} | cell
    return {"status": "ok", "error": None, "repeat": repeat, "cases": cases, **cell}


def peer(decode: list[float], ttft_ms: float, flash: bool, repeat: int = 0) -> dict:
    run = ours(decode, ttft_ms, repeat, who="peer", flash=flash)
    return {key: value for key, value in run.items() if not key.startswith("kernel")}


def rank_content(runs: list[dict]) -> dict:
    needed = {"int4": 80e6, "peer": 90e6, "position": 1e6}
    settings = {"model": "tiny", "cases": ["decode", "prefill-512"], "needed_bytes": needed,
                "peer": {"version": "0.3", "system": SYSTEM}, "prompt_tokens": {"decode": 16, "prefill-512": 500}}  # fmt: skip
    return {"benchmark": "rank", "settings": settings, "complete": True, "why_incomplete": None, "runs": runs}


def test_a_prompt_is_cut_between_words_to_at_most_so_many_tokens(tiny):
    tokenizer, text = Tokenizer(TokenizerFiles.from_dict(meta_of(tiny)["tokenizer"])), "some words that follow one another " * 50
    for most in (6, 16, 100):
        prompt, ids = fit_prompt(tokenizer, text, most)
        longer = text[: text.index(" ", len(prompt) + 1)]
        assert text.startswith(prompt) and tokenizer.encode(prompt) == ids
        assert len(ids) <= most < len(tokenizer.encode(longer))


def test_the_bytes_of_a_token_are_those_of_all_layers_the_head_and_the_cache(tiny):
    config = config_of(tiny)
    whole, rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    groups = config.groups * config.group_size
    weights = config.layers * config.hidden * (2 * whole + 2 * rows + 3 * groups)
    head = -(-config.vocabulary // VOCABULARY_BLOCK) * VOCABULARY_BLOCK * config.hidden
    assert rank.stored_bytes(tiny) == 4 * (weights + head)
    assert rank.cached_bytes(config, 10) == 10 * config.layers * 2 * rows * 2
    assert rank.mbu(100e6, 10.0, 20.0) == pytest.approx(0.5)


def test_times_of_tokens_are_given_to_the_texts_in_their_order():
    lines = [{"id": name, "ttft_ms": 5.0, "token_ids": ids} for name, ids in (("warm-up", [1, 2]), ("a", [1, 2, 3]), ("b", [4]))]
    found = rank.cases_of(lines, [9.0, 1.0, 2.0])
    assert {name: case["tpot_ms"] for name, case in found.items()} == {"a": [1.0, 2.0], "b": []}


def test_the_better_setting_of_the_peer_counts_in_each_case():
    runs = [{"who": "memory", "status": "ok", "repeat": 0, "gbps": 10.0, "load_average": 0.5}, ours([99.0, 20.0, 20.0])]
    runs += [peer([99.0, 10.0], 300.0, False), peer([99.0, 8.0], 400.0, True)]
    rows = {(row[0], row[1]): row for row in rank.table(rank_content(runs)).rows}
    mine = rows["decode", "int4, kernel auto (reference)"]
    assert mine[4] == "20.0" and mine[-1] == "2.50 (1 pair)", "the first token is warm-up; 8 ms with flash attention"
    assert mine[6:9] == ["20.0", "128", "64%"], "80 MB and 48.5 positions in 20 ms of 10 GB/s"
    assert rows["prefill-512", "int4, kernel auto (reference)"][-1] == "0.33 (1 pair)"
    assert [row[1] for row in rows.values() if row[-1] == "best"] == [
        "llama.cpp, flash attention on", "llama.cpp, flash attention off"]  # fmt: skip


def test_results_of_a_rank_are_a_section_of_the_page(tmp_path):
    profiled = ours([], profiled=True, tpot_ms={"p50": 20.0}, parts_ms={"products": 18.0, "glue": 2.0}) | {"cases": {}}
    failed = {"who": "ours", "dtype": "f32", "kernel": "auto", "status": "failed", "error": "no memory", "repeat": 0}
    page = report.section(tmp_path / "rank.json", rank_content([ours([9.0, 1.0]), profiled, failed]), tmp_path)
    assert "products 18.00 ms (90%), glue 2.00 ms (10%)" in page
    assert "failed: f32, kernel auto: no memory" in page and SYSTEM in page


def test_the_peer_is_asked_for_the_same_ids_after_a_warm_up(tmp_path, tiny):
    fake = tmp_path / "python"
    answer = json.dumps({"token_ids": [1], "ttft_ms": 2.0, "tpot_ms": []})
    fake.write_text(
        f"""#!/bin/sh\necho '{{"version": "0.3"}}'\nwhile read -r line; do echo "$line" >> {tmp_path}/asked; echo '{answer}'; done\n"""
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    texts = Texts(Tokenizer(TokenizerFiles.from_dict(meta_of(tiny)["tokenizer"])), ("decode",), tmp_path)
    with Opponent(fake, tmp_path / "x.gguf", texts.longest) as opponent:
        assert opponent.facts == {"version": "0.3"}
        assert opponent.run(texts, True) == {"cases": {"decode": {"token_ids": [1], "ttft_ms": 2.0, "tpot_ms": []}}}
    asked = [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]
    assert [(len(each["ids"]), each["tokens"], each["flash"]) for each in asked] == [
        (len(texts.ids[name]), CASES[name].tokens, True) for name in ("warm-up", "decode")]  # fmt: skip
    written = [json.loads(line) for line in texts.file.read_text().splitlines()]
    assert [(line["id"], line["max_tokens"]) for line in written] == [("warm-up", 16), ("decode", 65)]


def test_a_place_belongs_to_one_part_of_a_token():
    places = {
        "model/llama.py:ffn": "products",
        "model/kernels/llvm.py:product": "products",
        "model/tokenizer.py:decode": "sampling, text",
        "engine/sampling.py:pick": "sampling, text",
        "engine/predictor.py:look_ahead": "predictor",
        "wire/root_link.py:ask": "wire",
        "waiting:wire/mailbox.py:test": "waiting",
        "wire/polling.py:wait": "waiting",
        "engine/root.py:_sync": "glue",
    }
    assert {place: part_of(place) for place in places} == places
    parts = parts_of(dict(zip(places, count(1.0))))
    assert parts["products"] == 3.0 and sum(parts.values()) == pytest.approx(45.0)
    assert [phase_of(*place) for place in (("engine/root.py", "step"), ("engine/root.py", "prefill"), ("engine/root.py", "_sync"))] == [
        "decode", "prefill", None]  # fmt: skip


def overhead_run(ms: float, tree: str, ticks: bool = False, repeat: int = 0) -> dict:
    run = run_of([9.0, ms, ms], repeat, tree=tree, ticks=ticks, load_average=0.1)
    run["report"] |= {
        "git": tree,
        "kernel": "reference",
        "syncs_per_token": 2,
        "devices": [{"compute_ms": ms / 2}, {"compute_ms": ms / 4}],
    }
    parts = {"products": 1.0, "glue": 0.3, "wire": 0.1, "waiting": 2.0}
    return run | ({"parts_ms": [parts, {"products": 2.0, "glue": 0.02}]} if ticks else {})


def test_a_checkout_without_guesses_is_not_told_to_make_none(tmp_path):
    (tmp_path / "halo_mpi").mkdir()
    (tmp_path / "halo_mpi" / "generate.py").write_text("")
    program = ["halo_mpi.generate", "--lookup", "0", "--model", "m"]
    assert overhead.known_to(tmp_path, program) == ["halo_mpi.generate", "--model", "m"]
    assert overhead.known_to(ROOT, program) == program


def test_two_checkouts_are_compared_and_overhead_is_told_per_sync():
    runs = [overhead_run(ms, tree, ticks) for ticks in (False, True) for tree, ms in (("against", 20.0), ("this", 10.0))]
    drawn = overhead.table({"settings": {"model": "tiny"}, "complete": True, "runs": runs})
    assert [row[:4] for row in drawn.rows] == [["4", "against", "reference", "1"], ["4", "this", "reference", "1"]]
    assert drawn.rows[1][4:] == ["10.0", "10.0", "5.00", "5.00", "2500", "200", "10.0", "0.50 (1 pair)"]
    assert any("4 ranks, this, root: " in note and "waiting 2.00 ms (59%)" in note for note in drawn.notes)


def test_texts_agree_until_they_part_and_scores_are_compared_token_by_token():
    assert exactness.common([1, 2, 3], [1, 2, 4]) == 2 and exactness.common([1], [1]) == 1
    exact = {"perplexity": 10.0, "logprobs": [-1.0, -2.0], "top1": [1, 2]}
    found = exactness.compared({"perplexity": 10.1, "logprobs": [-1.0, -2.5], "top1": [1, 3]}, exact)
    assert found == {"perplexity": pytest.approx(0.01), "mean": 0.25, "max": 0.5, "top1": 0.5}


def test_kernels_are_a_table_against_the_first():
    scored = {"what": "evaluate", "status": "ok", "perplexity": 10.0, "logprobs": [-1.0], "top1": [1], "kernel_used": "x"}
    texts = {"what": "generate", "status": "ok", "ids": [[1, 2, 3], [4]]}
    runs = [each | {"kernel": kernel} for each in (scored, texts) for kernel in ("reference", "llvm")]
    settings = {"model": "tiny", "tokens": 2, "context": 2, "generated": 3, "kernels": ["reference", "llvm"]}
    drawn = exactness.table({"settings": settings, "complete": True, "runs": runs})
    assert drawn.rows[0] == ["reference (x)", "10.0000", *["-"] * 5]
    assert drawn.rows[1] == ["llvm (x)", "10.0000", "+0.000%", "0.0000", "0.000", "100.00%", "3, 1"]


@pytest.mark.mpi
def test_ticks_tell_where_every_rank_spends_its_time(tiny, tmp_path):
    run = run_locally(2, generation(tiny, ("--threads", "1"), 20, 60), 50, ticks=tmp_path / "ticks.json")
    assert run["status"] == "ok", run["error"]
    root, worker = read_ticks(tmp_path / "ticks.json", 2, 59)
    assert 0 < sum(root.values()) < 2 * run["report"]["tpot_ms"]["mean"]
    assert parts_of(root)["products"] > 0 < parts_of(worker)["waiting"]
    assert "products" in shown_parts(parts_of(root))


@pytest.mark.mpi
def test_a_rank_is_measured_and_profiled(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(rank, "measured_gbps", lambda: 10.0)
    monkeypatch.setattr(rank, "PROFILED_TOKENS", 50)
    out = tmp_path / "rank.json"
    done = CliRunner().invoke(rank.main, ["--model", str(tiny), "--cases", "decode", "--repeats", "1", "--json", str(out)])
    assert done.exit_code == 0, done.output
    memory, mine, profiled = json.loads(out.read_text())["runs"]
    assert len(mine["cases"]["decode"]["token_ids"]) == 65 and len(mine["cases"]["decode"]["tpot_ms"]) == 64
    assert profiled["profiled"] and profiled["parts_ms"]["products"] > 0
