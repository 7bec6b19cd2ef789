"""A text that begins like the one before is computed from where they part, and is the same."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halo_mpi.engine.held_text import HeldText
from tests.mpi import halo, report_of, succeed
from tests.simulator import CONTEXT, IDS, NO_STALL, QUICK, RANKS, STRICT, Simulation, generated
from tests.test_moves import any_plan
from tests.test_protocol import RELAXED, caches_are_complete, slow_links, stalls
from tests.test_rescue import RESCUED, at_sync, befall, faults, same

pytestmark = pytest.mark.timeout(300)
TEXTS = (IDS, IDS[:7] + [9, 8, 7], IDS[:7] + [9, 8, 7], [4, 5, 6], [4, 5, 9, 9])
PREFILL = 3


def follow(simulation: Simulation, ids: list[int], prefill: int = PREFILL) -> tuple[int, np.ndarray]:
    """How many tokens were held, and the logits f32 [T, V] from the last prefilled token on."""
    root = simulation.root
    held = root.held(ids[:prefill])
    first = root.prefill(ids[:prefill], held).copy()
    return held, np.stack([first] + [root.step(ids[at], at).copy() for at in range(prefill, len(ids))])


@pytest.fixture(scope="module")
def anew(deep):
    """Each text's logits where nothing is held."""
    return [Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, CONTEXT).text(ids, PREFILL) for ids in TEXTS]


def test_what_is_held_is_shared_up_to_where_texts_part():
    held = HeldText()
    assert held.shared([1, 2]) == 0
    held.compute([1, 2, 3], 0, exact=True)
    held.compute([4], 3, exact=True)
    assert [held.shared(text) for text in ([1, 2, 9], [1, 2, 3, 4, 5], [1], [7], [])] == [2, 4, 1, 0, 0]
    held.compute([8, 9, 9], 3, exact=True)  # guesses
    held.compute([7], 4, exact=True)
    assert held.shared([1, 2, 3, 8, 7, 9]) == 5
    held.compute([6], 2, exact=False)
    assert held.shared([1, 2, 6, 8]) == 2


def test_only_what_differs_is_computed(deep, anew):
    simulation = Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, CONTEXT, keeps=True)
    computed = []
    for ids, expected in zip(TEXTS, anew):
        before = simulation.root.computed_tokens
        held, logits = follow(simulation, ids)
        computed.append((held, simulation.root.computed_tokens - before))
        assert same(logits, expected)
    assert computed == [(0, 10), (2, 8), (2, 8), (0, 3), (2, 2)]
    assert follow(simulation, TEXTS[4], 4)[0] == 3
    simulation.settle()
    caches_are_complete(simulation, 4)


def test_relaxed_holds_the_prompt_alone(deep):
    slow = [[1e-4], [1e-4], [2e-3], [1e-4]]  # always late
    simulation = Simulation(deep, RANKS, replace(RELAXED, deadline_ms=0.5), slow, NO_STALL, CONTEXT)
    follow(simulation, IDS, 5)
    assert simulation.root.ledger.deferred and simulation.root.held(IDS) == 5
    assert follow(simulation, IDS[:4] + IDS, 8)[0] == 4


def test_nothing_is_held_of_workers_that_are_not_at_work(deep):
    simulation = Simulation(deep, RANKS, RELAXED, QUICK, NO_STALL, CONTEXT)
    follow(simulation, IDS, 5)
    simulation.root.crew.stop_asking(2)
    assert simulation.root.held(IDS) == 0
    follow(simulation, IDS, 5)
    assert simulation.root.held(IDS) == 5


def test_after_a_rescue_the_text_is_held_by_those_who_are_left(deep, anew):
    for keeps in (True, False):
        simulation = Simulation(deep, RANKS, RESCUED, QUICK, NO_STALL, CONTEXT, keeps=keeps)
        at_sync(simulation, {25: [lambda: simulation.end(2)], 125: [lambda: simulation.end(1)]})
        held = []
        for ids, expected in zip(TEXTS[:3], anew):
            found, logits = follow(simulation, ids)
            held.append(found)
            assert same(logits, expected)
        assert held == [0, 2, 2] and simulation.root.crew.lost() == {1, 2}


@generated(5)
@given(
    slow_links, stalls, faults, st.booleans(), st.integers(0, 9), st.lists(st.integers(0, len(TEXTS) - 1), min_size=2, max_size=5)
)
def test_texts_in_any_order_with_any_faults_and_moves_are_the_same(deep, anew, delays, stalls, faults, keeps, seed, order):
    simulation = Simulation(deep, RANKS, RESCUED, delays, stalls, CONTEXT, keeps=keeps)
    befall(simulation, faults)
    for number, text in enumerate(order):
        assert same(follow(simulation, TEXTS[text])[1], anew[text])
        if keeps and simulation.root.mover.idle:
            simulation.root.mover.aim_at(any_plan(simulation, seed + number))


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("lookup", [0, 4])
def test_a_batch_of_prompts_that_begin_alike_is_the_same_as_one_by_one(tiny, tmp_path, lookup):
    prompts = ["The quick brown fox jumps over the dog", "The quick brown fox jumps high", "A fox", "A fox"]
    lines = [{"id": number, "prompt": prompt} for number, prompt in enumerate(prompts)]
    options = ("--model", tiny, "--max-tokens", 8, "--ignore-eos", "--wire", "f32", "--lookup", lookup)
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = report_of(3, "generate", tmp_path, *options, "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    held = report["prefix_tokens"]
    assert held[0] == 0 and held[1] > 4 and held[3] > held[2] >= 0
    for prompt, result in itertools.islice(zip(prompts, results), 1, 4, 2):
        alone = succeed(halo(1, "generate", *options, "--prompt", prompt))
        assert alone.out == result["text"] + "\n"
