"""Key sketches: C++ against the reference, and the reference against its definition."""

from functools import cache

import pytest
import torch
from kernel_cases import CASES, Batch, Case, make_batch
from sgl_psa_kernels import BACKENDS, key_sketch
from sgl_psa_kernels.key_sketch.codes import affine_codes
from sgl_psa_kernels.key_sketch.packing import (
    BITS,
    byte_places,
    pack,
    packed_bytes,
    packed_rows,
    unpack,
)


def make_sketch(batch: Batch, bits: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sketches of all tokens in use; unused places hold 255 and NaN."""
    case = batch.case
    shape = (batch.num_pages, case.num_kv_heads, case.page_size)
    codes = torch.full((*shape, packed_bytes(case.head_dim, bits)), 255, dtype=torch.uint8)
    affine = torch.full((*shape, 2), float("nan"), dtype=torch.float16)
    slots = torch.cat([batch.slots(row) for row in range(len(case.lens))])
    key_sketch.write(
        batch.k, slots, codes, affine, bits=bits, page_size=case.page_size, backend=backend
    )
    return codes, affine


def score(batch: Batch, codes, affine, bits: int, backend: str, **replace) -> torch.Tensor:
    args = {
        "q": batch.q,
        "watermark": torch.full((batch.num_pages,), batch.case.page_size, dtype=torch.int32),
        "active": torch.ones(len(batch.case.lens), dtype=torch.uint8),
    } | replace
    return key_sketch.score(
        args["q"],
        codes,
        affine,
        args["watermark"],
        batch.page_table,
        batch.seq_lens,
        args["active"],
        bits=bits,
        page_size=batch.case.page_size,
        sm_scale=batch.sm_scale,
        backend=backend,
    )


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_planar_and_invertible(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 48), dtype=torch.uint8)
    packed = pack(codes, bits)
    width = packed_bytes(48, bits)
    assert packed.shape == (3, width)
    assert torch.equal(unpack(packed, bits), codes)
    byte = int(packed[1, 2])
    elements = [(byte >> (bits * plane)) & (2**bits - 1) for plane in range(8 // bits)]
    assert elements == codes[1, 2::width].tolist()


def test_sixteen_keys_share_a_column_of_four_bytes_each() -> None:
    places = byte_places(torch.arange(32), 32, 10)
    assert places[0].tolist() == [0, 1, 2, 3, 64, 65, 66, 67, 128, 129]
    assert places[1].tolist() == [4, 5, 6, 7, 68, 69, 70, 71, 130, 131]
    assert (places[16:] - places[:16] == 16 * 10).all()
    assert byte_places(torch.tensor([3]), 4, 6).tolist() == [[12, 13, 14, 15, 22, 23]]


@pytest.mark.parametrize("page_size", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("width", [2, 6, 16])
def test_every_byte_of_a_page_has_one_place(page_size: int, width: int) -> None:
    places = byte_places(torch.arange(page_size), page_size, width)
    assert places.flatten().sort().values.tolist() == list(range(page_size * width))
    rows = torch.randint(0, 256, (3, page_size, width), dtype=torch.uint8)
    stored = torch.zeros(3, page_size * width, dtype=torch.uint8)
    stored[:, places] = rows
    assert torch.equal(packed_rows(stored.view(rows.shape)), rows)


@pytest.mark.parametrize("bits", [2, 4])
def test_reference_rounds_every_element_to_the_nearest_step(bits: int) -> None:
    keys = torch.randn(50, 64)
    codes, affine = affine_codes(keys, bits)
    scale, zero = affine.float()[..., :1], affine.float()[..., 1:]
    error = (zero + scale * codes - keys).abs()
    # Half a step, plus what rounding the affine to half moves the ends of the range by.
    assert (error <= 0.5 * scale + 4e-3 * keys.abs().amax(1, keepdim=True)).all()


def test_reference_one_bit_keeps_mean_and_mean_deviation() -> None:
    keys = torch.randn(50, 64)
    codes, affine = affine_codes(keys, 1)
    mean = keys.mean(1)
    mad = (keys - mean[:, None]).abs().mean(1)
    torch.testing.assert_close(affine[:, 0].float(), 2 * mad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(affine.float().sum(1), mean + mad, rtol=1e-3, atol=2e-3)
    assert ((codes == 1) == (keys > mean[:, None])).float().mean() > 0.99


def query_step(q: torch.Tensor, sm_scale: float, backend: str) -> torch.Tensor:
    """Step of the queries' rounding [B, Hq], float64: "cpu" rounds them to bytes."""
    return sm_scale * q.abs().amax(2).double() / 127 * (backend == "cpu")


def code_distance(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Sum over the elements of |code - middle|, [pages, Hkv, P]: with half a step and the scale it
    bounds what rounding the query can do to a logit, because its sum is not rounded."""
    return (unpack(packed_rows(codes), bits).double() - (2**bits - 1) / 2).abs().sum(-1)


@cache
def solved(case: Case, bits: int):
    """Batch, reference sketches and exact scores; shared by the implementations under test."""
    batch = make_batch(case)
    codes, affine = make_sketch(batch, bits, "reference")
    exact = score(batch, codes, affine, bits, "reference", q=batch.q.double())
    return batch, codes, affine, exact


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_write_matches_reference(case: Case, bits: int, isa: str) -> None:
    batch, want_codes, want_affine, _ = solved(case, bits)
    codes, affine = make_sketch(batch, bits, "cpu")
    if bits == 1:
        # Sums may round differently: neighbouring halves, and codes of elements at the mean.
        torch.testing.assert_close(affine, want_affine, rtol=2e-3, atol=1e-3, equal_nan=True)
        different = unpack(packed_rows(codes), 1) != unpack(packed_rows(want_codes), 1)
        assert different.float().mean() < 2e-3
    else:
        torch.testing.assert_close(affine, want_affine, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(codes, want_codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_score_matches_float64(case: Case, bits: int, sketch_backend: str) -> None:
    batch, codes, affine, exact = solved(case, bits)
    got = score(batch, codes, affine, bits, sketch_backend)
    step = query_step(batch.q, batch.sm_scale, sketch_backend)
    reach = affine[..., 0].double() * code_distance(codes, bits)
    for row in range(len(case.lens)):
        pages = batch.pages(row)
        if len(pages) == 0:
            continue
        page_reach = reach[pages].nan_to_num(0.0).amax(-1).T
        heads = page_reach.repeat_interleave(case.group, 0)
        want = exact[row, :, : len(pages)]
        bound = 0.5 * step[row][:, None] * heads + 2e-5 * (1 + want.abs())
        error = (got[row, :, : len(pages)].double() - want).abs()
        assert torch.isfinite(want).all()
        assert (error <= bound).all(), float((error - bound).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_watermark_below_the_fill_gives_infinity(backend: str) -> None:
    case = Case(torch.bfloat16, 64, 16, 2, 2, (40, 33))
    batch = make_batch(case)
    codes, affine = make_sketch(batch, 2, "reference")
    watermark = torch.zeros(batch.num_pages, dtype=torch.int32)
    pages = batch.pages(0)
    watermark[pages] = torch.tensor([16, 15, 8], dtype=torch.int32)
    watermark[batch.pages(1)] = torch.tensor([16, 16, 0], dtype=torch.int32)
    got = score(batch, codes, affine, 2, backend, watermark=watermark)
    # Row 0: page 1 lacks a token, page 2 holds 8 tokens and all are covered.
    assert torch.isinf(got[0, :, :3]).tolist() == [[False, True, False]] * 4
    assert torch.isinf(got[1, :, :3]).tolist() == [[False, False, True]] * 4
    assert (got[0, :, 1] > 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e9, -1e9])
def test_estimates_that_are_no_numbers_become_infinity(
    sketch_backend: str, bits: int, broken: float
) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 1, 2, (64,)))
    batch.k[batch.slots(0)[20], 0, 3] = broken
    codes, affine = make_sketch(batch, bits, sketch_backend)
    got = score(batch, codes, affine, bits, sketch_backend)[0, :, :4]
    assert (got[:, 1] == float("inf")).all()
    assert torch.isfinite(got[:, [0, 2, 3]]).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_query_that_is_no_number_gives_infinity(sketch_backend: str, broken: float) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 1, 2, (64,)))
    codes, affine = make_sketch(batch, 2, "reference")
    q = batch.q.clone()
    q[0, 1, 5] = broken
    got = score(batch, codes, affine, 2, sketch_backend, q=q)[0, :, :4]
    assert torch.isfinite(got[0]).all() and torch.isposinf(got[1]).all()


def test_queries_of_zeros_and_of_tiny_numbers_count_tokens(sketch_backend: str) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 1, 2, (50,)))
    codes, affine = make_sketch(batch, 2, "reference")
    q = torch.zeros_like(batch.q)
    q[0, 1] = 1e-38
    got = score(batch, codes, affine, 2, sketch_backend, q=q)[0, :, :4]
    want = torch.tensor([16.0, 16.0, 16.0, 2.0]).log().expand(2, 4)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_inactive_rows_are_not_read() -> None:
    batch = make_batch(Case(torch.bfloat16, 64, 16, 1, 2, (40, 40)))
    codes, affine = make_sketch(batch, 2, "cpu")
    want = score(batch, codes, affine, 2, "cpu")
    batch.page_table[1] = 2**30
    active = torch.tensor([1, 0], dtype=torch.uint8)
    got = score(batch, codes, affine, 2, "cpu", active=active)
    assert torch.equal(got[0, :, :3], want[0, :, :3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_keys_have_code_zero(backend: str) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 1, 2, (16,)))
    # Not a half: the stored zero differs from the keys, and the scale is 0.
    batch.k[batch.slots(0)] = 1.0001
    codes, affine = make_sketch(batch, 2, backend)
    page = batch.pages(0)[0]
    assert (codes[page] == 0).all()
    assert (affine[page, :, :, 0] == 0).all()


@pytest.mark.parametrize("rotated", [False, True])
def test_keys_given_in_the_order_of_the_slots_are_those_of_the_cache(
    backend: str, rotated: bool
) -> None:
    batch = make_batch(Case(torch.bfloat16, 64, 16, 2, 4, (40, 7)))
    slots = torch.cat([batch.slots(1), batch.slots(0)])
    signs = key_sketch.rotation_signs(64) if rotated else None
    tables = []
    # Rows of a wider tensor, as models split them off their projections.
    rows = torch.cat([batch.k[slots], batch.k[slots]], 1)[:, :2]
    for k, in_order in ((batch.k, False), (rows, True)):
        shape = (batch.num_pages, 2, 16)
        codes = torch.zeros(*shape, packed_bytes(64, 2), dtype=torch.uint8)
        affine = torch.zeros(*shape, 2 - rotated, dtype=torch.float16)
        key_sketch.write(
            k, slots, codes, affine, signs, bits=2, page_size=16, backend=backend,
            in_order=in_order,
        )  # fmt: skip
        tables.append((codes, affine))
    assert tables[0][0].any()
    assert torch.equal(tables[0][0], tables[1][0])
    assert torch.equal(tables[0][1], tables[1][1])
    with pytest.raises(ValueError, match="slots must have shape"):
        key_sketch.write(
            rows, slots[1:], *tables[0], signs, bits=2, page_size=16, backend=backend,
            in_order=True,
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_slots_outside_of_the_pool_are_refused(backend: str) -> None:
    batch = make_batch(Case(torch.bfloat16, 64, 16, 1, 2, (16,)))
    codes, affine = make_sketch(batch, 2, "reference")
    for slot in (-1, batch.k.shape[0]):
        with pytest.raises(ValueError, match="outside of the pool"):
            key_sketch.write(
                batch.k,
                torch.tensor([1, slot]),
                codes,
                affine,
                bits=2,
                page_size=16,
                backend=backend,
            )
