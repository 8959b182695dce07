"""Every policy of the table: which pages it reads, and that the output is attention over them."""

import pytest
import torch

from sgl_psa.config import PSAConfig
from sgl_psa.policies import POLICIES
from test.method.cache import PAGE, dense
from test.method.policy_cases import (
    DIM,
    KV_HEADS,
    SCALE,
    Run,
    named_pages,
    pages_read,
    queries,
    restricted,
    settings,
)

LENGTHS = [60 * PAGE + 7, 1, 33 * PAGE, 9 * PAGE - 1, 3 * PAGE]
BUDGET_POLICIES = [name for name, policy in POLICIES.items() if policy.limit == "budget"]
TOP_P = ["top_p", "oracle_top_p"]


def count(length: int) -> int:
    return -(-length // PAGE)


def forced(config: PSAConfig, pages: int) -> set[int]:
    return {p for p in range(pages) if p < config.sink_pages or p >= pages - config.recent_pages}


def sets(read: torch.Tensor) -> list[set[int]]:
    return [set(head.nonzero().squeeze(1).tolist()) for head in read]


@pytest.mark.parametrize("policy", POLICIES)
def test_output_is_dense_attention_over_the_pages_read(backend, policy) -> None:
    # One level, so that every page scored costs the same.
    scorer = {"psa": "sketch", "top_p": "sketch"}.get(policy, "auto")
    config = settings(policy, coverage=0.8, delta=0.05, scorer=scorer)
    cache = named_pages(LENGTHS, seed=1)
    run, q = Run(cache, config, backend), queries(len(LENGTHS))
    out, step = run.step(q)
    for row, length in enumerate(LENGTHS):
        read = pages_read(cache, out, row)
        exact = restricted(cache, q, row, read)
        torch.testing.assert_close(out[row].double(), exact, rtol=0, atol=1e-5)
        assert all(forced(config, count(length)) <= mine for mine in sets(read))
        counts = step.row(row)
        assert counts.pages_attended == int(read.sum())
        tokens = (read.sum() * PAGE - read[:, -1].sum() * (-length % PAGE)).item()
        scored = KV_HEADS * count(length)
        scored *= run.scorer.bytes_per_page if POLICIES[policy].reads_scores else 0
        assert counts.bytes_read == tokens * 2 * DIM * 4 + scored
    if policy not in ("dense", "swa"):
        assert step.row(0).pages_attended < 0.75 * step.row(0).pages_total


def expected_topk(estimate, config) -> set[int]:
    """Best pages by the largest share among the heads of ``estimate`` float64 [G, n]."""
    n = estimate.shape[1]
    chosen = forced(config, n)
    share = estimate.softmax(-1).amax(0).tolist()
    for page in sorted(range(n), key=lambda p: -share[p]):
        if len(chosen) < config.budget_pages:
            chosen.add(page)
    return chosen


def expected_top_p(estimate, config) -> set[int]:
    """Union of the heads' smallest sets that reach the coverage."""
    n = estimate.shape[1]
    union = forced(config, n)
    for head in estimate.softmax(-1).tolist():
        chosen = forced(config, n)
        covered = sum(head[p] for p in chosen)
        for page in sorted(set(range(n)) - chosen, key=lambda p: -head[p]):
            if covered >= config.coverage:
                break
            chosen.add(page)
            covered += head[page]
        union |= chosen
    return union


def expected_window(estimate, config) -> set[int]:
    n = estimate.shape[1]
    last = config.budget_pages - config.sink_pages
    return set(range(min(config.sink_pages, n))) | set(range(max(0, n - last), n))


EXPECTED = {
    "topk": expected_topk,
    "window": expected_window,
    "top_p": expected_top_p,
    "oracle_top_p": expected_top_p,
}


@pytest.mark.parametrize("policy", EXPECTED)
@pytest.mark.parametrize("knobs", [{}, {"budget_pages": 20, "coverage": 0.6, "sink_pages": 0}])
def test_the_pages_read_are_the_policys(backend, policy, knobs) -> None:
    config = settings(policy, **{"coverage": 0.9, **knobs})
    cache = named_pages(LENGTHS, seed=2)
    run, q = Run(cache, config, backend), queries(len(LENGTHS), seed=3)
    estimates = run.estimates(q).double()
    out, _ = run.step(q)
    for row, length in enumerate(LENGTHS):
        mine = sets(pages_read(cache, out, row))
        for head, chosen in enumerate(mine):
            estimate = estimates[row, head, :, : count(length)]
            assert chosen == EXPECTED[policy](estimate, config)


@pytest.mark.parametrize("policy", BUDGET_POLICIES)
def test_the_budget_is_what_a_head_reads(backend, policy) -> None:
    cache = named_pages([60 * PAGE + 7] * 3 + [5 * PAGE], seed=4)
    run, q = Run(cache, settings(policy), backend), queries(4)
    for row, budget in enumerate((3, 11, 1024)):
        run.ask(row, {"psa_budget_pages": budget})
    cache.seq_lens -= 1
    run.step(q)  # a request's first step may read more: swa has no sums before it
    cache.seq_lens += 1
    _, step = run.step(q)
    shares = [step.row(row).pages_attended / KV_HEADS for row in range(4)]
    assert shares == [3, 11, 61, 5]


@pytest.mark.parametrize("policy", [*TOP_P, "oracle_marginal", "psa"])
def test_asking_for_all_is_the_dense_pass(backend, policy) -> None:
    config = settings(policy, coverage=1.0, delta=0.0)
    cache = named_pages(LENGTHS, seed=5)
    q = queries(len(LENGTHS))
    out, step = Run(cache, config, backend).step(q)
    torch.testing.assert_close(out.double(), dense(cache, q, SCALE), rtol=0, atol=1e-5)
    assert step.sparse_rows == 0 and step.layer(0).bytes_read == step.layer(0).bytes_dense


@pytest.mark.parametrize("policy", TOP_P)
def test_top_p_reaches_dense_through_the_selection(backend, policy) -> None:
    config = settings(policy, coverage=1 - 1e-12)
    cache = named_pages(LENGTHS, seed=6)
    q = queries(len(LENGTHS))
    out, step = Run(cache, config, backend).step(q)
    torch.testing.assert_close(out.double(), dense(cache, q, SCALE), rtol=0, atol=1e-5)
    assert step.sparse_rows == len(LENGTHS)


def test_the_oracle_knows_its_coverage(backend) -> None:
    """Reported coverage, computed from the estimates, against the true one in float64."""
    cache = named_pages([60 * PAGE], seed=7)
    q = queries(1)
    out, step = Run(cache, settings("oracle_top_p", coverage=0.7), backend).step(q)
    read = pages_read(cache, out, 0)
    everything = restricted(cache, q, 0, torch.ones_like(read)).view(KV_HEADS, -1, DIM)
    covered = (everything[..., : read.shape[1]] * read[:, None]).sum(-1).amin(1)
    counts = step.row(0)
    assert counts.estimates == counts.visits == KV_HEADS
    assert counts.coverage == pytest.approx(float(covered.sum()), abs=1e-4)
    assert bool((covered >= 0.7).all())


@pytest.mark.parametrize("policy", ["window", "swa"])
def test_without_scores_no_coverage_is_claimed(backend, policy) -> None:
    cache = named_pages([60 * PAGE], seed=8)
    _, step = Run(cache, settings(policy), backend).step(queries(1))
    counts = step.row(0)
    assert counts.visits == KV_HEADS and counts.estimates == 0
    assert counts.as_dict()["mean_coverage"] is None


def test_pages_without_a_summary_are_read_besides(backend) -> None:
    cache = named_pages([60 * PAGE], seed=9)
    run, q = Run(cache, settings("topk"), backend), queries(1)
    run.scorer.invalidate_slots(cache.tokens(0)[20 * PAGE : 24 * PAGE])
    out, step = run.step(q)
    read = pages_read(cache, out, 0)
    assert bool(read[:, 20:24].all()) and read.sum(1).tolist() == [9, 9]
    assert step.row(0).stale_pages == 4 * KV_HEADS


def test_window_ignores_the_keys(backend) -> None:
    cache = named_pages([60 * PAGE], seed=10)
    run = Run(cache, settings("window", sink_pages=2), backend)
    run.scorer.invalidate_all()
    for seed in range(3):
        out, step = run.step(queries(1, seed))
        assert sets(pages_read(cache, out, 0)) == [{0, 1, *range(53, 60)}] * KV_HEADS
    assert step.row(0).bytes_read == KV_HEADS * 9 * PAGE * 2 * DIM * 4


SUITED = [n for n, p in POLICIES.items() if not p.scorers or "sketch" in p.scorers]


def test_policies_of_one_batch_do_not_touch_each_other(backend) -> None:
    asked = [{"psa_policy": name} for name in SUITED for _ in range(2)]
    cache = named_pages([(60 - i) * PAGE + i for i in range(len(asked))], seed=11)
    config, q = settings("psa", scorer="sketch", delta=0.02), queries(len(asked))
    together, alone = Run(cache, config, backend), Run(cache, config, backend)
    for row, params in enumerate(asked):
        together.ask(row, params)
        alone.ask(row, params)
    cache.seq_lens -= 2
    for _ in range(3):
        out, step = together.step(q)
        for row in range(len(asked)):
            single, stats = alone.step(q, [row])
            torch.testing.assert_close(single[0], out[row], rtol=0, atol=2e-6)
            mine, other = stats.row(0), step.row(row)
            assert (mine.pages_attended, mine.bytes_read) == (
                other.pages_attended,
                other.bytes_read,
            )
        cache.seq_lens += 1


def test_batches_without_choosing_policies_run_no_selection(monkeypatch) -> None:
    cache = named_pages([60 * PAGE] * 2, seed=12)
    run = Run(cache, settings("psa"), "torch")
    run.ask(1, {"psa_policy": "dense"})
    monkeypatch.setattr(run.wrapper._selector, "choose", None)
    monkeypatch.setattr(run.wrapper._selector, "account", None)
    assert run.table.rows(torch.arange(2)).picks == ()
    run.step(queries(2))


@pytest.mark.parametrize("policy", ["window", "swa"])
def test_policies_without_scores_do_not_score(policy, monkeypatch) -> None:
    run = Run(named_pages([60 * PAGE], seed=13), settings(policy), "torch")
    monkeypatch.setattr(run.scorer, "score", None)
    run.step(queries(1))


def test_a_scorer_may_count_its_own_bytes(backend, monkeypatch) -> None:
    cache = named_pages([60 * PAGE] * 3, seed=14)
    run = Run(cache, settings("psa", scorer="sketch"), backend)
    run.ask(1, {"psa_policy": "window"})
    run.ask(2, {"psa_policy": "topk"})
    read = torch.tensor([[1000.0, 2000.0], [0.0, 0.0], [1000.0, 2000.0]])
    monkeypatch.setattr(run.scorer, "read_bytes", lambda layer, step: read)
    _, step = run.step(queries(3))
    token = 2 * DIM * 4 * PAGE
    scored = [step.row(r).bytes_read - step.row(r).pages_attended * token for r in range(3)]
    assert scored == [3000, 0, 3000]
