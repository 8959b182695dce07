"""What holds for every selection, over random caches, lengths, forced pages and knobs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_psa.policies import POLICIES
from test.method import policy_cases as cases
from test.method.cache import PAGE
from test.method.conftest import AVAILABLE

BACKEND = "cpu" if AVAILABLE else "torch"
FEW = settings(max_examples=25, deadline=None)

seeds = st.integers(0, 10**6)
lengths = st.lists(st.integers(1, 50 * PAGE), min_size=1, max_size=3)
knobs = st.fixed_dictionaries(
    {
        "sink_pages": st.integers(0, 3),
        "recent_pages": st.integers(1, 4),
        "group_pages": st.integers(1, 5),
        "budget_pages": st.integers(7, 30),
        "coverage": st.floats(0.05, 0.999),
        "delta": st.floats(1e-4, 0.9),
    }
)


@pytest.mark.parametrize("policy", POLICIES)
@FEW
@given(seed=seeds, lens=lengths, knobs=knobs, stale=st.booleans())
def test_a_selection_is_a_set_with_the_forced_pages(policy, seed, lens, knobs, stale) -> None:
    """The output is attention over the pages read, each once; forced and stale pages are read."""
    config = cases.settings(policy, **knobs)
    cache = cases.named_pages(lens, seed)
    run, q = cases.Run(cache, config, BACKEND), cases.queries(len(lens), seed)
    if stale:
        run.scorer.invalidate_slots(cache.tokens(0)[:1])
    out, step = run.step(q)
    for row, length in enumerate(lens):
        n = math.ceil(length / PAGE)
        read = cases.pages_read(cache, out, row)
        exact = cases.restricted(cache, q, row, read)
        torch.testing.assert_close(out[row].double(), exact, rtol=0, atol=1e-5)
        assert step.row(row).pages_attended == int(read.sum())
        forced = {*range(min(config.sink_pages, n)), *range(max(n - config.recent_pages, 0), n)}
        if stale and row == 0 and POLICIES[policy].reads_scores:
            forced.add(0)
        assert bool(read[:, sorted(forced)].all())
        if POLICIES[policy].limit == "budget" and policy != "swa" and not (stale and row == 0):
            assert read.sum(1).tolist() == [min(n, config.budget_pages)] * cases.KV_HEADS


def bytes_read(run: cases.Run, q: torch.Tensor, params: dict) -> int:
    run.ask(0, params)
    return run.step(q)[1].row(0).bytes_read


@pytest.mark.parametrize("policy", ["top_p", "oracle_top_p"])
@FEW
@given(seed=seeds, knobs=knobs, coverages=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5))
def test_more_coverage_never_reads_less(policy, seed, knobs, coverages) -> None:
    cache = cases.named_pages([50 * PAGE], seed)
    run = cases.Run(cache, cases.settings(policy, **knobs), BACKEND)
    q = cases.queries(1, seed)
    read = [bytes_read(run, q, {"psa_coverage": p}) for p in sorted(set(coverages) - {1.0})]
    assert read == sorted(read)
    run.ask(0, {"psa_coverage": 1.0})
    counts = run.step(q)[1].row(0)
    assert counts.bytes_read == counts.bytes_dense


@FEW
@given(seed=seeds, knobs=knobs, deltas=st.lists(st.floats(1e-5, 0.99), min_size=2, max_size=5))
def test_a_larger_delta_never_reads_more(seed, knobs, deltas) -> None:
    """With one query head a KV head: several can pull in different directions."""
    cache = cases.named_pages([50 * PAGE], seed)
    run = cases.Run(cache, cases.settings("oracle_marginal", **knobs), BACKEND)
    q = cases.queries(1, seed, heads=cases.KV_HEADS)
    read = [bytes_read(run, q, {"psa_delta": d}) for d in sorted(set(deltas))]
    assert read == sorted(read, reverse=True)


@FEW
@given(seed=seeds, budgets=st.lists(st.integers(3, 60), min_size=2, max_size=4, unique=True))
def test_a_larger_budget_reads_a_superset(seed, budgets) -> None:
    cache = cases.named_pages([50 * PAGE], seed)
    run, q = cases.Run(cache, cases.settings("topk"), BACKEND), cases.queries(1, seed)
    last = None
    for budget in sorted(budgets):
        run.ask(0, {"psa_budget_pages": budget})
        read = cases.pages_read(cache, run.step(q)[0], 0)
        assert last is None or bool((read | ~last).all())
        last = read
