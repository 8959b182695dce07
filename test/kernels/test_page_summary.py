"""Page summaries: C++ against a float64 run of the definition."""

import math

import pytest
import torch
from kernel_cases import CASES, Batch, Case, make_batch, true_log_mass
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


def make_summary(batch: Batch, backend: str, kind: str = "hybrid") -> torch.Tensor:
    case = batch.case
    shape = (batch.num_pages, case.num_kv_heads, page_summary.VECTORS[kind], case.head_dim)
    summary = torch.full(shape, float("nan"), dtype=torch.bfloat16)
    pages, fill = page_fills(batch)
    page_summary.update(
        batch.k, pages, fill, summary, kind=kind, page_size=case.page_size, backend=backend
    )
    return summary


def score(
    batch: Batch, summary: torch.Tensor, backend: str, kind: str = "hybrid", **replace
) -> torch.Tensor:
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
        kind=kind,
        page_size=batch.case.page_size,
        sm_scale=batch.sm_scale,
        backend=backend,
    )


KINDS = tuple(page_summary.VECTORS)


def exact_summary(keys: torch.Tensor, kind: str) -> torch.Tensor:
    """float64 [Hkv, vectors, D] of the keys of a page; of a box only the centre."""
    keys = keys.double()
    centre = (keys.amin(0) + keys.amax(0)) / 2
    moments = [keys.mean(0), keys.var(0, correction=0)]
    cuboid = [centre, (keys - centre).abs().mean(0)]
    parts = {
        "hybrid": moments + cuboid,
        "mean": moments[:1],
        "gaussian": moments,
        "cuboid_mean": cuboid,
        "box": [centre],
    }
    return torch.stack(parts[kind], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_update_matches_float64(case: Case, kind: str, backend: str) -> None:
    batch = make_batch(case)
    got = make_summary(batch, backend, kind)
    touched = torch.zeros(batch.num_pages, dtype=torch.bool)
    for page, fill in zip(*map(torch.Tensor.tolist, page_fills(batch)), strict=True):
        exact = exact_summary(batch.k[page * case.page_size :][:fill], kind)
        error = (got[page, :, : exact.shape[1]].double() - exact).abs()
        assert (error <= 1.01 * 2**-8 * exact.abs() + 1e-6).all(), float(error.max())
        touched[page] = True
    assert torch.isnan(got[~touched]).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_stored_box_contains_every_key_and_little_more(case: Case, backend: str) -> None:
    batch = make_batch(case)
    box = make_summary(batch, backend, "box").double()
    for page, fill in zip(*map(torch.Tensor.tolist, page_fills(batch)), strict=True):
        keys = batch.k[page * case.page_size :][:fill].double()
        centre, half = box[page, :, 0], box[page, :, 1]
        assert (keys <= centre + half).all() and (keys >= centre - half).all()
        slack = 2 * half - (keys.amax(0) - keys.amin(0))
        assert (slack <= 2**-6 * half + 2**-7 * centre.abs() + 1e-30).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_box_bounds_the_best_logit_and_the_page_mass(case: Case, backend: str) -> None:
    batch = make_batch(case)
    got = score(batch, make_summary(batch, backend, "box"), backend, "box").double()
    mass = true_log_mass(batch)
    for row, length in enumerate(case.lens):
        if length == 0:
            continue
        count = len(batch.pages(row))
        bound = got[row, :, :count]
        assert (bound >= mass[row, :, :count] - 1e-5 * bound.abs()).all()
        heads = batch.q[row].double().unflatten(0, (case.num_kv_heads, case.group))
        logits = torch.einsum("hgd,thd->hgt", heads, batch.k[batch.slots(row)].double())
        for page, part in enumerate(logits.flatten(0, 1).split(case.page_size, 1)):
            tokens = min(case.page_size, length - page * case.page_size)
            best = batch.sm_scale * part.amax(1)
            assert (bound[:, page] - math.log(tokens) >= best - 1e-5 * (1 + best.abs())).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_score_matches_float64(case: Case, kind: str, backend: str) -> None:
    batch = make_batch(case)
    summary = make_summary(batch, "reference", kind)
    exact = score(batch, summary, "reference", kind, q=batch.q.double())
    got = score(batch, summary, backend, kind)
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
            kind="hybrid",
            page_size=16,
            backend=checked,
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_that_is_no_number_gives_infinity(backend: str, kind: str) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 1, 2, (64,)))
    batch.k[batch.slots(0)[20], 0, 3] = float("nan")
    got = score(batch, make_summary(batch, backend, kind), backend, kind)[0, :, :4]
    assert torch.isposinf(got).tolist() == [[False, True, False, False]] * 2


def test_unknown_kinds_are_refused() -> None:
    batch = make_batch(Case(torch.bfloat16, 64, 16, 1, 2, (16,)))
    with pytest.raises(ValueError, match="choose one of hybrid, mean"):
        score(batch, make_summary(batch, "reference"), "cpu", "median")
