"""Sparse window attention: what was attended lately decides what is read next."""

import pytest
import torch

from sgl_psa.attention_sums import AttentionSums
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import Pick
from test.method.cache import PAGE
from test.method.policy_cases import (
    DIM,
    GROUP,
    KV_HEADS,
    Run,
    named_pages,
    pages_read,
    queries,
    restricted,
    settings,
)

BUDGET = 10  # 1 sink, 5 local pages, 4 by their sums
RULE = RequestRule.default(settings("swa"))


def a_run(backend: str, length: int, seed: int) -> Run:
    run = Run(named_pages([length], seed), settings("swa", budget_pages=BUDGET), backend)
    run.cache.seq_lens -= 8  # the last tokens are decoded
    run.ask(0, {"psa_policy": "swa"})
    return run


def decode(run: Run, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One step that makes the request a token longer: output [1, Hq, DIM], pages [Hkv, n]."""
    run.cache.seq_lens += 1
    out, _ = run.step(q)
    return out, pages_read(run.cache, out, 0)


def test_the_pages_read_follow_the_sums(backend) -> None:
    """Against sums kept here, in float64, from the attention over the pages that were read."""
    run = a_run(backend, 50 * PAGE + 3, seed=1)
    window = BUDGET // 2 * PAGE
    sums = torch.zeros(KV_HEADS, 51, dtype=torch.float64)
    for step in range(8):
        q = queries(1, seed=step)
        out, read = decode(run, q)
        n = read.shape[1]
        if step == 0:
            assert bool(read.all()), "the first step stands for the prompt's sums"
        else:
            fixed = {0, *range(n - BUDGET // 2, n)}
            others = [p for p in range(n) if p not in fixed]
            for head in range(KV_HEADS):
                heavy = sorted(others, key=lambda p: -sums[head, p].item())
                assert set(read[head].nonzero().squeeze(1).tolist()) == fixed | set(heavy[:4])
        exact = restricted(run.cache, q, 0, read)
        torch.testing.assert_close(out[0].double(), exact, rtol=0, atol=1e-5)
        weights = exact.view(KV_HEADS, GROUP, DIM).sum(1)[:, :n]
        sums *= 1 - 1 / window
        sums[:, :n] += weights


def plant(run: Run, page: int, q: torch.Tensor, strength: float) -> None:
    """Give one key of the page this logit for the mean of the queries."""
    slot = run.cache.tokens(0)[page * PAGE + 5]
    for head in range(KV_HEADS):
        mean = q[0, head * GROUP : (head + 1) * GROUP].mean(0)
        run.cache.k[slot, head] = mean * strength * DIM**0.5 / (mean @ mean)


def test_a_heavy_hitter_stays(backend) -> None:
    run = a_run(backend, 50 * PAGE, seed=2)
    hot = queries(1, seed=3).mean(1, keepdim=True).expand(-1, KV_HEADS * GROUP, -1).contiguous()
    plant(run, 20, hot, 12.0)
    decode(run, hot)
    for _ in range(4):
        _, read = decode(run, hot)
        assert bool(read[:, 20].all())
        assert read.sum(1).tolist() == [BUDGET] * KV_HEADS
    sums = run.wrapper._selector.sums.read(0, run.table.rows(torch.tensor([0])).picks, 50)
    assert sums[0].argmax(1).tolist() == [20] * KV_HEADS


def test_what_is_not_read_gains_nothing(backend) -> None:
    """A page that becomes hot after the first step is not found: the method's known weakness."""
    run = a_run(backend, 50 * PAGE, seed=4)
    q = queries(1, seed=5).mean(1, keepdim=True).expand(-1, KV_HEADS * GROUP, -1).contiguous()
    _, first = decode(run, q)
    _, read = decode(run, q)
    unread = int((~read.any(0)).nonzero()[0])
    plant(run, unread, q, 12.0)
    _, read = decode(run, q)
    assert bool(first[:, unread].all()) and not bool(read[:, unread].any())


@pytest.mark.parametrize("jump", [-5, 0, 2])
def test_a_length_that_is_not_the_next_begins_anew(backend, jump) -> None:
    run = a_run(backend, 50 * PAGE, seed=6)
    decode(run, queries(1))
    decode(run, queries(1))
    run.cache.seq_lens += jump - 1
    _, read = decode(run, queries(1))
    assert bool(read.all())
    assert not bool(decode(run, queries(1))[1].all())


def test_another_request_in_the_slot_begins_anew_at_any_length(backend) -> None:
    run = a_run(backend, 50 * PAGE, seed=7)
    decode(run, queries(1))
    assert not bool(decode(run, queries(1))[1].all())
    run.ask(0, {"psa_policy": "swa"})
    assert bool(decode(run, queries(1))[1].all())


def test_sums_decay_and_grow_with_the_context() -> None:
    sums = AttentionSums(2, 1, torch.device("cpu"))
    picks = [Pick(0, 5, RULE, 1)]
    assert sums.begin_step(picks, [100], [7]).tolist() == [True]
    weights = torch.arange(7.0)[None, None]
    sums.add(1, picks, weights, [4])
    assert sums.begin_step(picks, [101], [200]).tolist() == [False]
    sums.add(1, picks, torch.nn.functional.pad(weights, (0, 193), value=1.0), [4])
    read = sums.read(1, picks, 200)[0, 0]
    assert read[:7].tolist() == [1.75 * i for i in range(7)]
    assert read[7:].tolist() == [1.0] * 193
    assert sums.read(0, picks, 300).sum() == 0


def test_rows_keep_to_their_slots() -> None:
    sums = AttentionSums(1, 1, torch.device("cpu"))
    one, two = Pick(0, 3, RULE, 0), Pick(1, 8, RULE, 0)
    sums.begin_step([one, two], [32, 64], [2, 4])
    sums.add(0, [one, two], torch.tensor([[[1.0, 2, 0, 0]], [[3.0, 4, 5, 6]]]), [9, 9])
    assert sums.begin_step([two], [65], [5]).tolist() == [False]
    assert sums.read(0, [two._replace(row=0)], 4).tolist() == [[[3, 4, 5, 6]]]
    assert sums.begin_step([one], [33], [3]).tolist() == [False]
    assert sums.read(0, [one], 2).tolist() == [[[1, 2]]]
