"""Summaries and sketches are pure functions of the pool, whatever the history of writes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sgl_psa_kernels import BACKENDS, key_sketch, page_summary
from sgl_psa_kernels.key_sketch.packing import BITS, packed_bytes, packed_rows

PAGE_SIZE = 8
NUM_PAGES = 4
HEADS = 2
DIM = 32

# Each step writes a chunk of tokens to a page: behind its fill, or from offset 0 (reuse).
STEPS = st.lists(
    st.tuples(st.integers(0, NUM_PAGES - 1), st.integers(1, PAGE_SIZE), st.booleans()),
    min_size=1,
    max_size=12,
)


KINDS = tuple(page_summary.VECTORS)
SIGNS = key_sketch.rotation_signs(DIM)


def empty_tables(
    bits: int, rotated: bool = False, kind: str = "hybrid", summary_bits: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    rows = (NUM_PAGES, HEADS, PAGE_SIZE)
    vectors = (NUM_PAGES, HEADS, page_summary.VECTORS[kind])
    eight = summary_bits == 8
    return (
        torch.zeros(*rows, packed_bytes(DIM, bits), dtype=torch.uint8),
        torch.zeros(*rows, 1 if rotated else 2, dtype=torch.float16),
        torch.zeros(*vectors, DIM, dtype=torch.uint8 if eight else torch.bfloat16),
        torch.zeros(*vectors, 2, dtype=torch.bfloat16) if eight else None,
    )


def record(
    k, slots, pages, fill, tables, bits: int, backend: str, rotated: bool = False, kind="hybrid"
) -> None:
    codes, affine, summary, summary_affine = tables
    signs = SIGNS if rotated else None
    key_sketch.write(
        k, slots, codes, affine, signs, bits=bits, page_size=PAGE_SIZE, backend=backend
    )
    page_summary.update(
        k,
        pages,
        fill,
        summary,
        kind=kind,
        page_size=PAGE_SIZE,
        backend=backend,
        affine=summary_affine,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(
    steps=STEPS,
    bits=st.sampled_from(BITS),
    rotated=st.booleans(),
    kind=st.sampled_from(KINDS),
    summary_bits=st.sampled_from((8, 16)),
    seed=st.integers(0, 2**31),
)
def test_history_does_not_matter(
    backend: str, steps, bits: int, rotated: bool, kind: str, summary_bits: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    k = torch.full((NUM_PAGES * PAGE_SIZE, HEADS, DIM), float("nan"), dtype=torch.bfloat16)
    fill = [0] * NUM_PAGES
    tables = empty_tables(bits, rotated, kind, summary_bits)
    for page, tokens, reuse in steps:
        begin = 0 if reuse or fill[page] == PAGE_SIZE else fill[page]
        end = min(PAGE_SIZE, begin + tokens)
        slots = torch.arange(page * PAGE_SIZE + begin, page * PAGE_SIZE + end)
        k[slots] = torch.randn(len(slots), HEADS, DIM, generator=rng).bfloat16()
        fill[page] = end
        fills = torch.tensor([end], dtype=torch.int32)
        record(k, slots, torch.tensor([page]), fills, tables, bits, backend, rotated, kind)

    used = [page for page in range(NUM_PAGES) if fill[page]]
    slots = torch.cat([torch.arange(fill[page]) + page * PAGE_SIZE for page in used])
    fills = torch.tensor([fill[page] for page in used], dtype=torch.int32)
    fresh = empty_tables(bits, rotated, kind, summary_bits)
    record(k, slots, torch.tensor(used), fills, fresh, bits, backend, rotated, kind)
    at = (slots // PAGE_SIZE, slice(None), slots % PAGE_SIZE)
    assert torch.equal(packed_rows(tables[0])[at], packed_rows(fresh[0])[at])
    assert torch.equal(tables[1][at], fresh[1][at])
    assert torch.equal(tables[2][used], fresh[2][used])
    assert torch.isfinite(tables[2][used].float()).all()
    if tables[3] is not None and fresh[3] is not None:
        assert torch.equal(tables[3][used], fresh[3][used])
        assert torch.isfinite(tables[3][used]).all()


def test_repeated_slots_and_pages_are_harmless() -> None:
    k = torch.randn(NUM_PAGES * PAGE_SIZE, HEADS, DIM)
    slots = torch.tensor([0] * 40 + [3, 9])
    pages = torch.tensor([1] * 9)
    fill = torch.full((9,), 5, dtype=torch.int32)
    want, got = empty_tables(2), empty_tables(2)
    record(k, slots, pages, fill, want, 2, "reference")
    record(k, slots, pages, fill, got, 2, "cpu")
    assert torch.equal(want[0], got[0])
    assert torch.equal(want[1], got[1])
    torch.testing.assert_close(want[2], got[2], rtol=8e-3, atol=1e-5)
