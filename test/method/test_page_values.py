"""Value means and norms: purity, tail compensation, the stop rule ``change``, bytes, refusals."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_psa.config import ConfigError, PSAConfig, ScorerName
from sgl_psa.page_values import PageValues
from sgl_psa.policies import POLICIES, legal
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import SCORERS, CacheShape, make_scorer
from sgl_psa.summaries import Summaries, make_summaries
from sgl_psa.wrapper import PSADecodeWrapper
from test.method import policy_cases as cases
from test.method.cache import PAGE, Cache, decode, dense, make_cache, make_wrapper

KV_HEADS, GROUP, DIM = 2, 3, 64
SCALE = DIM**-0.5
LENGTHS = [40 * PAGE + 7, 3 * PAGE, 1]
TAIL = PSAConfig(min_context=0, sink_pages=1, recent_pages=1, group_pages=2, compensate=True)
FITTING = [name for name in SCORERS if not legal.is_page_summary(name)]


def queries(rows: int, seed: int = 7) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, KV_HEADS * GROUP, DIM, generator=rng)


def constant_pages(lengths: list[int], seed: int, size: float = 1.0) -> Cache:
    """All values of a page are equal, and numbers of bfloat16; one page in eight is ``size`` times
    as long."""
    cache = make_cache(lengths, KV_HEADS, DIM, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    for row, length in enumerate(lengths):
        pages = -(-length // PAGE)
        values = torch.randn(pages, KV_HEADS, DIM, generator=rng)
        values[::8] *= size
        values = values.bfloat16().float().repeat_interleave(PAGE, 0)
        cache.v[cache.tokens(row)] = values[:length]
    return cache


def summaries_of(cache: Cache, backend: str) -> Summaries:
    shape = CacheShape(1, cache.num_pages, PAGE, *cache.k.shape[1:], torch.device("cpu"))
    made = make_summaries(TAIL, shape, backend, norms=True)
    for row in range(len(cache.seq_lens)):
        made.on_write(0, cache.tokens(row), cache.k, cache.v)
    return made


def test_means_and_norms_are_those_of_the_values(backend) -> None:
    cache = make_cache(LENGTHS, KV_HEADS, DIM, seed=1)
    values = summaries_of(cache, backend).values
    assert values.means is not None and values.norms is not None
    for row in range(len(LENGTHS)):
        slots = cache.tokens(row)
        for page, mine in enumerate(cache.v[slots].double().split(PAGE)):
            place = int(slots[page * PAGE]) // PAGE
            # Rounding to bfloat16, of a sum of float32.
            torch.testing.assert_close(
                values.means.means[0, place, :, 0].double(), mine.mean(0), rtol=2**-8, atol=1e-6
            )
            longest = mine.norm(dim=-1).amax(0)
            torch.testing.assert_close(values.norms.norms[0, place].double(), longest)


POOL = 5  # pages
WRITES = st.lists(
    st.tuples(st.integers(0, POOL - 1), st.integers(1, PAGE), st.booleans()),
    min_size=1,
    max_size=10,
)


@settings(max_examples=25, deadline=None)
@given(writes=WRITES, seed=st.integers(0, 2**31), gap=st.booleans())
def test_history_does_not_matter(writes, seed: int, gap: bool) -> None:
    """Append, chunk, evict, re-use, rows behind a gap: the state is that of a fresh one."""
    rng = torch.Generator().manual_seed(seed)
    shape = CacheShape(1, POOL + 1, PAGE, KV_HEADS, DIM, torch.device("cpu"))
    made = make_summaries(TAIL, shape, "torch", norms=True)
    k = torch.full(((POOL + 1) * PAGE, KV_HEADS, DIM), float("nan"), dtype=torch.bfloat16)
    v, fill = k.clone(), [0] * POOL
    if gap:
        behind = torch.arange(POOL * PAGE + 3, POOL * PAGE + 6)
        made.on_write(0, behind, k, v)
        assert made.scorer.watermark[0, POOL] == 0
    for page, tokens, evict in writes:
        if evict:
            made.invalidate_slots(torch.tensor([page * PAGE]))
        begin = 0 if evict or fill[page] == PAGE else fill[page]
        end = min(PAGE, begin + tokens)
        slots = torch.arange(page * PAGE + begin, page * PAGE + end)
        for cache in (k, v):
            cache[slots] = torch.randn(len(slots), KV_HEADS, DIM, generator=rng).bfloat16()
        made.on_write(0, slots, k, v)
        fill[page] = end
    fresh = make_summaries(TAIL, shape, "torch", norms=True)
    used = [page for page in range(POOL) if fill[page]]
    for page in used:
        fresh.on_write(0, torch.arange(fill[page]) + page * PAGE, k, v)
    assert made.scorer.watermark[0, used].tolist() == [fill[page] for page in used]
    for ours, theirs in zip(made.values.states, fresh.values.states, strict=True):
        got, want = (
            (state.means if hasattr(state, "means") else state.norms)[0, used]
            for state in (ours, theirs)
        )
        assert torch.isfinite(got).all() and torch.equal(got, want)


def run(cache: Cache, config: PSAConfig, backend: str, q: torch.Tensor, params=None):
    wrapper, _ = make_wrapper(cache, config, backend)
    out, step = decode(wrapper, cache, q, SCALE, params)
    assert step is not None
    return out, step


@pytest.mark.parametrize("policy", ["psa", "topk", "top_p", "oracle_marginal", "oracle_top_p"])
def test_true_masses_and_constant_pages_give_the_dense_output(backend, policy) -> None:
    cache, q = constant_pages(LENGTHS, seed=2), queries(3)
    config = cases.settings(
        policy, scorer="exact", compensate=True, delta=0.2, coverage=0.6, budget_pages=8
    )
    out, step = run(cache, config, backend, q)
    exact = dense(cache, q, SCALE)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-5)
    plain, _ = run(cache, dataclasses.replace(config, compensate=False), backend, q)
    assert (plain.double() - exact).abs().max() > 0.05
    assert step.row(0).pages_attended < 0.8 * step.row(0).pages_total


@pytest.mark.parametrize("scorer", FITTING)
def test_compensation_comes_closer_with_every_scorer_that_it_is_for(backend, scorer) -> None:
    cache, q = constant_pages(LENGTHS, seed=3), queries(3)
    config = dataclasses.replace(TAIL, scorer=scorer, sketch_bits=4, delta=0.1)
    out, _ = run(cache, config, backend, q)
    plain, _ = run(cache, dataclasses.replace(config, compensate=False), backend, q)
    exact = dense(cache, q, SCALE)
    assert (out.double() - exact).norm() < 0.5 * (plain.double() - exact).norm()


@pytest.mark.parametrize("stop", ["marginal", "coverage", "change"])
def test_asking_for_everything_is_dense_bit_for_bit(backend, stop) -> None:
    cache, q = make_cache(LENGTHS, KV_HEADS, DIM, seed=4), queries(3)
    config = dataclasses.replace(TAIL, stop=stop, coverage=1.0, delta=0.0)
    out, step = run(cache, config, backend, q)
    exact, _ = run(cache, PSAConfig(policy="dense"), backend, q)
    assert torch.equal(out, exact)
    assert step.row(0).bytes_read == step.row(0).bytes_dense


def test_rows_without_scores_are_not_compensated(backend) -> None:
    cache, q = make_cache([40 * PAGE] * 3, KV_HEADS, DIM, seed=5), queries(3)
    params = [{"psa_policy": "window", "psa_budget_pages": 5}, {"psa_policy": "dense"}, {}]
    out, step = run(cache, TAIL, backend, q, params)
    plain, other = run(cache, dataclasses.replace(TAIL, compensate=False), backend, q, params)
    assert torch.equal(out[:2], plain[:2]) and not torch.equal(out[2], plain[2])
    assert [step.row(i).bytes_read for i in (0, 1)] == [other.row(i).bytes_read for i in (0, 1)]


def test_the_means_read_count_as_bytes_and_coverage_stays(backend) -> None:
    cache, q = make_cache([40 * PAGE + 3], KV_HEADS, DIM, seed=6), queries(1)
    for policy in ("psa", "topk", "top_p"):
        config = cases.settings(policy, scorer="sketch", compensate=True, coverage=0.7)
        counts = run(cache, config, backend, q)[1].row(0)
        plain = run(cache, dataclasses.replace(config, compensate=False), backend, q)[1].row(0)
        left = counts.pages_total - counts.pages_attended
        assert left > 0
        assert counts.bytes_read == plain.bytes_read + left * 2 * DIM
        assert counts.coverage == plain.coverage


def test_pages_without_a_summary_are_attended_and_their_means_not_read(backend) -> None:
    cache, q = make_cache([40 * PAGE], KV_HEADS, DIM, seed=7), queries(1)
    made = summaries_of(cache, backend)
    wrapper = PSADecodeWrapper(
        TAIL, made.scorer, backend=backend, kv_element_bytes=4, values=made.values
    )
    slots = cache.tokens(0)
    made.invalidate_slots(slots[10 * PAGE : 12 * PAGE])
    assert made.values.means is not None
    stale = torch.div(slots[10 * PAGE : 12 * PAGE], PAGE, rounding_mode="floor")
    made.values.means.means[0, stale] = float("nan")
    out, step = decode(wrapper, cache, q, SCALE)
    assert step is not None and step.row(0).stale_pages == 2 * KV_HEADS
    assert torch.isfinite(out).all()


def test_change_prefers_long_values_and_equals_marginal_when_they_are_alike(backend) -> None:
    """Pages by equal masses: only the lengths of their values tell them apart."""
    cache = cases.named_pages([60 * PAGE], seed=8)
    cache.k[cache.tokens(0)] = 0.0
    q = cases.queries(1)
    config = cases.settings("psa", scorer="exact", stop="change", delta=0.3)

    def read() -> torch.Tensor:
        return cases.pages_read(cache, cases.Run(cache, config, backend).step(q)[0], 0)

    # Three pages are attended at first, so an unread one has a third of their mass.
    alike = cases.pages_read(
        cache, cases.Run(cache, dataclasses.replace(config, stop="marginal"), backend).step(q)[0], 0
    )
    assert torch.equal(read(), alike) and bool(alike[:, 1].all())
    config = dataclasses.replace(config, delta=0.5)
    assert read().sum(1).tolist() == [3] * KV_HEADS
    slots = cache.tokens(0)
    cache.v[slots[20 * PAGE : 22 * PAGE]] *= 5.0
    assert [set(h.nonzero()[:, 0].tolist()) for h in read()] == [{0, 20, 21, 58, 59}] * KV_HEADS


def test_change_reports_the_coverage_of_the_masses_and_counts_the_norms(backend) -> None:
    cache, q = constant_pages([40 * PAGE], seed=9, size=6.0), queries(1)
    config = cases.settings("psa", scorer="exact", stop="change", delta=0.05)
    wrapper, _ = make_wrapper(cache, config, backend)
    slots = torch.arange(1)
    rows = RuleTable(config, 1, "cpu").rows(slots)
    wrapper.plan(cache.req_to_token, slots, cache.seq_lens, rows)
    _, lse = wrapper.run(0, q, cache.k, cache.v, SCALE)
    step = wrapper.finish()
    assert step is not None
    counts = step.row(0)
    whole = cases.true_log_mass(cache, q, 0).logsumexp(-1)
    covered = (lse[0].view(KV_HEADS, GROUP).double() - whole).exp().amin(1)
    assert counts.coverage == pytest.approx(float(covered.sum()), abs=1e-5)
    tokens = counts.pages_attended * PAGE
    assert counts.bytes_read == tokens * 2 * DIM * 4 + counts.pages_total * 4
    assert counts.pages_attended < counts.pages_total


def test_values_of_zero_and_short_norms_do_no_harm(backend) -> None:
    cache, q = make_cache([30 * PAGE], KV_HEADS, DIM, seed=10), queries(1)
    config = cases.settings("psa", stop="change", delta=0.1)
    slots = cache.tokens(0)
    cache.v[slots[: 10 * PAGE]] = 0.0
    out, step = run(cache, config, backend, q)
    assert torch.isfinite(out).all() and step.row(0).stale_pages == 0
    cache.v[slots] = 0.0
    out, step = run(cache, config, backend, q)
    assert not out.any() and step.row(0).pages_attended < step.row(0).pages_total


def test_what_is_needed_and_missing_is_named() -> None:
    cache = make_cache([40 * PAGE], KV_HEADS, DIM, seed=11)
    shape = CacheShape(1, cache.num_pages, PAGE, KV_HEADS, DIM, torch.device("cpu"))
    scorer = make_scorer(TAIL, shape, "torch")
    with pytest.raises(ValueError, match="needs the cache's value means"):
        PSADecodeWrapper(TAIL, scorer, backend="torch", kv_element_bytes=4)
    change = PSAConfig(stop="change", min_context=0)
    wrapper = PSADecodeWrapper(
        change, scorer, backend="torch", kv_element_bytes=4, values=PageValues(None, None)
    )
    with pytest.raises(ValueError, match="needs the cache's value norms"):
        decode(wrapper, cache, queries(1), SCALE)


def test_state_is_kept_only_where_it_is_needed() -> None:
    shape = CacheShape(2, 7, PAGE, KV_HEADS, DIM, torch.device("cpu"))

    def extra(**fields) -> int:
        made = make_summaries(PSAConfig(**fields), shape, "torch")
        assert made.size_bytes() == made.scorer.size_bytes() + made.values.size_bytes()
        return made.values.size_bytes()

    pages = 2 * 7 * KV_HEADS
    assert extra() == 0
    assert extra(compensate=True) == pages * 2 * DIM
    assert extra(stop="change") == pages * 4
    assert extra(stop="change", compensate=True) == pages * (2 * DIM + 4)


@pytest.mark.parametrize("scorer", SCORERS)
def test_compensation_needs_more_than_page_summaries(scorer) -> None:
    name = typing.cast(ScorerName, scorer)
    if scorer in FITTING:
        assert PSAConfig(scorer=name, compensate=True).compensate
        return
    with pytest.raises(ConfigError, match=rf"compensate=true: scorer {scorer} .*sketch, rotated"):
        PSAConfig(scorer=name, compensate=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_compensation_needs_scores(policy) -> None:
    config = dict(policy=policy, scorer="exact", compensate=True)
    if POLICIES[policy].reads_scores:
        assert PSAConfig(**config).compensate
        return
    with pytest.raises(ConfigError, match=f"policy {policy} reads no scores.*set policy to psa"):
        PSAConfig(**config)


def test_a_request_may_ask_for_change_where_norms_are_kept() -> None:
    asked = {"psa_stop": "change", "psa_delta": 0.2}
    with pytest.raises(ConfigError, match=r"psa_stop='change': .*--psa-stop change"):
        RequestRule.parse(asked, PSAConfig())
    config = PSAConfig(stop="change")
    rule = RequestRule.parse({"psa_delta": 0.2}, config)
    assert (rule.limit, rule.knob, rule.is_dense) == ("change", 0.2, False)
    assert RequestRule.parse(asked, config) == rule
    marginal = RequestRule.parse({**asked, "psa_stop": "marginal"}, config)
    assert marginal.limit == "marginal" and marginal.namespace(config) != rule.namespace(config)
    assert RequestRule.parse({"psa_delta": 0}, config).is_dense
    oracle = PSAConfig(stop="change", scorer="exact")
    asked = {"psa_policy": "oracle_marginal", "psa_delta": 0.2}
    assert RequestRule.parse(asked, oracle).limit == "marginal"
    row = POLICIES["psa"].row(rule, config)
    assert row == POLICIES["psa"].row(marginal, config) and row.threshold == math.log(0.2)


CAREFUL = {"conservative": True}, {"coverage": 1.0}, {"stop": "marginal"}, {"scorer": "sketch"}


@pytest.mark.parametrize("change", [{}, *CAREFUL])
@pytest.mark.parametrize("scorer", [name for name in SCORERS if name not in FITTING])
def test_page_summaries_under_the_coverage_rule_are_cautioned(scorer, change) -> None:
    config = PSAConfig(**{"stop": "coverage", "scorer": scorer, **change})
    caution = legal.caution(config)
    assert (caution is None) == bool(change)
    words = (f"scorer {scorer}", "--psa-conservative")
    assert caution is None or all(word in caution for word in words)
