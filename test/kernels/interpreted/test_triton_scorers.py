"""Scorers and merge_state in Triton: the tests of the other backends on fewer, smaller cases."""

import pytest
import test_key_sketch as plain
import test_page_summary as summaries
import test_rotated_sketch as rotated
import torch
from kernel_cases import BF16, FP16, FP32, Case, make_batch
from sgl_psa_kernels import key_sketch
from sgl_psa_kernels.key_sketch.packing import BITS, packed_rows, unpack
from sgl_psa_kernels.merge_state import merge_state

CASES = (
    Case(FP32, 64, 16, 2, 3, (10, 0, 3)),
    Case(FP16, 80, 16, 1, 1, (18,)),
    Case(FP32, 96, 128, 1, 2, (20,)),
    Case(BF16, 128, 8, 1, 8, (9, 1)),
    Case(FP16, 256, 32, 1, 5, (17,)),
)


@pytest.mark.parametrize("sketch", [plain, rotated], ids=["plain", "rotated"])
@pytest.mark.parametrize(
    ("case", "bits"),
    [(CASES[0], 4), (CASES[0], 1), (CASES[1], 2), (CASES[2], 1), (CASES[3], 2), (CASES[4], 1)],
    ids=str,
)
def test_sketches(case: Case, bits: int, sketch) -> None:
    batch = make_batch(case)
    codes, affine = sketch.make_sketch(batch, bits, "triton")
    want_codes, want_affine = sketch.make_sketch(batch, bits, "reference")
    if bits == 1 or sketch is rotated:
        # Sums may round differently.
        torch.testing.assert_close(affine, want_affine, rtol=2e-3, atol=1e-3, equal_nan=True)
        different = unpack(packed_rows(codes), bits) != unpack(packed_rows(want_codes), bits)
        assert different.float().mean() < 2e-3
    else:
        assert torch.equal(codes, want_codes)
        torch.testing.assert_close(affine, want_affine, rtol=0, atol=0, equal_nan=True)
    sketch.test_score_matches_float64(case, bits, "triton")


@pytest.mark.parametrize("bits", BITS)
def test_only_candidates_are_scored(bits: int) -> None:
    case = Case(FP16, 64, 16, 2, 3, (300, 0, 45))
    batch = make_batch(case)
    codes, scale = rotated.make_sketch(batch, bits, "reference")
    rng = torch.Generator().manual_seed(3)
    shape = (3, case.num_kv_heads, batch.page_table.shape[1])
    candidates = (torch.rand(shape, generator=rng) < 0.3).to(torch.uint8)
    watermark = torch.full((batch.num_pages,), 16, dtype=torch.int32)
    watermark[batch.pages(0)[5]] = 3
    full = rotated.score(batch, codes, scale, bits, "triton", watermark=watermark)
    for row in (0, 2):
        pages = batch.pages(row)
        for head in range(case.num_kv_heads):
            scale[pages[candidates[row, head, : len(pages)] == 0], head] = float("nan")
    before = torch.randn(3, 6, shape[2], generator=rng)
    before[0, :, 7] = float("inf")
    log_mass = before.clone()
    options = {"watermark": watermark, "candidates": candidates, "log_mass": log_mass}
    got = rotated.score(batch, codes, scale, bits, "triton", **options)
    for row in (0, 2):
        count = len(batch.pages(row))
        chosen = candidates[row, :, :count].repeat_interleave(case.group, 0).bool()
        want = torch.where(chosen, full[row, :, :count], before[row, :, :count])
        assert torch.equal(got[row, :, :count], want)


def test_pages_without_a_sketch_give_infinity() -> None:
    plain.test_watermark_below_the_fill_gives_infinity("triton")
    plain.test_constant_keys_have_code_zero("triton")
    plain.test_estimates_that_are_no_numbers_become_infinity("triton", 2, float("nan"))
    rotated.test_keys_without_a_sketch_give_infinity("triton", 2)


def test_inactive_rows_are_not_read() -> None:
    batch = make_batch(Case(FP16, 64, 16, 1, 2, (40, 40)))
    codes, affine = plain.make_sketch(batch, 2, "reference")
    summary = summaries.make_summary(batch, "reference")
    batch.page_table[1] = 2**30
    active = torch.tensor([1, 0], dtype=torch.uint8)
    for score, state in ((plain.score, (codes, affine, 2)), (summaries.score, (summary,))):
        got = score(batch, *state, "triton", active=active)
        want = score(batch, *state, "reference", active=active)
        torch.testing.assert_close(got[0, :, :3], want[0, :, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", summaries.BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_summaries(case: Case, bits: int) -> None:
    for kind in summaries.KINDS:
        summaries.test_update_matches_float64(case, kind, "triton", bits=bits)
        summaries.test_score_matches_float64(case, kind, "triton", bits=bits)
    summaries.test_the_stored_box_contains_every_key_and_little_more(case, "triton", bits=bits)
    summaries.test_the_box_bounds_the_best_logit_and_the_page_mass(case, "triton", bits=bits)


def test_codes_are_the_references() -> None:
    """Bit for bit where the vectors are: low and high ends need no sums."""
    batch = make_batch(CASES[0])
    got, want = (summaries.make_summary(batch, name, "box", 8) for name in ("triton", "reference"))
    assert torch.equal(got.summary, want.summary)
    torch.testing.assert_close(got.affine, want.affine, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", summaries.KINDS)
def test_a_key_that_is_no_number_gives_infinity(kind: str) -> None:
    for bits in summaries.BITS:
        summaries.test_a_key_that_is_no_number_gives_infinity("triton", kind, bits=bits)


@pytest.mark.parametrize("dim", [64, 80])
def test_merging_is_the_references(dim: int) -> None:
    rng = torch.Generator().manual_seed(0)
    o_a, o_b = torch.randn(2, 3, 5, dim, generator=rng)
    lse_a, lse_b = 20 * torch.randn(2, 3, 5, generator=rng)
    lse_a[0], lse_b[0, 1:3], lse_b[2, 2] = -float("inf"), -float("inf"), -float("inf")
    o_a[0], o_b[0, 1:3], o_b[2, 2] = float("nan"), float("nan"), float("nan")
    got = merge_state(o_a, lse_a, o_b, lse_b, backend="triton")
    want = merge_state(o_a, lse_a, o_b, lse_b)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_keys_given_in_order_are_those_of_the_cache() -> None:
    plain.test_keys_given_in_the_order_of_the_slots_are_those_of_the_cache("triton", True)


def test_nothing_to_write_is_no_launch() -> None:
    batch = make_batch(Case(FP32, 64, 16, 1, 2, (16,)))
    codes, affine = plain.make_sketch(batch, 2, "reference")
    before = codes.clone()
    none = torch.empty(0, dtype=torch.int64)
    key_sketch.write(batch.k, none, codes, affine, bits=2, page_size=16, backend="triton")
    assert torch.equal(codes, before)
