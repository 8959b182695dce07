"""plan/run against dense attention in float64, over the tables of policies, rules and scorers."""

import dataclasses

import numpy
import pytest
import torch

from sgl_psa.config import PSAConfig
from sgl_psa.rule import RequestRule
from sgl_psa.rule_table import RuleTable
from sgl_psa.scorers import SCORERS
from sgl_psa.stats import COVERAGE, NUM_COLUMNS, ByteCost, ReadCounts, _fill
from sgl_psa.stop import STOP_RULES
from test.method.cache import PAGE, decode, dense, make_cache, make_wrapper

SMALL = PSAConfig(min_context=0, sink_pages=1, recent_pages=1, group_pages=2)
LENGTHS = [1, PAGE, PAGE + 1, 5 * PAGE - 3, 40 * PAGE + 7]
KV_HEADS, GROUP, DIM = 2, 3, 32
SCALE = DIM**-0.5


def queries(rows: int, seed: int = 7, kv_heads: int = KV_HEADS) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, kv_heads * GROUP, DIM, generator=rng)


@pytest.mark.parametrize("policy", ["psa", "dense"])
@pytest.mark.parametrize("stop", STOP_RULES)
@pytest.mark.parametrize("scorer", SCORERS)
def test_asking_for_everything_is_dense(backend, policy, stop, scorer) -> None:
    config = dataclasses.replace(
        SMALL, policy=policy, stop=stop, scorer=scorer, coverage=1.0, delta=0.0
    )
    cache = make_cache(LENGTHS, KV_HEADS, DIM, seed=1)
    q = queries(len(LENGTHS))
    wrapper, _ = make_wrapper(cache, config, backend)
    out, step = decode(wrapper, cache, q, SCALE)
    torch.testing.assert_close(out.double(), dense(cache, q, SCALE), rtol=0, atol=2e-6)
    assert step.sparse_rows == 0
    assert step.layer(0).bytes_read == step.layer(0).bytes_dense > 0


@pytest.mark.parametrize("stop", STOP_RULES)
@pytest.mark.parametrize("scorer", SCORERS)
def test_the_loop_itself_reaches_dense_when_it_may_leave_nothing(backend, stop, scorer) -> None:
    """Through scoring, ordering and group-wise merging, not through the dense shortcut."""
    config = dataclasses.replace(SMALL, stop=stop, scorer=scorer, coverage=1 - 1e-12, delta=1e-12)
    cache = make_cache(LENGTHS, KV_HEADS, DIM, seed=2)
    q = queries(len(LENGTHS))
    wrapper, _ = make_wrapper(cache, config, backend)
    out, step = decode(wrapper, cache, q, SCALE)
    torch.testing.assert_close(out.double(), dense(cache, q, SCALE), rtol=0, atol=2e-6)
    assert step.sparse_rows == len(LENGTHS)
    assert step.row(4).rounds > 2 * KV_HEADS
    assert step.row(4).pages_attended == step.row(4).pages_total == KV_HEADS * 41


def planted(seed: int, length: int, hot_pages: list[int]):
    """One request whose attention mass sits in ``hot_pages``, one hot key in each."""
    cache = make_cache([length], 1, DIM, seed, sharp=0.3)
    q = queries(1, seed + 100, kv_heads=1)
    direction = q[0].mean(0)
    slots = cache.tokens(0)
    for page in hot_pages:
        cache.k[slots[page * PAGE + 5], 0] = direction * 120 / (direction @ direction)
    return cache, q


#: A mean dilutes one key among sixteen: these scorers do not see a spike.
BLIND_TO_SPIKES = {"mean", "gaussian"}


@pytest.mark.parametrize("stop", STOP_RULES)
@pytest.mark.parametrize("scorer", sorted(SCORERS.keys() - BLIND_TO_SPIKES))
def test_few_hot_pages_are_found_among_many(backend, stop, scorer) -> None:
    config = dataclasses.replace(SMALL, stop=stop, scorer=scorer, coverage=0.95, delta=0.05)
    cache, q = planted(3, 128 * PAGE, [17, 61, 90])
    wrapper, _ = make_wrapper(cache, config, backend)
    out, step = decode(wrapper, cache, q, SCALE)
    exact = dense(cache, q, SCALE)
    error = (out.double() - exact).norm() / exact.norm()
    assert error < 0.06
    counts = step.row(0)
    assert 5 <= counts.pages_attended <= 0.3 * counts.pages_total
    assert counts.bytes_read < 0.5 * counts.bytes_dense
    assert counts.coverage > 0.9


