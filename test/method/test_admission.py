"""Admission: estimates until working sets are known, what stays in the queue, what is counted."""

import pytest

from sgl_psa.memory.admission import WINDOW, Admission, AdmissionLimits, Running

LAYERS, FORCED, DENSE = 4, 3, 10
LIMITS = AdmissionLimits(quantum=16, reserve=0.0, slack=0.0, overcommit=2.0, prior=0.25)


def make(frames=400, **changes):
    return Admission(frames, LAYERS, forced_pages=FORCED, dense_pages=DENSE, limits=LIMITS)


def run(admission, requests, steps, frames):
    """Decode ``steps`` steps; ``frames`` are the working sets that are measured after each."""
    for _ in range(steps):
        chosen = admission.decide(requests)
        found = {r.key: frames[r.key] for r, on in zip(requests, chosen, strict=True) if on}
        admission.observe(found)
    return chosen


def test_estimates_before_anything_is_known():
    admission = make()
    assert admission.estimate(2) == 2 * LAYERS
    assert admission.estimate(DENSE - 1) == (DENSE - 1) * LAYERS, "short requests are dense"
    assert admission.estimate(103) == (FORCED + 25) * LAYERS


def test_an_estimate_is_the_share_of_those_that_run():
    admission = make()
    known = [Running("a", 103), Running("b", 53), Running("short", 5)]
    need = {"a": (FORCED + 10) * LAYERS, "b": (FORCED + 5) * LAYERS, "short": 5 * LAYERS}
    run(admission, known, WINDOW + 1, need)
    assert admission.estimate(203) == (FORCED + 20) * LAYERS
    run(admission, [Running("c", 50)], 1, {"c": 0})
    assert admission.estimate(203) == (FORCED + 20) * LAYERS, "what was learnt is kept"


def test_a_measurement_counts_once_the_window_is_full_and_larger_ones_at_once():
    admission = make()
    request = [Running("a", 43)]
    estimate = admission.estimate(43)
    run(admission, request, 2, {"a": 5})
    assert admission.frames("a") == estimate
    run(admission, request, 1, {"a": estimate + 7})
    assert admission.frames("a") == estimate + 7
    run(admission, request, WINDOW, {"a": 20})
    assert admission.frames("a") == 20


def test_a_request_that_pauses_keeps_its_working_set():
    admission = make(100)
    two = [Running("a", 43), Running("b", 43)]
    run(admission, two, LIMITS.quantum, {"a": 70, "b": 60})
    assert run(admission, two, 1, {"a": 70, "b": 60}) == [False, True]
    assert (admission.frames("a"), admission.pauses) == (70, 1)
    assert not admission.decoding("a")


def test_shared_pages_are_counted_once():
    admission = make(100)
    two = [Running("a", 43), Running("b", 43)]
    chosen = run(admission, two, WINDOW, {"a": 20, "b": 20})
    admission.observe({"a": 20, "b": 20} if all(chosen) else {}, shared=50)
    for _ in range(3 * LIMITS.quantum):
        chosen = admission.decide(two)
        decoding = {r.key: 20 for r, on in zip(two, chosen, strict=True) if on}
        admission.observe(decoding, shared=50)
    assert chosen == [True, True]
    assert admission.snapshot()["working_set"] == 90


def test_prefill_goes_on_up_to_the_overcommitment():
    admission = make(200)
    need = admission.estimate(83)  # 92
    assert admission.admits(83, [])
    assert admission.admits(10_000, []), "alone, anything is admitted"
    assert admission.admits(83, [("a", 83), ("b", 83), ("c", 83)])
    assert not admission.admits(83, [(name, 83) for name in "abcd"])
    assert 4 * need <= 400 < 5 * need


def test_what_runs_is_charged_with_what_it_needs():
    admission = make(200)
    running = [Running("a", 83)]
    run(admission, running, WINDOW + 1, {"a": 390})
    assert not admission.admits(83, [("a", 83)])
    run(admission, running, 2, {"a": 100})
    assert admission.admits(83, [("a", 83)])


def test_requests_that_are_gone_are_forgotten():
    admission = make(100)
    run(admission, [Running("a", 83), Running("b", 83)], 3, {"a": 90, "b": 90})
    admission.decide([Running("b", 83)])
    assert not admission.decoding("a")
    snapshot = admission.snapshot()
    assert (snapshot["decoding"], snapshot["paused"]) == (1, 0)
    assert snapshot["working_set"] == snapshot["working_set_decoding"] == 92


def test_snapshot_counts():
    admission = make(100)
    requests = [Running(name, 83) for name in "abc"]
    for _ in range(LIMITS.quantum + 1):
        admission.decide(requests)
    snapshot = admission.snapshot()
    assert (snapshot["decoding"], snapshot["paused"], snapshot["pauses"]) == (1, 2, 1)
    assert snapshot["working_set"] == 3 * snapshot["working_set_decoding"] == 276
    assert snapshot["usable_frames"] == 100


def test_the_reserve_is_not_planned_with():
    admission = Admission(100, LAYERS, forced_pages=0, dense_pages=1000)
    assert admission.snapshot()["usable_frames"] == 90


@pytest.mark.parametrize("leaves, decoding", [(True, 2), (False, 1)])
def test_one_that_ends_gets_its_last_step(leaves, decoding):
    admission = make(100)
    requests = [Running("a", 83), Running("b", 83, leaves)]
    assert sum(admission.decide(requests)) == decoding


def test_the_plan_grows_while_decode_does_not_wait_and_someone_does():
    admission = make(100)
    two = [Running("a", 83), Running("b", 83)]
    assert admission.decide(two) == [True, False]
    admission.pace(0.2)
    assert admission.stretch == 1
    for _ in range(4):
        admission.pace(0.0)
        chosen = admission.decide(two)
    assert chosen == [True, True] and admission.stretch > 1.8
    reached = admission.stretch
    admission.pace(0.0)
    assert admission.stretch == reached, "nobody waits"
    assert not admission.admits(1000, [("a", 83), ("b", 83)])
    admission.pace(0.0)
    assert admission.stretch > reached, "one was kept in the queue"


def test_the_plan_shrinks_when_decode_waits_and_rests_then():
    admission = make(100)
    two = [Running("a", 83), Running("b", 83)]
    for _ in range(5):
        admission.decide(two)
        admission.pace(0.0)
    reached = admission.stretch
    while admission.stretch > 1:
        admission.pace(0.5)
    assert reached > 1 and admission.stretch == 1
    assert sum(admission.decide(two)) == 1
    admission.pace(0.0)
    assert admission.stretch == 1
    for _ in range(4 * LIMITS.quantum):
        admission.decide(two)
    admission.pace(0.0)
    assert admission.stretch > 1
