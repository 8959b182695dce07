"""Page summaries: C++ against a float64 run of the definition."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, Batch, Case, make_batch, true_log_mass
from sgl_psa_kernels import BACKENDS, page_summary
from sgl_psa_kernels.page_summary.storage import decode


def page_fills(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """All pages in use and their fills."""
    size = batch.case.page_size
    pages = [batch.pages(row) for row in range(len(batch.case.lens))]
    fills = [
        (length - size * torch.arange(-(-length // size))).clamp(max=size)
        for length in batch.case.lens
    ]
    return torch.cat(pages), torch.cat(fills).to(torch.int32)


class Stored(NamedTuple):
    """Summaries as the operators take them."""

    summary: torch.Tensor
    affine: torch.Tensor | None

    def values(self) -> torch.Tensor:
        """float64 [pages, Hkv, vectors, D]."""
        if self.affine is None:
            return self.summary.double()
        return decode(self.summary, self.affine).double()


def make_summary(batch: Batch, backend: str, kind: str = "hybrid", bits: int = 16) -> Stored:
    """Summaries of all pages in use; those of the others are poisoned."""
    case = batch.case
    shape = (batch.num_pages, case.num_kv_heads, page_summary.VECTORS[kind])
    if bits == 8:
        summary = torch.full((*shape, case.head_dim), 137, dtype=torch.uint8)
        affine = torch.full((*shape, 2), float("nan"), dtype=torch.bfloat16)
    else:
        summary = torch.full((*shape, case.head_dim), float("nan"), dtype=torch.bfloat16)
        affine = None
    page_summary.update(
        batch.k,
        *page_fills(batch),
        summary,
        affine=affine,
        kind=kind,
        page_size=case.page_size,
        backend=backend,
    )
    return Stored(summary, affine)


def score(
    batch: Batch, stored: Stored, backend: str, kind: str = "hybrid", **replace
) -> torch.Tensor:
    args = {
        "q": batch.q,
        "watermark": torch.full((batch.num_pages,), batch.case.page_size, dtype=torch.int32),
        "active": torch.ones(len(batch.case.lens), dtype=torch.uint8),
    } | replace
    return page_summary.score(
        args["q"],
        stored.summary,
        args["watermark"],
        batch.page_table,
        batch.seq_lens,
        args["active"],
        kind=kind,
        page_size=batch.case.page_size,
        sm_scale=batch.sm_scale,
        backend=backend,
        affine=stored.affine,
    )


KINDS = tuple(page_summary.VECTORS)
BITS = (8, 16)


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


def nearest_error(exact: torch.Tensor, bits: int) -> torch.Tensor:
    """Largest error of storing float64 vectors [..., D] by rounding to nearest.

    In 8 bits half a step: the span of a vector over 255, its low end rounded down and the step
    rounded up by a bfloat16's 2^-7 at most, and the span of float32 noise.
    """
    if bits == 16:
        return 1.01 * 2**-8 * exact.abs() + 1e-6
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    step = (high - low + 2**-7 * low.abs()) / 255 * (1 + 2**-7)
    return 1.001 * step / 2 + 2e-6 * (1 + exact.abs())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_update_matches_float64(case: Case, kind: str, backend: str, bits: int) -> None:
    batch = make_batch(case)
    got = make_summary(batch, backend, kind, bits).values()
    touched = torch.zeros(batch.num_pages, dtype=torch.bool)
    for page, fill in zip(*map(torch.Tensor.tolist, page_fills(batch)), strict=True):
        exact = exact_summary(batch.k[page * case.page_size :][:fill], kind)
        error = (got[page, :, : exact.shape[1]] - exact).abs()
        assert (error <= nearest_error(exact, bits)).all(), float(error.max())
        touched[page] = True
    assert torch.isnan(got[~touched]).all()
    spreads = {"hybrid": [1, 3], "gaussian": [1], "cuboid_mean": [1], "box": [1], "mean": []}
    assert (got[touched][:, :, spreads[kind]] >= 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_stored_box_contains_every_key_and_little_more(
    case: Case, backend: str, bits: int
) -> None:
    batch = make_batch(case)
    box = make_summary(batch, backend, "box", bits).values()
    for page, fill in zip(*map(torch.Tensor.tolist, page_fills(batch)), strict=True):
        keys = batch.k[page * case.page_size :][:fill].double()
        centre, half = box[page, :, 0], box[page, :, 1]
        assert (keys <= centre + half).all() and (keys >= centre - half).all()
        low, high = keys.amin(0), keys.amax(0)
        slack = 2 * half - (high - low)
        if bits == 16:
            assert (slack <= 2**-6 * half + 2**-7 * centre.abs() + 1e-30).all()
        else:
            # Twice the error of the centre, and two steps of the half width.
            error = nearest_error((low + high) / 2, 8)
            least = ((high - low) / 2 + error).amax(-1, keepdim=True)
            step = least * (1 + 2**-7) / 255 * (1 + 2**-7)
            assert (slack <= 2 * error + 2.001 * step + 1e-5).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_box_bounds_the_best_logit_and_the_page_mass(
    case: Case, backend: str, bits: int
) -> None:
    batch = make_batch(case)
    got = score(batch, make_summary(batch, backend, "box", bits), backend, "box").double()
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


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_score_matches_float64(case: Case, kind: str, backend: str, bits: int) -> None:
    batch = make_batch(case)
    summary = make_summary(batch, "reference", kind, bits)
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


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_watermark_and_broken_summaries_give_infinity(backend: str, bits: int) -> None:
    batch = make_batch(Case(torch.bfloat16, 64, 16, 2, 2, (70,)))
    stored = make_summary(batch, backend, bits=bits)
    broken = stored.summary[..., 5] if stored.affine is None else stored.affine[..., 0]
    pages = batch.pages(0)
    watermark = torch.full((batch.num_pages,), 16, dtype=torch.int32)
    watermark[pages[1]] = 15
    watermark[pages[4]] = 6
    broken[pages[2], :, 1] = float("nan")
    broken[pages[3], :, 3] = float("nan")
    got = score(batch, stored, backend, watermark=watermark)[0, :, :5]
    assert torch.isinf(got).tolist() == [[False, True, True, True, False]] * 4
    assert not torch.isnan(got).any()


@pytest.mark.parametrize("checked", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("page", "fill", "match"), [(99, 1, "pool"), (-1, 1, "pool"), (1, 0, "fill"), (1, 17, "fill")]
)
def test_bad_pages_and_fills_are_refused(checked: str, page: int, fill: int, match: str) -> None:
    batch = make_batch(Case(torch.bfloat16, 64, 16, 1, 2, (16,)))
    stored = make_summary(batch, "reference")
    with pytest.raises(ValueError, match=match):
        page_summary.update(
            batch.k,
            torch.tensor([page]),
            torch.tensor([fill], dtype=torch.int32),
            stored.summary,
            affine=stored.affine,
            kind="hybrid",
            page_size=16,
            backend=checked,
        )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_that_is_no_number_gives_infinity(backend: str, kind: str, bits: int) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 1, 2, (64,)))
    batch.k[batch.slots(0)[20], 0, 3] = float("nan")
    got = score(batch, make_summary(batch, backend, kind, bits), backend, kind)[0, :, :4]
    assert torch.isposinf(got).tolist() == [[False, True, False, False]] * 2


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_infinite_keys_give_infinity(backend: str, kind: str, value: float) -> None:
    """Of either sign: never a low estimate."""
    batch = make_batch(Case(torch.float32, 64, 16, 1, 2, (64,)))
    batch.k[batch.slots(0)[20], 0, 3:5] = torch.tensor([value, 1.0])
    got = score(batch, make_summary(batch, backend, kind, 8), backend, kind)[0, :, :4]
    assert torch.isposinf(got).tolist() == [[False, True, False, False]] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_of_8_bits_are_those_of_the_reference(case: Case, backend: str, kind: str) -> None:
    """Up to one step, where float32 noise of a mean decides between two."""
    batch = make_batch(case)
    got, want = (make_summary(batch, name, kind, 8) for name in (backend, "reference"))
    pages = page_fills(batch)[0]
    assert got.affine is not None and want.affine is not None
    torch.testing.assert_close(got.affine[pages], want.affine[pages], rtol=2**-7, atol=1e-6)
    assert (got.summary != want.summary)[pages].float().mean() < 0.05


# Keys whose dimensions differ by up to eight powers of ten in size, and by an offset.
DIMENSIONS = st.lists(
    st.tuples(st.floats(-4, 4), st.sampled_from([-300.0, -1.0, 0.0, 2.5, 1000.0])),
    min_size=16,
    max_size=16,
)


@pytest.mark.parametrize("implementation", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(dimensions=DIMENSIONS, tokens=st.integers(1, 16), seed=st.integers(0, 2**31))
def test_the_8_bit_box_is_never_below_the_best_logit(
    implementation: str, dimensions, tokens: int, seed: int
) -> None:
    batch = make_batch(Case(torch.float32, 16, 16, 1, 2, (tokens,)), seed)
    power, offset = torch.tensor(dimensions).T
    batch.k = batch.k * 10**power + offset
    stored = make_summary(batch, implementation, "box", 8)
    keys = batch.k[batch.slots(0)][:, 0].double()
    centre, half = stored.values()[batch.pages(0)[0], 0]
    assert (keys <= centre + half).all() and (keys >= centre - half).all()
    x = batch.q[0].double() * batch.sm_scale
    bound = score(batch, stored, implementation, "box")[0, :, 0].double()
    # What the float32 sum may lose.
    noise = 2**-20 * (x.abs() * (centre.abs() + half)).sum(-1)
    assert (bound - math.log(tokens) >= (x @ keys.T).amax(1) - noise).all()


def test_codes_without_affine_are_refused() -> None:
    batch = make_batch(Case(torch.bfloat16, 64, 16, 1, 2, (16,)))
    stored = make_summary(batch, "reference", bits=8)
    assert stored.affine is not None
    with pytest.raises(ValueError, match="needs affine"):
        score(batch, Stored(stored.summary, None), "cpu")
    with pytest.raises(ValueError, match=r"summary must be torch\.uint8"):
        score(batch, Stored(stored.summary.bfloat16(), stored.affine), "cpu")
    with pytest.raises(ValueError, match="affine must have shape"):
        score(batch, Stored(stored.summary, stored.affine[:1]), "cpu")


def test_unknown_kinds_are_refused() -> None:
    batch = make_batch(Case(torch.bfloat16, 64, 16, 1, 2, (16,)))
    with pytest.raises(ValueError, match="choose one of hybrid, mean"):
        score(batch, make_summary(batch, "reference"), "cpu", "median")