def test_a_tighter_knob_reads_more(backend) -> None:
    cache = make_cache([100 * PAGE], 1, DIM, seed=5)
    q = queries(1, kv_heads=1)
    wrapper, _ = make_wrapper(cache, SMALL, backend)
    for knob, values in (
        ("psa_coverage", [0.3, 0.6, 0.9, 0.99]),
        ("psa_delta", [0.5, 0.02, 0.004]),
    ):
        read = [decode(wrapper, cache, q, SCALE, [{knob: x}])[1].row(0).bytes_read for x in values]
        assert read == sorted(read) and read[0] < read[-1]


def test_rows_of_a_batch_follow_their_own_rules(backend) -> None:
    cache = make_cache([60 * PAGE] * 3, KV_HEADS, DIM, seed=6)
    q = queries(3)
    wrapper, _ = make_wrapper(cache, SMALL, backend)
    params = [{"psa_policy": "dense"}, {"psa_delta": 0.9}, {"psa_coverage": 0.9}]
    out, step = decode(wrapper, cache, q, SCALE, params)
    torch.testing.assert_close(out[0].double(), dense(cache, q, SCALE)[0], rtol=0, atol=2e-6)
    shares = [step.row(i).as_dict()["pages_fraction"] for i in range(3)]
    assert shares[0] == 1.0 and shares[1] < shares[2] < 1.0
    assert step.sparse_rows == 2


def test_a_row_does_not_depend_on_its_batch(backend) -> None:
    cache = make_cache([60 * PAGE, 9 * PAGE, 33 * PAGE + 2], KV_HEADS, DIM, seed=8)
    q = queries(3)
    wrapper, _ = make_wrapper(cache, SMALL, backend)
    together, _ = decode(wrapper, cache, q, SCALE)
    for row in range(3):
        single = dataclasses.replace(
            cache,
            req_to_token=cache.req_to_token[row : row + 1],
            seq_lens=cache.seq_lens[row : row + 1],
        )
        alone, _ = decode(wrapper, single, q[row : row + 1], SCALE)
        assert torch.equal(alone[0], together[row])


def test_short_requests_take_the_dense_path_bit_for_bit(backend) -> None:
    cache = make_cache([64 * PAGE, 20 * PAGE], KV_HEADS, DIM, seed=9)
    q = queries(2)
    wrapper, _ = make_wrapper(cache, dataclasses.replace(SMALL, min_context=32 * PAGE), backend)
    out, step = decode(wrapper, cache, q, SCALE)
    exact, _ = decode(wrapper, cache, q, SCALE, [{"psa_policy": "dense"}] * 2)
    assert torch.equal(out[1], exact[1]) and not torch.equal(out[0], exact[0])
    assert step.sparse_rows == 1


def test_pages_without_a_valid_summary_are_attended(backend) -> None:
    cache, q = planted(11, 64 * PAGE, [20])
    wrapper, scorer = make_wrapper(cache, SMALL, backend)
    slots = cache.tokens(0)
    scorer.invalidate_slots(slots[20 * PAGE : 24 * PAGE])
    out, step = decode(wrapper, cache, q, SCALE)
    assert step.row(0).stale_pages == 4
    error = (out.double() - dense(cache, q, SCALE)).norm() / dense(cache, q, SCALE).norm()
    assert error < 0.2
    scorer.invalidate_all()
    out, step = decode(wrapper, cache, q, SCALE)
    torch.testing.assert_close(out.double(), dense(cache, q, SCALE), rtol=0, atol=1e-5)


def test_padding_rows_count_nothing(backend) -> None:
    cache = make_cache([20 * PAGE, 1], KV_HEADS, DIM, seed=12)
    cache.seq_lens[1] = 0
    q = queries(2)
    wrapper, _ = make_wrapper(cache, SMALL, backend)
    out, step = decode(wrapper, cache, q, SCALE)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert step.row(1).visits == 0 and step.row(0).visits == KV_HEADS


def test_run_needs_a_plan(backend) -> None:
    cache = make_cache([PAGE], KV_HEADS, DIM, seed=13)
    wrapper, _ = make_wrapper(cache, SMALL, backend)
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(0, queries(1), cache.k, cache.v, SCALE)


def test_totals_are_the_sum_of_the_steps(backend) -> None:
    cache = make_cache([30 * PAGE], KV_HEADS, DIM, seed=14)
    wrapper, _ = make_wrapper(cache, SMALL, backend)
    steps = [decode(wrapper, cache, queries(1, seed=s), SCALE)[1] for s in range(3)]
    report = wrapper.stats.as_dict()
    assert report["active"] and report["decode_steps"] == 3 and len(report["layers"]) == 1
    assert report["bytes_read"] == sum(s.layer(0).bytes_read for s in steps)
    assert report["bytes_dense"] == 3 * KV_HEADS * 30 * PAGE * 2 * DIM * 4
    assert 0 < report["bytes_fraction"] < 1


