"""Page summaries: C++ against a float64 run of the definition."""

import pytest
import torch
from kernel_cases import CASES, Batch, Case, make_batch
from sgl_psa_kernels import BACKENDS, page_summary


def page_fills(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """All pages in use and their fills."""
    size = batch.case.page_size
    pages = [batch.pages(row) for row in range(len(batch.case.lens))]
    fills = [
        (length - size * torch.arange(-(-length // size))).clamp(max=size)
        for length in batch.case.lens
    ]
    return torch.cat(pages), torch.cat(fills).to(torch.int32)


def make_summary(batch: Batch, backend: str) -> torch.Tensor:
    case = batch.case
    shape = (batch.num_pages, case.num_kv_heads, page_summary.VECTORS, case.head_dim)
    summary = torch.full(shape, float("nan"), dtype=torch.bfloat16)
    pages, fill = page_fills(batch)
    page_summary.update(batch.k, pages, fill, summary, page_size=case.page_size, backend=backend)
    return summary


def score(batch: Batch, summary: torch.Tensor, backend: str, **replace) -> torch.Tensor:
    args = {
        "q": batch.q,
        "watermark": torch.full((batch.num_pages,), batch.case.page_size, dtype=torch.int32),
        "active": torch.ones(len(batch.case.lens), dtype=torch.uint8),
    } | replace
    return page_summary.score(
        args["q"],
        summary,
        args["watermark"],
        batch.page_table,
        batch.seq_lens,
        args["active"],
        page_size=batch.case.page_size,
        sm_scale=batch.sm_scale,
        backend=backend,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_update_matches_float64(case: Case, backend: str) -> None:
    batch = make_batch(case)
    got = make_summary(batch, backend)
    touched = torch.zeros(batch.num_pages, dtype=torch.bool)
    for page, fill in zip(*map(torch.Tensor.tolist, page_fills(batch)), strict=True):
        keys = batch.k[page * case.page_size :][:fill].double()
        centre = (keys.amin(0) + keys.amax(0)) / 2
        parts = (keys.mean(0), keys.var(0, correction=0), centre, (keys - centre).abs().mean(0))
        exact = torch.stack(parts, dim=1)
        error = (got[page].double() - exact).abs()
        assert (error <= 1.01 * 2**-8 * exact.abs() + 1e-6).all(), float(error.max())
        touched[page] = True
    assert torch.isnan(got[~touched]).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_score_matches_float64(case: Case, backend: str) -> None:
    batch = make_batch(case)
    summary = make_summary(batch, "reference")
    exact = score(batch, summary, "reference", q=batch.q.double())
    got = score(batch, summary, backend)
    for row in range(len(case.lens)):
        count = len(batch.pages(row))
        want = exact[row, :, :count]
        assert torch.isfinite(want).all()
        torch.testing.assert_close(got[row, :, :count].double(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_page_is_estimated_exactly_up_to_log_two(backend: str) -> None:
    """With one token both models give the logit itself; logaddexp of two equals adds log 2."""
    batch = make_batch(Case(torch.float32, 64, 16, 2, 2, (1,)))
    batch.k = batch.k.bfloat16().float()
    got = score(batch, make_summary(batch, backend), backend)[0, :, 0]
    keys = batch.k[batch.slots(0)[0]].repeat_interleave(2, 0)
    want = batch.sm_scale * (batch.q[0] * keys).sum(1) + torch.log(torch.tensor(2.0))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_watermark_and_broken_summaries_give_infinity(backend: str) -> None:
    batch = make_batch(Case(torch.bfloat16, 64, 16, 2, 2, (70,)))
    summary = make_summary(batch, backend)
    pages = batch.pages(0)
    watermark = torch.full((batch.num_pages,), 16, dtype=torch.int32)
    watermark[pages[1]] = 15
    watermark[pages[4]] = 6
    summary[pages[2], :, 1, 5] = float("nan")
    summary[pages[3], :, 3, 5] = float("nan")
    got = score(batch, summary, backend, watermark=watermark)[0, :, :5]
    assert torch.isinf(got).tolist() == [[False, True, True, True, False]] * 4
    assert not torch.isnan(got).any()


@pytest.mark.parametrize("checked", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("page", "fill", "match"), [(99, 1, "pool"), (-1, 1, "pool"), (1, 0, "fill"), (1, 17, "fill")]
)
def test_bad_pages_and_fills_are_refused(checked: str, page: int, fill: int, match: str) -> None:
    batch = make_batch(Case(torch.bfloat16, 64, 16, 1, 2, (16,)))
    summary = make_summary(batch, "reference")
    with pytest.raises(ValueError, match=match):
        page_summary.update(
            batch.k,
            torch.tensor([page]),
            torch.tensor([fill], dtype=torch.int32),
            summary,
            page_size=16,
            backend=checked,
        )
