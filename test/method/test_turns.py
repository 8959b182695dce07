"""Turns: what decodes fits, nobody starves, nothing changes without need."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_psa.memory.turns import Candidate, choose

QUANTUM, SLACK = 8, 0.1


def decide(candidates, step, frames=100):
    return choose(candidates, step, frames, quantum=QUANTUM, slack=SLACK)


class Batch:
    """Requests of given working sets that run on; ``step`` says who decoded."""

    def __init__(self, frames, sets):
        self.frames, self.sets = frames, list(sets)
        self.now = 0
        self.decodes = [False] * len(sets)
        self.since = [1] * len(sets)
        self.last = [0] * len(sets)
        self.gap = [0] * len(sets)
        self.pauses = 0

    def step(self, leaves=()):
        self.now += 1
        found = [
            Candidate(s, d, t, i in leaves)
            for i, (s, d, t) in enumerate(zip(self.sets, self.decodes, self.since, strict=True))
        ]
        chosen = decide(found, self.now, self.frames)
        for i, decodes in enumerate(chosen):
            if decodes != self.decodes[i]:
                self.pauses += not decodes
                self.since[i] = self.now
            if decodes:
                self.gap[i] = max(self.gap[i], self.now - self.last[i])
                self.last[i] = self.now
        self.decodes = chosen
        return chosen


sets = st.lists(st.integers(0, 130), min_size=1, max_size=9)


@settings(max_examples=30, deadline=None)
@given(sets)
def test_none_starves_and_the_arena_is_never_exceeded_but_by_one_alone(frames):
    batch = Batch(100, frames)
    bound = (len(frames) + 1) * QUANTUM
    for _ in range(4 * bound):
        chosen = batch.step()
        total = sum(f for f, decodes in zip(frames, chosen, strict=True) if decodes)
        assert any(chosen)
        assert total <= 100 or sum(chosen) == 1
    waited = [max(gap, batch.now - last) for gap, last in zip(batch.gap, batch.last, strict=True)]
    assert max(waited) <= bound + 1


@settings(max_examples=30, deadline=None)
@given(sets)
def test_a_turn_lasts_a_quantum_while_working_sets_stay_as_they_are(frames):
    batch = Batch(100, frames)
    began = {}
    before = [False] * len(frames)
    for _ in range(100):
        chosen = batch.step()
        for i, (was, now) in enumerate(zip(before, chosen, strict=True)):
            if now and not was:
                began[i] = batch.now
            if was and not now:
                assert batch.now - began[i] >= QUANTUM
        before = chosen


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_all_decode_when_all_fit_and_keep_doing_so_while_they_grow_a_little(frames, random):
    total = sum(frames)
    batch = Batch(int(total / (1 - SLACK)) + 1, frames)
    for _ in range(30):
        assert all(batch.step())
        batch.sets = [f + random.randint(0, f // 20) for f in frames]
    assert batch.pauses == 0


@settings(max_examples=40, deadline=None)
@given(sets, st.randoms(use_true_random=False))
def test_working_sets_that_change_never_exceed_the_arena(frames, random):
    batch = Batch(100, frames)
    for _ in range(100):
        chosen = batch.step()
        total = sum(f for f, decodes in zip(batch.sets, chosen, strict=True) if decodes)
        assert any(chosen)
        assert total <= 100 or sum(chosen) == 1
        batch.sets = [max(0, f + random.randint(-5, 5)) for f in batch.sets]


def test_who_began_last_yields_when_sets_outgrow_the_arena():
    grown = [Candidate(60, True, 1), Candidate(50, True, 3)]
    assert decide(grown, 5) == [True, False]


def test_who_waits_longest_comes_first():
    candidates = [Candidate(60, True, 1), Candidate(60, False, 6), Candidate(60, False, 4)]
    assert decide(candidates, 1 + QUANTUM) == [False, False, True]


def test_a_turn_goes_on_while_nobody_that_waits_fits_in_its_place():
    busy = [Candidate(50, True, 1), Candidate(40, True, 9), Candidate(70, False, 5)]
    assert decide(busy, 10) == [True, True, False]


def test_a_large_request_is_not_overtaken_for_ever():
    waiting = [Candidate(60, True, 9), Candidate(80, False, 1), Candidate(10, False, 8)]
    assert decide(waiting, 10) == [True, False, False]
    assert decide([*waiting[:1], Candidate(80, False, 4), *waiting[2:]], 10) == [True, False, True]


@pytest.mark.parametrize("frames", [100, 1, 0])
def test_one_that_alone_exceeds_the_arena_decodes_alone(frames):
    candidates = [Candidate(500, False, 1), Candidate(500, False, 2)]
    assert decide(candidates, 3, frames) == [True, False]


def test_one_that_ends_takes_part_whatever_the_others_need():
    candidates = [Candidate(90, True, 1), Candidate(90, False, 2, leaves=True)]
    assert decide(candidates, 3) == [True, True]
