"""Triton kernels that give the ends of lists of pages to another attention, and take up its result.

Tensors are per pair r of row and KV head, r = row * HKV + head. The other attention takes rows of
PAGES pages: row f of pair r is number r * F + f.
"""

import triton
import triton.language as tl

from sgl_psa_kernels.progressive_decode.triton_attend import compared
from sgl_psa_kernels.triton_tiles import finite

#: Natural logarithm of 2.
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def share_lists(
    mode, seq_lens, page_table, pages, counts, left, indices, last_page_len,
    page_step, head_step, table_row, M, F,
    FORCED: tl.constexpr, TOLD: tl.constexpr, HKV: tl.constexpr, PAGE: tl.constexpr,
    PAGES: tl.constexpr, PT: tl.constexpr,
):  # fmt: skip
    """Share the first ``counts`` [R] of ``pages`` [R, M]: all but ``left`` [R], which come first,
    go to rows of PAGES pages, as many as F rows take; none where the rule holds masses of pages
    against their estimates. Grid (R, F).

    Writes ``left``; indices [R, F, PAGES], ``page_step`` a page and ``head_step`` a head; and
    last_page_len [R, F], which a row's tokens follow from: (PAGES - 1) * PAGE + last_page_len, so
    it is below zero where a row lacks pages.
    """
    r = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1)
    b, h = r // HKV, r % HKV
    count = tl.load(counts + r)
    length = tl.load(seq_lens + b)
    taken = tl.minimum(count, F * PAGES)
    taken = tl.where(compared(tl.load(mode + b), FORCED, TOLD), 0, taken)
    if f == 0:
        tl.store(left + r, count - taken)
    spot = tl.arange(0, PT)
    place = count - taken + f * PAGES + spot
    live = (spot < PAGES) & (place < count)
    page = tl.load(pages + r * M + place, mask=live, other=0)
    frame = tl.load(page_table + b * table_row + page, mask=live, other=0)
    at = (r * F + f) * PAGES + spot
    index = frame * page_step + h.to(tl.int32) * head_step
    tl.store(indices + at, tl.where(live, index, 0), mask=spot < PAGES)
    tokens = tl.sum(tl.where(live, tl.minimum(length - page * PAGE, PAGE), 0), 0)
    tl.store(last_page_len + r * F + f, tokens - (PAGES - 1) * PAGE)


@triton.jit
def merge_rows(
    counts, left, row_out, row_lse, out, lse, F,
    G: tl.constexpr, D: tl.constexpr, DT: tl.constexpr, PAGES: tl.constexpr,
    FT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the rows that :func:`share_lists` made, row_out [R, F, G, D] and row_lse [R, F, G] to
    the base 2, into out float32 [R, G, D] and lse [R, G]. FT >= F. Grid (R, G)."""
    r = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    used = tl.cdiv(tl.load(counts + r) - tl.load(left + r), PAGES)
    if used > 0:
        dims = tl.arange(0, DT)
        row = tl.arange(0, FT)
        part = tl.load(row_lse + (r * F + row) * G + g, mask=row < used, other=float("-inf")) * LN_2
        at = r * G + g
        before = tl.load(lse + at)
        base = finite(tl.maximum(tl.max(part, 0), before))
        whole = base + tl.log(tl.sum(tl.exp(part - base), 0) + tl.exp(before - base))
        base = finite(whole)
        acc = tl.load(out + at * D + dims, mask=dims < D, other=0.0) * tl.exp(before - base)
        for first in range(0, used, BLOCK):
            block = first + tl.arange(0, BLOCK)
            at_row = (r * F + block) * G + g
            share = tl.load(row_lse + at_row, mask=block < used, other=float("-inf")) * LN_2
            values = tl.load(
                row_out + at_row[:, None] * D + dims[None, :],
                mask=(block < used)[:, None] & (dims < D)[None, :],
                other=0.0,
            )
            acc += tl.sum(tl.exp(share - base)[:, None] * values.to(tl.float32), 0)
        tl.store(out + at * D + dims, acc, mask=dims < D)
        tl.store(lse + at, whole)
