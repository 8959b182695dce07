"""Rotated sketches and candidate pages: C++ against the reference, the reference against theory."""

from functools import cache

import pytest
import torch
from kernel_cases import CASES, Batch, Case, make_batch
from sgl_psa_kernels import BACKENDS, key_sketch
from sgl_psa_kernels.key_sketch.codes import rotated_codes
from sgl_psa_kernels.key_sketch.packing import BITS, packed_bytes, packed_rows, unpack
from sgl_psa_kernels.key_sketch.rotation import block_size, rotate
from test_key_sketch import code_distance, query_step

SOME = [case for case in CASES if case.head_dim in (16, 80, 96, 128, 256)]


def make_sketch(batch: Batch, bits: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sketches of all tokens in use; unused places hold 255 and NaN."""
    case = batch.case
    shape = (batch.num_pages, case.num_kv_heads, case.page_size)
    codes = torch.full((*shape, packed_bytes(case.head_dim, bits)), 255, dtype=torch.uint8)
    scale = torch.full((*shape, 1), float("nan"), dtype=torch.float16)
    slots = torch.cat([batch.slots(row) for row in range(len(case.lens))])
    signs = key_sketch.rotation_signs(case.head_dim)
    key_sketch.write(
        batch.k, slots, codes, scale, signs, bits=bits, page_size=case.page_size, backend=backend
    )
    return codes, scale


def score(batch: Batch, codes, scale, bits: int, backend: str, **replace) -> torch.Tensor:
    args = {
        "q": rotate(batch.q, key_sketch.rotation_signs(batch.case.head_dim)),
        "watermark": torch.full((batch.num_pages,), batch.case.page_size, dtype=torch.int32),
        "candidates": None,
        "log_mass": None,
    } | replace
    return key_sketch.score(
        args["q"],
        codes,
        scale,
        args["watermark"],
        batch.page_table,
        batch.seq_lens,
        torch.ones(len(batch.case.lens), dtype=torch.uint8),
        args["candidates"],
        args["log_mass"],
        bits=bits,
        page_size=batch.case.page_size,
        sm_scale=batch.sm_scale,
        backend=backend,
    )


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
def test_rotation_is_orthogonal_and_mixes_every_block(head_dim: int) -> None:
    matrix = key_sketch.rotation_matrix(head_dim)
    eye = torch.eye(head_dim)
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-6)
    size = block_size(head_dim)
    assert torch.allclose(matrix[:size, :size].abs(), torch.tensor(size**-0.5))
    x = torch.randn(5, 3, head_dim)
    rotated = rotate(x, key_sketch.rotation_signs(head_dim))
    torch.testing.assert_close(rotated, x @ matrix, rtol=1e-4, atol=1e-5)
    one = rotate(x[2, 1], key_sketch.rotation_signs(head_dim))
    assert torch.equal(rotated[2, 1], one)


@pytest.mark.parametrize(("bits", "most"), [(1, 0.13), (2, 0.07), (4, 0.02)])
def test_estimates_are_exact_along_the_key_and_close_elsewhere(bits: int, most: float) -> None:
    """Also for keys with most of their length in one element, which plain codes serve badly."""
    rng = torch.Generator().manual_seed(1)
    keys = torch.randn(400, 128, generator=rng)
    keys[:, 7] += 40.0
    signs = key_sketch.rotation_signs(128)
    codes, scale = rotated_codes(keys, bits, signs)
    sketched = scale.float() * (codes.float() - (2**bits - 1) / 2)
    rotated = rotate(keys, signs)
    ratio = (sketched * rotated).sum(-1) / keys.square().sum(-1)
    torch.testing.assert_close(ratio, torch.ones(400), rtol=0, atol=1e-3)
    q = rotate(torch.randn(400, 128, generator=rng), signs)
    error = ((sketched - rotated) * q).sum(-1) / (q.norm(dim=-1) * keys.norm(dim=-1))
    assert error.abs().mean() < 0.6 * most and error.abs().quantile(0.95) < 2 * most
    assert error.mean().abs() < 0.02 * 3


@cache
def solved(case: Case, bits: int):
    """Batch, reference sketches and exact scores; shared by the implementations under test."""
    batch = make_batch(case)
    codes, scale = make_sketch(batch, bits, "reference")
    q = batch.q.double() @ key_sketch.rotation_matrix(case.head_dim).double()
    return batch, codes, scale, score(batch, codes, scale, bits, "reference", q=q)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_write_matches_reference(case: Case, bits: int, isa: str) -> None:
    batch, want_codes, want_scale, _ = solved(case, bits)
    codes, scale = make_sketch(batch, bits, "cpu")
    # Sums may round differently: codes of elements at the edge of a step.
    torch.testing.assert_close(scale, want_scale, rtol=2e-3, atol=1e-6, equal_nan=True)
    different = unpack(packed_rows(codes), bits) != unpack(packed_rows(want_codes), bits)
    assert different.float().mean() < 1e-3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_score_matches_float64(case: Case, bits: int, sketch_backend: str) -> None:
    batch, codes, scale, exact = solved(case, bits)
    rotated = rotate(batch.q, key_sketch.rotation_signs(case.head_dim))
    got = score(batch, codes, scale, bits, sketch_backend, q=rotated)
    step = query_step(rotated, batch.sm_scale, sketch_backend)
    reach = scale[..., 0].double() * code_distance(codes, bits)
    for row in range(len(case.lens)):
        pages = batch.pages(row)
        if len(pages) == 0:
            continue
        page_reach = reach[pages].nan_to_num(0.0).amax(-1).T
        want = exact[row, :, : len(pages)]
        heads = page_reach.repeat_interleave(case.group, 0)
        bound = 0.5 * step[row][:, None] * heads + 5e-5 * (1 + want.abs())
        error = (got[row, :, : len(pages)].double() - want).abs()
        assert torch.isfinite(want).all()
        assert (error <= bound).all(), float((error - bound).max())


@pytest.mark.parametrize("bits", BITS)
def test_only_candidates_are_scored(bits: int, sketch_backend: str) -> None:
    case = Case(torch.bfloat16, 64, 16, 2, 3, (700, 0, 45, 16 * 130))
    batch = make_batch(case)
    codes, scale = make_sketch(batch, bits, "reference")
    rng = torch.Generator().manual_seed(3)
    shape = (4, case.num_kv_heads, batch.page_table.shape[1])
    candidates = (torch.rand(shape, generator=rng) < 0.3).to(torch.uint8)
    watermark = torch.full((batch.num_pages,), 16, dtype=torch.int32)
    watermark[batch.pages(0)[5]] = 3
    full = score(batch, codes, scale, bits, sketch_backend, watermark=watermark)
    # Sketches of other pages are not read: nothing would survive these.
    for row in (0, 2, 3):
        pages = batch.pages(row)
        for head in range(case.num_kv_heads):
            scale[pages[candidates[row, head, : len(pages)] == 0], head] = float("nan")
    before = torch.randn(4, 6, shape[2], generator=rng)
    before[0, :, 7], before[2, :, 0] = float("inf"), float("-inf")
    log_mass = before.clone()
    got = score(
        batch,
        codes,
        scale,
        bits,
        sketch_backend,
        watermark=watermark,
        candidates=candidates,
        log_mass=log_mass,
    )
    assert got is log_mass
    for row in (0, 2, 3):
        count = len(batch.pages(row))
        chosen = candidates[row, :, :count].repeat_interleave(case.group, 0).bool()
        want = torch.where(chosen, full[row, :, :count], before[row, :, :count])
        assert torch.equal(got[row, :, :count], want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", BITS)
def test_keys_without_a_sketch_give_infinity(backend: str, bits: int) -> None:
    batch = make_batch(Case(torch.float32, 64, 16, 1, 2, (96,)))
    slots = batch.slots(0)
    batch.k[slots[20], 0, 3] = float("nan")
    batch.k[slots[40], 0, 3] = float("inf")
    batch.k[slots[50], 0, 3] = 1e9
    batch.k[slots[64:80]] = 0.0
    codes, scale = make_sketch(batch, bits, backend)
    got = score(batch, codes, scale, bits, backend)[0, :, :6]
    assert torch.isposinf(got).tolist() == [[False, True, True, True, False, False]] * 2
    # A page of zero keys holds its tokens and nothing more.
    torch.testing.assert_close(got[:, 4], torch.full((2,), 16.0).log(), rtol=0, atol=1e-5)


def test_bad_shapes_are_refused() -> None:
    batch = make_batch(Case(torch.bfloat16, 64, 16, 2, 2, (40,)))
    codes, scale = make_sketch(batch, 2, "reference")
    with pytest.raises(ValueError, match="candidates must have shape"):
        score(batch, codes, scale, 2, "cpu", candidates=torch.ones(1, 2, 1, dtype=torch.uint8))
    flags = torch.ones(1, 2, batch.page_table.shape[1], dtype=torch.uint8)
    with pytest.raises(ValueError, match="candidates need log_mass"):
        score(batch, codes, scale, 2, "cpu", candidates=flags)
    with pytest.raises(ValueError, match="log_mass must have shape"):
        score(batch, codes, scale, 2, "cpu", log_mass=torch.zeros(1, 4, 1))
    signs = key_sketch.rotation_signs(64)
    pair = torch.zeros(*scale.shape[:3], 2, dtype=torch.float16)
    with pytest.raises(ValueError, match="affine must have shape"):
        key_sketch.write(
            batch.k, batch.slots(0), codes, pair, signs, bits=2, page_size=16, backend="cpu"
        )
