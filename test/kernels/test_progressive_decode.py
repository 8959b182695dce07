"""Progressive decode: every implementation against a float64 run of the reference."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from kernel_cases import CASES, Batch, Case, assert_rounded, make_batch, true_log_mass
from sgl_psa_kernels.progressive_decode import (
    CONSERVATIVE,
    COVERAGE,
    DENSE,
    MARGINAL,
    STAT_NAMES,
    progressive_decode,
)

INF = float("inf")

RULES = {
    "dense": (DENSE, 0.0, 0.0, 0.0),
    "marginal-.3": (MARGINAL, math.log(0.3), 0.0, 0.0),
    "marginal-.02": (MARGINAL, math.log(0.02), 0.0, 0.0),
    "coverage-.8": (COVERAGE, math.log(0.25), 0.0, 1.0),
    "coverage-.95-bold": (COVERAGE, math.log(0.05 / 0.95), -INF, 0.5),
    "coverage-all": (COVERAGE, -INF, 0.0, 0.0),
    "conservative-.8": (CONSERVATIVE, math.log(0.25), 0.0, 1.0),
    "conservative-.5-bold": (CONSERVATIVE, 0.0, -INF, 3.0),
}


def decode(batch: Batch, log_mass, rules, backend: str, exact: bool = False, **options):
    """Run with one rule for all rows, or a list of rules."""
    rows = len(batch.case.lens)
    table = list(zip(*([rules] * rows if isinstance(rules, tuple) else rules), strict=True))
    settings = {"sink_pages": 1, "recent_pages": 2, "group_pages": 3} | options
    q, k, v = batch.q, batch.k, batch.v
    if exact:
        q, k, v = q.double(), k.double(), v.double()
    return progressive_decode(
        q,
        k,
        v,
        batch.page_table,
        batch.seq_lens,
        log_mass,
        torch.tensor(table[0], dtype=torch.int32),
        *(torch.tensor(column, dtype=torch.float32) for column in table[1:]),
        page_size=batch.case.page_size,
        sm_scale=batch.sm_scale,
        backend=backend,
        **settings,
    )


def estimates(batch: Batch, seed: int = 3, noise: float = 0.4) -> torch.Tensor:
    """Noisy estimates with a few stale pages (+inf, and one NaN)."""
    rng = torch.Generator().manual_seed(seed)
    truth = true_log_mass(batch)
    log_mass = (truth + noise * torch.randn(truth.shape, generator=rng)).float()
    for row in range(len(batch.case.lens)):
        pages = len(batch.pages(row))
        if pages > 8:
            log_mass[row, 0, 3] = INF
            log_mass[row, -1, 5] = float("nan")
    return log_mass


def check(batch: Batch, got, want) -> None:
    """got: what is tested; want: the reference in float64."""
    out, lse, stats = got
    rows = torch.tensor(batch.case.lens) > 0
    names = {name: column for column, name in enumerate(STAT_NAMES)}
    exact_columns = [column for name, column in names.items() if name != "estimated_coverage"]
    assert torch.equal(stats[..., exact_columns], want[2][..., exact_columns])
    torch.testing.assert_close(stats, want[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse[rows].double(), want[1][rows], rtol=4e-6, atol=4e-6)
    assert (lse[~rows] == -INF).all()
    assert (out[~rows] == 0).all()
    assert_rounded(out[rows], want[0][rows], 2e-5, batch.case.dtype)


@cache
def solved(case: Case, rule: str):
    """Batch, estimates and exact result; shared by the implementations under test."""
    batch = make_batch(case)
    log_mass = None if rule == "dense" else estimates(batch)
    return batch, log_mass, decode(batch, log_mass, RULES[rule], "reference", exact=True)


#: Dense rows of more than one chunk.
LONG = Case(torch.bfloat16, 128, 16, 1, 4, (1200,))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", (*CASES, LONG), ids=str)
def test_matches_float64_reference(case: Case, rule: str, backend: str) -> None:
    batch, log_mass, want = solved(case, rule)
    check(batch, decode(batch, log_mass, RULES[rule], backend), want)


@pytest.mark.parametrize("group_pages", [1, 4, 100])
@pytest.mark.parametrize(("sink_pages", "recent_pages"), [(0, 0), (3, 5), (90, 0), (0, 90)])
def test_forced_pages_and_group_sizes(
    group_pages: int, sink_pages: int, recent_pages: int, backend: str
) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 2, 3, (560, 16, 100)))
    log_mass = estimates(batch)
    options = {
        "group_pages": group_pages,
        "sink_pages": sink_pages,
        "recent_pages": recent_pages,
    }
    for rule in ("marginal-.3", "coverage-.8", "conservative-.8"):
        want = decode(batch, log_mass, RULES[rule], "reference", exact=True, **options)
        check(batch, decode(batch, log_mass, RULES[rule], backend, **options), want)


@pytest.mark.parametrize("rule", ["marginal-.02", "coverage-.8", "coverage-all"])
def test_a_row_that_fills_the_page_table_beside_a_dense_one(rule: str, backend: str) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 2, 3, (600, 600)))
    batch.page_table = batch.page_table[:, :38].contiguous()
    log_mass = estimates(batch)[..., :38].contiguous()
    rules = [RULES["dense"], RULES[rule]]
    check(
        batch,
        decode(batch, log_mass, rules, backend),
        decode(batch, log_mass, rules, "reference", exact=True),
    )


def test_rules_mix_in_one_batch(backend: str) -> None:
    batch = make_batch(Case(torch.bfloat16, 128, 16, 2, 4, (300, 0, 301, 600, 290, 17, 310, 500)))
    log_mass = estimates(batch)
    rules = [RULES[name] for name in RULES]
    check(
        batch,
        decode(batch, log_mass, rules, backend),
        decode(batch, log_mass, rules, "reference", exact=True),
    )


def test_ties_go_to_the_lower_page(backend: str) -> None:
    """Equal estimates, and +0 against -0 keys: only the order of pages decides."""
    batch = make_batch(Case(torch.float32, 64, 16, 1, 2, (320,)))
    log_mass = torch.full((1, 2, batch.page_table.shape[1]), 4.0)
    rule = (MARGINAL, -1.5, 0.0, 0.0)
    options = {"group_pages": 1, "sink_pages": 0, "recent_pages": 1}
    want = decode(batch, log_mass, rule, "reference", exact=True, **options)
    check(batch, decode(batch, log_mass, rule, backend, **options), want)
    assert 1 < want[2][0, 0, 0] < 20


@pytest.mark.parametrize("rule", [(MARGINAL, -5.0, 0.0, 0.0), (COVERAGE, -0.5, 0.0, 0.0)])
@pytest.mark.parametrize("step", [0.01, 0.5])
def test_many_pages_of_about_the_same_estimate(rule: tuple, step: float, backend: str) -> None:
    """Which of them are attended, and how many, is decided by their order; many of them tie."""
    batch = make_batch(Case(torch.float32, 64, 1, 1, 3, (900,)))
    batch.k[:] = 0  # so every page has the same mass
    rng, pages = torch.Generator().manual_seed(8), batch.page_table.shape[1]
    log_mass = (torch.randn(1, 3, pages, generator=rng) / step).round() * step + 1.0
    want, got = torch.empty(1, 1, pages).byte(), torch.empty(1, 1, pages).byte()
    options = {"group_pages": 40}
    exact = decode(batch, log_mass, rule, "reference", exact=True, attended=want, **options)
    check(batch, decode(batch, log_mass, rule, backend, attended=got, **options), exact)
    assert torch.equal(got, want)
    assert 300 < exact[2][0, 0, 0] < 850


def test_large_and_tiny_logits_stay_finite(backend: str) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 1, 4, (700,)), spread=60.0)
    assert true_log_mass(batch).nan_to_num(0.0).abs().max() > 100
    log_mass = estimates(batch)
    for rule in RULES.values():
        out, lse, stats = decode(batch, log_mass, rule, backend)
        want = decode(batch, log_mass, rule, "reference", exact=True)
        torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(out.double(), want[0], rtol=1e-3, atol=1e-3)
        assert torch.equal(stats[..., :4], want[2][..., :4])


def heads_apart(batch: Batch) -> Batch:
    """The same batch over a pool in which each head has its tokens for itself."""
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (batch.k, batch.v))
    return replace(batch, k=k, v=v)


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("rule", ["dense", "marginal-.02", "coverage-.95-bold", "conservative-.8"])
def test_rows_do_not_depend_on_batch_or_threads(rule: str, apart: bool, isa: str) -> None:
    """Bit for bit: batching and the number of threads must not change greedy outputs. The first
    row has two chunks when it is dense."""
    case = Case(torch.bfloat16, 128, 16, 2, 4, (1500, 40, 1030))
    batch = make_batch(case)
    if apart:
        batch = heads_apart(batch)
    log_mass = estimates(batch)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(decode(batch, log_mass, RULES[rule], "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    for row in range(3):
        alone = Batch(
            Case(*[*vars(case).values()][:5], (case.lens[row],)),
            batch.q[row : row + 1],
            batch.k,
            batch.v,
            batch.page_table[row : row + 1],
            batch.seq_lens[row : row + 1],
        )
        single = decode(alone, log_mass[row : row + 1], RULES[rule], "cpu")
        for a, b in zip(results[0], single, strict=True):
            assert torch.equal(a[row : row + 1], b)


@pytest.mark.parametrize("rule", ["dense", "marginal-.02", "coverage-.95-bold"])
@pytest.mark.parametrize("case", (*CASES, LONG), ids=str)
def test_result_does_not_depend_on_where_heads_lie(case: Case, rule: str, isa: str) -> None:
    """Bit for bit: heads of a token side by side in memory, or each with its tokens for itself."""
    batch = make_batch(case)
    log_mass = estimates(batch)
    one, other = (decode(b, log_mass, RULES[rule], "cpu") for b in (batch, heads_apart(batch)))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mode": 4}, "mode"),
        ({"threshold": float("nan")}, "threshold"),
        ({"log_mass": None}, "log_mass"),
        ({"seq_len": 65}, "seq_lens"),
        ({"seq_len": -1}, "seq_lens"),
        ({"page": 10**6}, "pool"),
        ({"page": -1}, "pool"),
    ],
)
def test_bad_rows_are_refused(backend: str, change: dict, match: str) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 1, 2, (16,)))
    batch.page_table = batch.page_table[:, :4].contiguous()
    if "page" in change:
        batch.page_table[0, 0] = change["page"]
    if "seq_len" in change:
        batch.seq_lens[0] = change["seq_len"]
    log_mass = None if "log_mass" in change else torch.zeros(1, 2, 4)
    rule = (change.get("mode", MARGINAL), change.get("threshold", 0.0), 0.0, 0.0)
    with pytest.raises(ValueError, match=match):
        decode(batch, log_mass, rule, backend)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "dense"])
@pytest.mark.parametrize("group_pages", [1, 3])
def test_first_group_follows_the_prediction(rule: str, group_pages: int, backend: str) -> None:
    """Predictions below the forced pages, in between, and beyond the context."""
    batch = make_batch(Case(torch.float32, 64, 16, 2, 3, (560, 16, 0, 600, 500)))
    log_mass = estimates(batch)
    first = torch.tensor([[0, 7], [1, 9], [5, 5], [10**6, 1], [-4, 20]], dtype=torch.int32)
    options = {"group_pages": group_pages, "first_pages": first}
    want = decode(batch, log_mass, RULES[rule], "reference", exact=True, **options)
    check(batch, decode(batch, log_mass, RULES[rule], backend, **options), want)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "dense"])
@pytest.mark.parametrize(("group_pages", "percent"), [(1, 60), (2, 200), (1, 2**31 - 1)])
def test_groups_grow_with_what_is_attended(
    rule: str, group_pages: int, percent: int, backend: str
) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 2, 3, (560, 16, 0, 600, 500)))
    log_mass = estimates(batch)
    options = {"group_pages": group_pages, "group_percent": percent}
    if percent == 60:
        options["first_pages"] = torch.tensor([[0, 7], [1, 9], [5, 5], [99, 1], [-4, 20]]).int()
    want = decode(batch, log_mass, RULES[rule], "reference", exact=True, **options)
    check(batch, decode(batch, log_mass, RULES[rule], backend, **options), want)


def test_growing_groups_are_those_of_the_percentage(backend: str) -> None:
    """40 pages, 3 of them forced: groups of 3 (100 % of 3), 6, 12, and the 16 that are left."""
    batch = make_batch(Case(torch.float32, 64, 16, 1, 2, (640,)))
    log_mass = true_log_mass(batch).float()
    options = {"group_pages": 1, "group_percent": 100}
    _, _, stats = decode(batch, log_mass, RULES["coverage-all"], backend, **options)
    assert stats[0, 0, STAT_NAMES.index("pages_attended")] == 40
    assert stats[0, 0, STAT_NAMES.index("rounds")] == 4


def test_prediction_that_suffices_takes_one_round(backend: str) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 2, 3, (560,)))
    log_mass = estimates(batch)
    _, _, plain = decode(batch, log_mass, RULES["coverage-.8"], backend, group_pages=1)
    pages = plain[..., STAT_NAMES.index("pages_attended")].to(torch.int32)
    _, _, stats = decode(
        batch, log_mass, RULES["coverage-all"], backend, group_pages=1, first_pages=pages * 0 + 35
    )
    assert plain[..., STAT_NAMES.index("rounds")].min() > 1
    assert (stats[..., STAT_NAMES.index("rounds")] == 1).all()
    with pytest.raises(ValueError, match="first_pages"):
        decode(batch, log_mass, RULES["coverage-.8"], backend, first_pages=pages[:, :1])


@pytest.mark.parametrize("rule", RULES)
def test_attended_pages_are_told(rule: str, backend: str) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 2, 3, (560, 16, 0, 600)))
    log_mass = estimates(batch)
    shape = (4, 2, batch.page_table.shape[1])
    want, got = torch.full(shape, 7).byte(), torch.full(shape, 7).byte()
    decode(batch, log_mass, RULES[rule], "reference", exact=True, attended=want)
    _, _, stats = decode(batch, log_mass, RULES[rule], backend, attended=got)
    assert torch.equal(got, want)
    assert torch.equal(got.sum(-1), stats[..., STAT_NAMES.index("pages_attended")].long())
    assert got[3, :, 0].all() and not got[2].any() and not got[1, :, 1:].any()
