"""Properties of progressive decode that hold for every input."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, make_batch, true_log_mass
from sgl_psa_kernels import BACKENDS
from sgl_psa_kernels.progressive_decode import (
    CONSERVATIVE,
    COVERAGE,
    DENSE,
    MARGINAL,
    STAT_NAMES,
    progressive_decode,
)

INF = float("inf")
DIM = 64  # also the most pages of a row: page j's values are the unit vector j


@st.composite
def problems(draw):
    """Keyword arguments of progressive_decode whose output reveals the pages attended.

    All keys are zero, so every token has weight 1: out * exp(lse) counts the tokens attended of
    each page.
    """
    page_size = draw(st.sampled_from([1, 4, 16]))
    heads = draw(st.integers(1, 2))
    group = draw(st.integers(1, 5))
    lens = draw(st.lists(st.integers(0, min(DIM * page_size, 400)), min_size=1, max_size=3))
    seed = draw(st.integers(0, 2**31))
    rng = torch.Generator().manual_seed(seed)
    batch = make_batch(Case(torch.float32, DIM, page_size, heads, group, tuple(lens)), seed)
    batch.k[:] = 0
    for row in range(len(lens)):
        for j, slots in enumerate(batch.slots(row).split(page_size)):
            batch.v[slots] = torch.eye(DIM)[j]
    log_mass = 4 * torch.randn(len(lens), heads * group, batch.page_table.shape[1], generator=rng)
    stale = torch.rand(log_mass.shape, generator=rng) < draw(st.sampled_from([0.0, 0.02, 0.3]))
    log_mass[stale] = INF
    modes = draw(
        st.lists(
            st.sampled_from([DENSE, MARGINAL, COVERAGE, CONSERVATIVE]),
            min_size=len(lens),
            max_size=len(lens),
        )
    )
    threshold = draw(st.sampled_from([-INF, -6.0, -2.0, 0.0, 3.0]))
    rows = len(lens)
    return {
        "batch": batch,
        "log_mass": log_mass,
        "mode": torch.tensor(modes, dtype=torch.int32),
        "threshold": torch.full((rows,), threshold),
        "kappa_floor": torch.full((rows,), draw(st.sampled_from([0.0, -INF]))),
        "kappa_std": torch.full((rows,), draw(st.sampled_from([0.0, 1.5]))),
        "sink_pages": draw(st.integers(0, 3)),
        "recent_pages": draw(st.integers(0, 3)),
        "group_pages": draw(st.integers(1, 6)),
        "group_percent": draw(st.sampled_from([0, 40, 150])),
    }


def solve(problem: dict, backend: str, **replace):
    values = problem | replace
    batch = values.pop("batch")
    tables = [values.pop(name) for name in ("log_mass", "mode", "threshold")]
    tables += [values.pop(name) for name in ("kappa_floor", "kappa_std")]
    return progressive_decode(
        batch.q,
        batch.k,
        batch.v,
        batch.page_table,
        batch.seq_lens,
        *tables,
        page_size=batch.case.page_size,
        sm_scale=batch.sm_scale,
        backend=backend,
        **values,
    )


def tokens_by_page(result) -> torch.Tensor:
    """Tokens attended [B, Hq, DIM], read off the output."""
    out, lse, _ = result
    return out * lse.exp().unsqueeze(-1)


@settings(max_examples=25, deadline=None)
@given(problem=problems())
def test_pages_are_attended_once_and_counted_right(problem) -> None:
    batch = problem["batch"]
    size = batch.case.page_size
    column = {name: i for i, name in enumerate(STAT_NAMES)}
    for backend in BACKENDS:
        result = solve(problem, backend)
        counts = tokens_by_page(result).unflatten(1, (batch.case.num_kv_heads, -1))
        stats = result[2]
        for row, length in enumerate(batch.case.lens):
            full = (length - size * torch.arange(DIM)).clamp(0, size).float()
            got = counts[row]
            attended = got > 0.5
            # A page counts all of its tokens or none; twice would show as twice the tokens.
            torch.testing.assert_close(got, attended * full, rtol=1e-4, atol=1e-3)
            assert (attended == attended[:, :1]).all()
            pages = attended[:, 0].sum(1).float()
            tokens = (attended[:, 0] * full).sum(1)
            s = stats[row]
            assert torch.equal(s[:, column["pages_attended"]], pages)
            assert torch.equal(s[:, column["tokens_attended"]], tokens)
            assert (s[:, column["tokens_attended"]] <= length).all()
            assert (s[:, column["pages_scored"]] <= -(-length // size)).all()
            assert (s[:, column["rounds"]] <= s[:, column["pages_scored"]]).all()
            assert ((s[:, 4] >= 0) & (s[:, 4] <= 1)).all()


@settings(max_examples=25, deadline=None)
@given(problem=problems())
def test_forced_and_stale_pages_are_always_attended(problem) -> None:
    batch = problem["batch"]
    size = batch.case.page_size
    for backend in BACKENDS:
        result = solve(problem, backend)
        counts = tokens_by_page(result).unflatten(1, (batch.case.num_kv_heads, -1))
        stale = ~(problem["log_mass"] < INF)
        stale = stale.unflatten(1, (batch.case.num_kv_heads, -1)).any(2)
        for row, length in enumerate(batch.case.lens):
            n = -(-length // size)
            page = torch.arange(n)
            forced = page < problem["sink_pages"]
            forced = forced | (page >= n - max(1, problem["recent_pages"]))
            for head in range(batch.case.num_kv_heads):
                must = forced | stale[row, head, :n]
                assert (counts[row, head, :, :n][:, must] > 0.5).all()
                if problem["mode"][row] != DENSE:
                    assert result[2][row, head, 5] == stale[row, head, :n].sum()


@settings(max_examples=25, deadline=None)
@given(problem=problems())
def test_backends_select_the_same_pages(problem) -> None:
    want = solve(problem, "reference")
    for backend in BACKENDS[1:]:
        got = solve(problem, backend)
        torch.testing.assert_close(tokens_by_page(got), tokens_by_page(want), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(problem=problems())
def test_a_rule_that_never_stops_is_dense(problem) -> None:
    rows = len(problem["batch"].case.lens)
    batch = problem["batch"]
    live = batch.seq_lens > 0
    for backend in BACKENDS:
        dense = solve(problem, backend, mode=torch.zeros(rows, dtype=torch.int32), log_mass=None)
        for mode in (MARGINAL, COVERAGE, CONSERVATIVE):
            everything = solve(
                problem,
                backend,
                mode=torch.full((rows,), mode, dtype=torch.int32),
                threshold=torch.full((rows,), -INF),
            )
            torch.testing.assert_close(everything[0], dense[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(everything[1], dense[1], rtol=1e-5, atol=1e-5)
            assert torch.equal(everything[2][live][..., :2], dense[2][live][..., :2])
            assert (everything[2][live][..., 4] == 1).all()


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 500),
    threshold=st.floats(-4, 1),
    seed=st.integers(0, 2**31),
)
def test_marginal_leaves_no_page_above_the_bar(length, threshold, seed) -> None:
    """With exact masses: after the stop no remaining page holds more than delta of the result."""
    case = Case(torch.float32, 64, 16, 1, 3, (length,))
    batch = make_batch(case, seed)
    log_mass = true_log_mass(batch).float()
    tables = [torch.tensor([value]) for value in (threshold, 0.0, 0.0)]
    for backend in BACKENDS:
        _, lse, stats = progressive_decode(
            batch.q,
            batch.k,
            batch.v,
            batch.page_table,
            batch.seq_lens,
            log_mass,
            torch.tensor([MARGINAL], dtype=torch.int32),
            *tables,
            page_size=16,
            sm_scale=batch.sm_scale,
            sink_pages=1,
            recent_pages=1,
            group_pages=1,
            backend=backend,
        )
        n = -(-length // 16)
        above = (log_mass[0, :, :n] > (lse[0] + threshold + 1e-4)[:, None]).any(0).sum()
        assert above <= stats[0, 0, 0]
        total = torch.logsumexp(log_mass[0, :, :n], 1)
        coverage = torch.exp(lse[0] - total).min()
        torch.testing.assert_close(stats[0, 0, 4], coverage, rtol=1e-3, atol=1e-3)