def test_a_request_that_grows_past_the_least_context_turns_sparse(backend) -> None:
    """In one wrapper, whose parts of a batch are kept from step to step."""
    cache = make_cache([40 * PAGE, 40 * PAGE], 2, 64, seed=5)
    wrapper, _ = make_wrapper(cache, PSAConfig(min_context=20 * PAGE), backend)
    table, slots = RuleTable(wrapper.config, 2, "cpu"), torch.arange(2)
    for lens in ([19 * PAGE, 30 * PAGE], [20 * PAGE - 1, 31 * PAGE], [20 * PAGE, 5], [0, 5]):
        plan = wrapper.plan(cache.req_to_token, slots, torch.tensor(lens), table.rows(slots))
        sparse = [n >= 20 * PAGE for n in lens]
        assert plan.sparse_rows == plan.scored_rows == sum(sparse)
        assert (plan.rows.mode != 0).tolist() == plan.batch.active.tolist() == sparse
        assert plan.rows.stops.tolist() == sparse
        assert plan.batch.page_table.shape == (2, -(-max(lens) // PAGE))


def test_statistics_are_the_same_by_numpy_and_by_torch() -> None:
    rng = torch.Generator().manual_seed(0)
    columns = torch.rand(3, 4, 2, NUM_COLUMNS, generator=rng) * 3
    columns[1, 2, 0, COVERAGE] = torch.nan
    columns[:, 3] = 0
    lens = torch.tensor([100.0, 7.0, 33.0, 0.0], dtype=torch.float64)
    given = (columns.double(), lens, torch.rand(3, 4, 2).double(), torch.tensor([1, 0, 1, 0]) > 0)
    by_torch, by_numpy = torch.zeros(2, 3, 4, len(dataclasses.fields(ReadCounts))).double()
    _fill(torch, by_torch, given, PAGE, ByteCost(8, 0))
    _fill(numpy, by_numpy.numpy(), [x.numpy() for x in given], PAGE, ByteCost(8, 0))
    torch.testing.assert_close(by_numpy, by_torch, rtol=1e-12, atol=0)
    first = ReadCounts(*by_torch[0, 0].tolist())
    assert (first.visits, first.pages_total, first.bytes_dense) == (2, 2 * -(-100 // PAGE), 1600)
    assert by_torch[1, 2, 8] == 1 and by_torch[1, 1, 8] == 2 and (by_torch[:, 3] == 0).all()


def test_a_step_does_not_depend_on_those_before_it(backend) -> None:
    """Arguments that stay prepared from step to step follow rows, lengths and rules."""
    cache = make_cache([40 * PAGE, 9 * PAGE + 3, 25 * PAGE, 70], KV_HEADS, DIM, seed=9)
    kept, _ = make_wrapper(cache, SMALL, backend)
    rules = [{}, {"psa_policy": "dense"}, {"psa_coverage": 0.8}, {"psa_delta": 0.4}]
    for seed, (slots, lens) in enumerate(
        (
            ([0, 1], [40 * PAGE, 140]),
            ([0, 1], [40 * PAGE - 3, 141]),
            ([2, 0], [25 * PAGE, 17]),
            ([3, 1], [70, 0]),
            ([0, 1, 2], [100, 100, 300]),
            ([1, 3], [147, 33]),
        )
    ):
        outs, tables = [], []
        for wrapper in (kept, make_wrapper(cache, SMALL, backend)[0]):
            table = RuleTable(SMALL, 4, "cpu")
            for slot, params in enumerate(rules):
                table.set(slot, RequestRule.parse(params, SMALL))
            rows = torch.tensor(slots)
            wrapper.plan(cache.req_to_token, rows, torch.tensor(lens), table.rows(rows))
            out, lse = wrapper.run(0, queries(len(slots), seed), cache.k, cache.v, SCALE)
            outs.append((out, lse))
            tables.append(wrapper.finish().table)
        assert torch.equal(*(out for out, _ in outs)) and torch.equal(*(lse for _, lse in outs))
        assert torch.equal(*tables)


def test_a_prepared_call_refuses_other_rows() -> None:
    cache = make_cache([40, 50], KV_HEADS, DIM, seed=9)
    wrapper, _ = make_wrapper(cache, SMALL, "cpu")
    decode(wrapper, cache, queries(2), SCALE)
    prepared = wrapper._prepared
    assert prepared is not None
    table, lens = torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    floats = torch.zeros(2)
    rest = {"threshold": floats, "kappa_floor": floats, "kappa_std": floats}
    rest |= {"seq_lens": lens, "mode": lens}
    prepared.take_batch(page_table=table, **rest)
    for bad in (table[:1], torch.zeros(2, 8, dtype=torch.int32)[:, ::2]):
        with pytest.raises(ValueError, match="contiguous tensors of 2 rows"):
            prepared.take_batch(page_table=bad, **rest)
