"""Guesses of the tokens to come: where they come from, and that the text is the same with them, on a simulated wire."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halo_mpi.engine.history import AttentionInputs
from halo_mpi.engine.lookup import LONGEST, MOST_GUESSES, Guesser, PassCounts, PassTimes
from halo_mpi.engine.sampling import Sampler, Sampling
from halo_mpi.engine.text import tokens_after
from tests.simulator import CONTEXT, IDS, NO_STALL, QUICK, RANKS, STRICT, Simulation, generated
from tests.test_moves import any_plan
from tests.test_protocol import caches_are_complete, slow_links, stalls
from tests.test_rescue import RESCUED, at_sync, befall, faults

pytestmark = pytest.mark.timeout(300)
texts = st.lists(st.integers(0, 3), max_size=60)
LENGTH = 26


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(1, 60), st.integers(1, MOST_GUESSES))
def test_guesses_follow_the_latest_place_of_the_longest_end_that_was_there_before(text, begun, most):
    guesser = Guesser(most)
    guesser.begin(text[:begun])
    guesser.add(text[begun:])
    guesses = guesser.guess(most)
    ends = [
        (length, start)
        for length in range(1, LONGEST + 1)
        for start in range(length, len(text))
        if text[start - length : start] == text[len(text) - length :]
    ]
    assert bool(guesses) == bool(ends) and len(guesses) <= most
    if ends:
        _, start = max(ends)
        assert guesses == list(itertools.islice(itertools.cycle(text[start:]), len(guesses)))


def test_a_text_that_repeats_itself_is_guessed_to_go_on_so():
    guesser = Guesser(8)
    guesser.begin([5, 1, 2, 1, 2, 1, 2])
    for _ in range(20):
        guesser.guess(8)
        guesser.add([1, 2] * 4)
    assert guesser.guess(8) == [1, 2] * 4 and guesser.guess(3) == [1, 2, 1] and guesser.guess(0) == []


def test_guesses_that_are_never_right_end_and_come_back_when_they_would_be():
    guesser, made = Guesser(8), []
    guesser.begin([0])
    for token in range(10, 130):  # 0 is always followed by something new
        made.append(len(guesser.guess(8)))
        guesser.add([token])
        assert not guesser.guess(8)
        guesser.add([0])
    assert made[1] == 1 and sum(made) <= 2
    made = []
    for _ in range(60):
        made.append(len(guesser.guess(8)))
        guesser.add([1, 2, 3, 0][: 1 + made[-1]] if made[-1] < 3 else [1, 2, 3, 0])
    assert made[-1] >= 3


@pytest.mark.parametrize("step, row", [(0.0, 0.03), (0.0, 0.5), (0.8, 0.05), (3.0, 0.3)])
def test_what_passes_take_is_learned(step, row):
    times = PassTimes()
    for number in range(200):
        times.add(0, 0.1)
        times.add(guesses := 1 + number % 8, 0.1 * (1 + step + row * guesses))
    some = np.arange(9)
    assert times.relative(some) == pytest.approx(1 + (step + row * some) * (some > 0), rel=0.15)


def test_passes_that_are_all_alike_say_nothing_of_others():
    times = PassTimes()
    times.add(0, 0.1)
    for number in range(2000):
        times.add(8, 0.2 + 0.01 * (number % 3))
    assert times.relative(np.array([0, 1, 8])) == pytest.approx([1, 1.5, 2.1], rel=0.3)


def test_where_guesses_take_long_there_are_few_until_that_is_forgotten():
    guesser = Guesser(8)
    guesser.begin([1, 2, 3, 9, 1, 2])
    at_first = len(guesser.guess(8))
    for _ in range(50):
        guesser.times.add(0, 0.1)
        guesser.times.add(2, 0.4)
    assert at_first >= 3 and not guesser.guess(8)
    guesser.times.add(0, 100.0)  # an outage
    assert not guesser.guess(8)
    for _ in range(1000):
        guesser.times.add(0, 0.1)
    assert len(guesser.guess(8)) >= at_first - 1


def test_on_lossy_links_only_what_is_likely_is_guessed_until_passes_turn_out_short():
    guesser = Guesser(8)
    guesser.begin([1, 2, 3, 4, 9, 1, 2])
    assert guesser.guess(8)
    for _ in range(2):
        guesser.times.expect_losses()
        assert not guesser.guess(8)
    guesser.add([3, 4])
    assert len(guesser.guess(8)) == 8
    for _ in range(30):
        guesser.times.add(0, 0.1)
        guesser.times.add(4, 0.11)
        guesser.times.expect_losses()
    guesser.begin([1, 2, 3, 4, 9, 1, 2])
    assert guesser.guess(8)


def test_without_guesses_nothing_is_remembered():
    guesser = Guesser(0)
    guesser.begin([1, 2, 1, 2])
    assert guesser.guess(5) == [] and not guesser._after


class Told(Guesser):
    """Guesses what it is told will come: so many tokens right, then a wrong one and more."""

    def __init__(self, text, plan):
        super().__init__(MOST_GUESSES)
        self.whole, self.plan = text, itertools.cycle(plan)

    def guess(self, most):
        right, wrong = next(self.plan)
        at = len(self._text)
        guesses = self.whole[at : at + right]
        return (guesses + [(token + 1) % 300 for token in self.whole[at + right : at + right + wrong]])[: max(0, most)]


def written(simulation, guesser, sampling=Sampling(), length=LENGTH, prompt=IDS[:6]):
    """The tokens that follow a prompt, and what passes they took."""
    counts = PassCounts()
    following = tokens_after(simulation.root, prompt, length, Sampler(sampling), set(), guesser, counts)
    return [token for token, _, _ in itertools.islice(following, length - len(prompt))], counts


SAMPLED = Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=4)


@pytest.fixture(scope="module")
def plain(deep):
    """The texts without guesses, by how they are sampled."""
    simulation = Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, CONTEXT)
    return {sampling: written(simulation, Guesser(0), sampling)[0] for sampling in (Sampling(), SAMPLED)}


@pytest.mark.parametrize("most", [1, 2, 4, 8])
def test_a_text_that_repeats_itself_takes_fewer_passes_and_is_the_same(deep, plain, most):
    simulation = Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, CONTEXT)
    text, counts = written(simulation, Guesser(most))
    assert text == plain[Sampling()] and counts.passes + counts.accepted >= len(text) - 1
    assert counts.accepted > 0 and counts.passes < len(text) - 1


@generated(2)
@given(slow_links, stalls, st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8), st.booleans())
def test_right_and_wrong_guesses_change_nothing(deep, plain, delays, stalls, guessed, greedy):
    simulation = Simulation(deep, RANKS, STRICT, delays, stalls, CONTEXT, keeps=True)
    sampling = Sampling() if greedy else SAMPLED
    for _ in range(2):
        text, counts = written(simulation, Told(IDS[:6] + plain[sampling], guessed), sampling)
        assert text == plain[sampling] and counts.accepted <= counts.proposed
    simulation.settle()
    caches_are_complete(simulation, LENGTH - 1)


@pytest.mark.slow
@generated(5)
@given(
    slow_links,
    stalls,
    faults,
    st.booleans(),
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8),
)
def test_workers_that_end_or_move_in_the_middle_of_a_pass_change_nothing(
    deep, plain, delays, stalls, faults, keeps, seed, guessed
):
    simulation = Simulation(deep, RANKS, RESCUED, delays, stalls, CONTEXT, keeps=keeps)
    befall(simulation, faults)
    if keeps:
        simulation.root.mover.aim_at(any_plan(simulation, seed))
    for _ in range(2):
        assert written(simulation, Told(IDS[:6] + plain[Sampling()], guessed))[0] == plain[Sampling()]


def test_the_last_rank_finishes_a_guessed_text_alone(deep, plain):
    for keeps in (True, False):  # from kept inputs, and computed again
        simulation = Simulation(deep, RANKS, RESCUED, QUICK, NO_STALL, CONTEXT, keeps=keeps)
        at_sync(simulation, {25 * rank: [lambda rank=rank: simulation.end(rank)] for rank in range(1, RANKS)})
        guesser = Told(IDS[:6] + plain[Sampling()], [(3, 2), (0, 4), (2, 0)])
        assert written(simulation, guesser)[0] == plain[Sampling()] and len(simulation.root.crew.lost()) == RANKS - 1


class Line:
    """Stands in for a RootLink: the rows that were sent again, by layer."""

    def __init__(self):
        self.rows = {}

    def replay(self, rank, kind, layer, position, x, *rest):
        self.rows.setdefault(layer, []).extend(range(position, position + len(x)))


def test_what_a_worker_was_sent_of_wrong_guesses_is_sent_again():
    history, line, row = AttentionInputs(layers=2, context=9, width=4, ranks=3, wire="f32"), Line(), np.ones((1, 4), np.float32)
    history.follow([[1, 2]] * 2)
    for layer in range(2):
        history.keep(layer, 0, row.repeat(7, 0), [1, 2])
        history.keep(layer, 4, row.repeat(3, 0), [2])  # three guesses were wrong, and rank 1 is away
    history.keep(0, 5, row.repeat(2, 0), [2])
    assert history.replay(line, 1, position=5, computed=2, next_layer=1, epoch=0, plan=0)
    assert line.rows == {0: [4, 5, 6], 1: [4]}
    assert history.replay(line, 2, position=5, computed=2, next_layer=1, epoch=0, plan=0) and line.rows[0] == [4, 5, 6]


def test_no_guess_goes_beyond_the_longest_text(deep, plain):
    simulation = Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, LENGTH)  # caches for no more
    told = Told(IDS[:6] + plain[Sampling()] + IDS, [(9, 6)])
    assert written(simulation, told)[0] == plain[Sampling()] and told._text[6:] == plain[Sampling()]


def test_an_end_token_among_right_guesses_ends_the_text(deep, plain):
    simulation = Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, CONTEXT)
    text = plain[Sampling()]
    end = next(token for token in text[8:] if text.index(token) >= 8)
    told = Told(IDS[:6] + text, [(9, 0)])
    following = tokens_after(simulation.root, IDS[:6], LENGTH, Sampler(Sampling()), {end}, told, PassCounts())
    seen = []
    for token, _, _ in following:
        seen.append(token)
        if token == end:
            break
    assert seen == text[: text.index(end) + 1] and told._text[-1] == end


def test_the_random_state_goes_with_each_token(deep, plain):
    def steps(guesser):
        simulation = Simulation(deep, RANKS, STRICT, QUICK, NO_STALL, CONTEXT)
        following = tokens_after(simulation.root, IDS[:6], LENGTH, Sampler(SAMPLED), set(), guesser, PassCounts())
        return [(token, random) for token, random, _ in itertools.islice(following, 20)]

    assert steps(Guesser(0)) == steps(Told(IDS[:6] + plain[SAMPLED], [(4, 1)]))
